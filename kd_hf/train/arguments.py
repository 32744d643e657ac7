"""What a trainer was handed in Python (networks, data sets, dictionaries) as a recipe with live objects beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from kd_hf.data.source import GIVEN_DATA
from kd_hf.errors import UserError
from kd_hf.models.handle import ModelHandle
from kd_hf.models.live import handle_of
from kd_hf.recipe.config import Block, HubConfig, Recipe, TrainConfig
from kd_hf.recipe.read import make_recipe
from kd_hf.recipe.variants import GIVEN_NETWORK
from kd_hf.tasks import open_task
from kd_hf.tasks.base import Task

Network = str | nn.Module | ModelHandle
Methods = Mapping[str, Any] | Sequence[str]
_HERE = "DistillTrainer"


@dataclass
class Setup:
    """A run before anything is built: its task, its images, and the networks that exist already."""

    task: Task
    train_source: Any
    eval_source: Any
    networks: Mapping[str, ModelHandle] = field(default_factory=dict)
    """By name in the recipe: "student", "teacher", or a teacher's own name."""

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.task.recipe


def read_setup(
    student: Network | Recipe,
    teacher: Network | Mapping[str, Network] | None = None,
    methods: Methods | None = None,
    args: TrainConfig | Mapping[str, Any] | str | Path | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data: Mapping[str, Any] | None = None,
    eval: Mapping[str, Any] | None = None,
    hub: HubConfig | Mapping[str, Any] | None = None,
    processing_class: Any = None,
) -> Setup:
    """What these objects mean together; see :class:`kd_hf.train.trainer.DistillTrainer` for each.

    Raises:
        UserError: an unknown key or a wrong value, with the nearest valid name; no data.
    """
    networks: dict[str, ModelHandle] = {}
    if isinstance(student, Recipe):
        if any(given is not None for given in (teacher, methods, args, data, eval, hub, processing_class)):
            raise UserError(f"{_HERE}: a recipe says all but data sets and callbacks; change the recipe instead")
        recipe = student
    else:
        several = isinstance(teacher, Mapping)
        taught: Mapping[str, Any] = teacher if isinstance(teacher, Mapping) else {"teacher": teacher} if teacher else {}
        for name, network in {"student": student, **taught}.items():
            if not isinstance(network, str):
                networks[name] = handle_of(network, _kind(network), processing_class if name == "student" else None)
        blocks = {name: _network_block(name, network, networks) for name, network in taught.items()}
        train, pushed = _training(args, _name_of(student, networks))
        values = {
            "student": _network_block("student", student, networks) | {"pretrained": isinstance(student, str)},
            **({"teachers": blocks} if several else blocks),
            "methods": _method_blocks(methods),
            "data": _data_block(data, train_dataset, eval_dataset),
            "train": train,
            "eval": _plain(eval),
            "hub": {**_plain(hub), **pushed},
        }
        recipe = make_recipe(values, _HERE)
        networks = {name: _shown_at(handle, recipe.data.image_size) for name, handle in networks.items()}
    task = open_task(recipe)
    images = task.open_images("train", train_dataset)
    return Setup(task, images, task.open_images("eval", eval_dataset, images.class_names), networks)


def _name_of(network: Network, networks: Mapping[str, ModelHandle]) -> str:
    return network.rpartition("/")[2] if isinstance(network, str) else networks["student"].info.name


def _shown_at(handle: ModelHandle, image_size: int | None) -> ModelHandle:
    """The network at the size that the user names: it may have been trained at another than its library says."""
    if image_size is None:
        return handle
    view = replace(handle.info.preprocessing, image_size=image_size)
    return replace(handle, info=replace(handle.info, preprocessing=view, native=view))


def _kind(network: nn.Module | ModelHandle) -> str:
    """What a live network is called: its architecture where the library knows it, else its class."""
    if isinstance(network, ModelHandle):
        return network.info.name
    facts: Any = getattr(network, "pretrained_cfg", None) or {}
    config = getattr(network, "config", None)
    return facts.get("architecture") or getattr(config, "model_type", "") or type(network).__name__


def _network_block(name: str, network: Network, networks: Mapping[str, ModelHandle]) -> dict[str, Any]:
    return {"model": network if isinstance(network, str) else f"{GIVEN_NETWORK}{networks[name].info.name}"}


def _method_blocks(methods: Methods | None) -> dict[str, Any]:
    """`{"kd": {…}}` as it is; `{"kd": 0.5}` is a weight; `["kd"]` has the paper's values."""
    if methods is None:
        return {}
    named = methods if isinstance(methods, Mapping) else dict.fromkeys(methods, None)
    return {name: {"weight": block} if isinstance(block, (int, float)) and not isinstance(block, bool) else block
            for name, block in named.items()}  # fmt: skip


def _training(args: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `train` block, and what of it belongs to `hub` (TrainingArguments has both in one)."""
    if isinstance(args, (str, Path)):
        args = {"output_dir": str(args)}
    if args is not None and not isinstance(args, (Mapping, TrainConfig)):
        raise UserError(
            f"args: {type(args).__name__} cannot say everything that a distillation needs; give a dict or a "
            "kd_hf.TrainConfig, whose names are those of TrainingArguments"
        )
    values = {"output_dir": f"runs/{name}", **_plain(args)}
    pushed = {key: values.pop(key) for key in [*HubConfig.model_fields] if key in values}
    return values, pushed


def _data_block(data: Mapping[str, Any] | None, train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    values = _plain(data)
    if "path" not in values:
        missing = [n for n, v in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)) if v is None]
        if missing:
            raise UserError(f"{missing[0]}: give a datasets.Dataset, or data={{'path': …}} as in a recipe")
    return {"path": GIVEN_DATA, **values}


def _plain(block: Block | Mapping[str, Any] | None) -> dict[str, Any]:
    """What was said in a block; defaults stay open."""
    if isinstance(block, Block):
        return block.model_dump(mode="json", exclude_unset=True)
    return dict(block or {})
