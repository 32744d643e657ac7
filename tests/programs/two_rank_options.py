"""Training with the options that make it faster or smaller, as one process does it, or as two do:

``accelerate launch --config_file accelerate_configs/2cpu.yaml -m tests.programs.two_rank_options FOLDER``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kd_hf.run.log import read_log
from kd_hf.train.feed import Feed
from kd_hf.train.trainer import DistillTrainer
from tests.data.conftest import encode, make_image
from tests.runs import TEACHER, merged, recipe

Block = dict[str, Any]
CLASSES = 4
# everything that draws random numbers, and everything that has state
TRAINING: Block = {
    "data": {"augment": {"crop": {"kind": "random_resized"}, "erasing": 0.3, "mixup": 0.8, "cutmix": 1.0}},
    # small enough that four steps do not magnify what an option rounds
    "train": {"optim": "momentum", "learning_rate": 0.01, "ema": {"decay": 0.9}, "max_grad_norm": 5.0},
    "eval": {"max_samples": 8},
}


def teacher(model: str, **kwargs: Any) -> Block:
    """The block of a teacher with random weights."""
    return {**TEACHER, "model": model, "kwargs": kwargs, "num_classes": CLASSES}


PAIRS: Mapping[str, Block] = {
    # BatchNorm on both sides and in a method, which runs the teacher's classifier
    "maps": {
        "student": {"model": "test_resnet"},
        "teacher": teacher("test_resnet"),
        "methods": {"kd": {}, "mgd": {"weight": 0.001}, "srrl": {}},
    },
    "tokens": {
        "student": {"model": "test_vit", "kwargs": {"patch_size": 4, "depth": 4}},
        "teacher": teacher("test_vit", patch_size=4, depth=5, embed_dim=96),
        "methods": {"nkd": {}, "vitkd": {}, "manifold": {}},
    },
    # without what couples the images of a process
    "separate": {
        "student": {"model": "test_convnext"},
        "teacher": teacher("test_convnext2"),
        "methods": {"kd": {}, "mgd": {"weight": 0.001}},
    },
    # quick to compile
    "small": {
        "student": {"model": "test_vit", "kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 1}},
        "teacher": teacher("test_vit", patch_size=8, depth=1, embed_dim=24, num_heads=1),
        "methods": {"nkd": {}, "mgd": {"weight": 0.01}},
    },
}


class Ahead(DistillTrainer):
    """Prepares every lesson one ahead, as on a GPU."""

    def feed(self) -> Feed:
        """The same lessons."""
        feed = super().feed()
        feed.ahead = 1
        return feed


@dataclass(frozen=True)
class Option:
    """What is laid over a recipe, and which trainer runs it."""

    blocks: Block = field(default_factory=dict)
    trainer: type[DistillTrainer] = DistillTrainer


OPTIONS: Mapping[str, Option] = {
    "none": Option(),
    "channels_last": Option({"train": {"channels_last": True}}),
    "checkpointing": Option({"train": {"activation_checkpointing": True}}),
    "bf16_teacher": Option({"teacher": {"dtype": "bfloat16"}}),
    "pil": Option({"data": {"decoder": "pil"}}),
    "ahead": Option(trainer=Ahead),
    "compile": Option({"train": {"torch_compile": True}}),
    "store": Option({"teacher": {"store": "store"}}),
}
TOGETHER = ("channels_last", "checkpointing", "bf16_teacher", "pil")
OPTIONS |= {"together": Option(merged(*(OPTIONS[name].blocks for name in TOGETHER)), Ahead)}


def write_photos(folder: Path) -> None:
    """Class folders of small JPEGs, which the decoders read differently."""
    for split, count in (("train", 10), ("val", 2)):
        for label in range(CLASSES):
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for number in range(count):
                photo = encode(make_image(100 * label + number), "JPEG", quality=90)
                (place / f"{number}.jpg").write_bytes(photo)


@dataclass(frozen=True)
class Trained:
    """What is left of a run."""

    trainer: DistillTrainer
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    graphs: int
    """How many were compiled."""

    @property
    def losses(self) -> list[dict[str, float]]:
        """Of each step."""
        return losses_of(self.trainer.run.path)


def losses_of(folder: Path) -> list[dict[str, float]]:
    """The total and the parts, such as `kd/soft`, of each step of a run."""
    lines = [line for line in read_log(folder) if "loss" in line]
    return [{k: v for k, v in line.items() if k == "loss" or ("/" in k and "weight/" not in k)} for line in lines]


def train(root: Path, folder: Path, pair: str, option: str, *blocks: Block) -> Trained:
    """Train in `folder` on the photographs in ``root/data``, with the store ``root/store_<pair>``."""
    chosen = OPTIONS[option]
    run = merged(TRAINING, PAIRS[pair], {"data": {"path": str(root / "data")}}, chosen.blocks, *blocks)
    if run["teacher"].get("store"):
        run["teacher"]["store"] = str(root / f"store_{pair}")
    trainer = chosen.trainer(recipe(folder, run))
    before = _copy(trainer)
    with graphs_run_by_torch() as graphs:
        trainer.train()
    return Trained(trainer, before, _copy(trainer), len(graphs))


def _copy(trainer: DistillTrainer) -> dict[str, Tensor]:
    assert trainer.trained.ema is not None
    parts = {"module": trainer.trained.plain, "ema": trainer.trained.ema.module}
    state = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return {key: value.detach().clone() for key, value in state.items()}


@contextmanager
def graphs_run_by_torch() -> Iterator[list[Any]]:
    """Compile as ever, but run the graphs operator by operator: generating code for them takes minutes.

    Gives the graphs.
    """
    from torch._dynamo.backends.registry import lookup_backend

    graphs: list[Any] = []

    def run_by_torch(graph: Any, inputs: Any, **settings: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    with mock.patch("torch._inductor.compile_fx.compile_fx", run_by_torch):
        yield graphs
    torch.compiler.reset()


# what two processes and continued runs go through, each time with all that does not hide another
RUNS = (("separate", "together"), ("separate", "store"), ("small", "compile"))


def main(root: Path) -> None:
    """Train each as one of two processes, which share a batch."""
    torch.set_num_threads(1)
    for pair, option in RUNS:
        done = train(root, root / "two" / option, pair, option, {"train": {"per_device_train_batch_size": 4}})
        assert done.trainer.accelerator.num_processes == 2
        assert bool(done.graphs) == (option == "compile")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
