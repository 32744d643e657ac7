"""What a run was made from, in names that mean something elsewhere: networks, data, losses, and what was exported."""

from __future__ import annotations

import re
from pathlib import Path

from kd_hf.recipe.config import MethodBlock, ModelConfig, Recipe
from kd_hf.recipe.schedule import Duration, Ramp, Weight
from kd_hf.run.record import RunRecord
from kd_hf.tasks.score import best_by

_IN_PYTHON = "given:"  # how the record of a run begins what it was handed as a live object
_COMMIT = re.compile(r"[0-9a-f]{40}")


def network_block(recipe: Recipe, network: str) -> ModelConfig:
    """The recipe's block of a network: ``student`` or a teacher's name."""
    return recipe.student if network == "student" else recipe.all_teachers()[network]


def network_name(record: RunRecord, network: str) -> str:
    """A network as a person knows it: the name in the recipe; for a folder, the architecture in it."""
    name, note = network_block(record.recipe, network).model or "", record.networks.get(network)
    if note and note.architecture and ("/" not in name or Path(name).expanduser().exists()):
        return note.architecture
    return shown_path(name)


def commit_of(record: RunRecord, network: str) -> str | None:
    """The commit of the Hub repository that a network was read from."""
    note = record.networks.get(network)
    revision = note.revision if note else None
    return revision if revision and _COMMIT.fullmatch(revision) else None


def hub_id(record: RunRecord, network: str) -> str | None:
    """The Hub repository that holds the weights a network began with; None where they came from elsewhere."""
    if network != "student" and (trained := record.trained_teacher(network)) is not None:
        hub = trained.recipe.hub
        return hub.hub_model_id if hub.push_to_hub and "/" in (hub.hub_model_id or "") else None
    block = network_block(record.recipe, network)
    if not getattr(block, "pretrained", False) or commit_of(record, network) is None:
        return None
    name = (record.networks[network].source or block.model or "").removeprefix("hf-hub:").partition("@")[0]
    owner, _, short = name.rpartition("/")
    return _timm_repository(short) if owner in ("", "timm") else _valid_id(name)


def _timm_repository(name: str) -> str | None:
    """Where timm keeps the weights that a name, with or without tag, stands for."""
    import timm

    known = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    return known.hf_hub_id if known is not None else None


def _valid_id(name: str) -> str | None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def only_body(record: RunRecord, network: str) -> bool:
    """Whether a detector began with the weights of a classifier in its body, and random ones elsewhere."""
    body, note = getattr(network_block(record.recipe, network), "body", None), record.networks.get(network)
    return bool(body and note and note.source == body)


def origin(record: RunRecord, network: str) -> str:
    """In a few words, where a network's weights came from when they are not from the Hub."""
    block = network_block(record.recipe, network)
    if (block.model or "").startswith(_IN_PYTHON):
        return "handed over in Python"
    return "a local folder" if getattr(block, "pretrained", False) else "random weights"


def dataset_id(record: RunRecord) -> str | None:
    """The Hub id of the training data; None for folders and what is not a file at all."""
    path = record.recipe.data.path
    described = str(record.start.get("data", {}).get("train", ""))
    on_hub = described.startswith(f"{path}, ") and ":" not in path and not Path(path).expanduser().exists()
    return _valid_id(path) if on_hub else None


def dataset_kind(record: RunRecord) -> str:
    """The Hub's type of the data: its id there, or what kind of local data it is."""
    path = record.recipe.data.path
    return dataset_id(record) or path.partition(":")[2] or "imagefolder"


def shown_path(path: str) -> str:
    """A path as others may read it: of a folder somewhere on a machine, only its name."""
    return Path(path).name if Path(path).is_absolute() else path


def losses_of(recipe: Recipe) -> dict[str, tuple[MethodBlock, Weight]]:
    """The blocks whose loss was trained with, and their weights (the paper's where the recipe says none)."""
    from kd_hf.distillation.module import TASK
    from kd_hf.methods import get_method

    blocks = {TASK: MethodBlock(), **recipe.methods}
    weighed = {
        name: (block, get_method(recipe.method_of(name), recipe.task).weight if block.weight is None else block.weight)
        for name, block in blocks.items()
    }
    return {name: found for name, found in weighed.items() if found[1] != 0}


def distilling(recipe: Recipe) -> list[str]:
    """Names of the methods that were trained with, beside the loss on labels."""
    from kd_hf.distillation.module import TASK

    names = [block.method or name for name, (block, _) in losses_of(recipe).items()]
    return [name for name in dict.fromkeys(names) if name != TASK]


def weight_text(weight: Weight) -> str:
    """A weight in words, with its course over the run."""
    if not isinstance(weight, Ramp):
        return f"{weight:g}"
    if weight.one_minus is not None:
        return f"1 − {weight.one_minus}"
    start, end, duration = weight.course
    return f"{start:g} → {end:g} over {span(duration)}, {'linear' if weight.warmup else 'cosine'}"


def span(duration: Duration) -> str:
    """A duration in words."""
    return f"{duration.amount:.4g} of the run" if duration.unit == "ratio" else str(duration)


def exported_step(record: RunRecord) -> int | None:
    """The step whose weights lie in the artefact, when that is the best evaluation's; None for the last one."""
    train = record.recipe.train
    metric, greater = best_by(train, record.score)
    measured = record.series(metric)
    if not (train.load_best_model_at_end and measured):
        return None
    return (max if greater else min)(measured, key=lambda point: point[1])[0]  # the first of equals


def exported_metrics(record: RunRecord) -> dict[str, float]:
    """What was measured of the weights in the artefact, without the ``eval_``."""
    best = exported_step(record)
    if best is None:
        return record.metrics()
    kept = tuple(line for line in record.log if line.get("step") == best)
    return RunRecord(record.path, record.recipe, kept).metrics()
