"""The state of a checkpoint beside its tensors: typed, versioned, and able to read the version before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kd_hf.errors import UserError
from kd_hf.run.identity import Identity

FORMAT = 2


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stands after a step."""

    step: int
    identity: Identity
    processes: int = 1
    cpu_threads: int = 1
    best_metric: float | None = None
    best_step: int | None = None
    """The step of the best evaluation so far."""
    corrupt: tuple[int, ...] = ()
    """Rows of the training images that could not be read."""
    seconds: float = 0.0
    """Time spent training."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What callbacks keep, by class name."""
    ended: bool = False
    """Whether a callback ended the run here, before its last step."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": FORMAT, **asdict(self)}


_ADAPTER = TypeAdapter(CheckpointState)


def state_of(values: Mapping[str, Any], checkpoint: Path) -> CheckpointState:
    """The state that a checkpoint holds.

    Args:
        values: as they were read.
        checkpoint: the folder they were read from.

    Raises:
        UserError: it is of a version that this one cannot read, or something in it is not what it must be.
    """
    number = values.get("format")
    if number not in (1, FORMAT):
        raise UserError(
            f"{checkpoint} was written by another version of kd_hf (format {number}; this one reads 1 to {FORMAT}): "
            "continue with that version, or start over with train.resume_from_checkpoint=false"
        )
    try:
        return _ADAPTER.validate_python(values if number == FORMAT else _from_1(values, checkpoint))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{checkpoint} is damaged: its state is not readable ({reason})") from None


def _from_1(values: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Format 1 knew the recipe by its hash and the resolved file of its run, and nothing of the data."""
    kept = {key: values[key] for key in CheckpointState.__dataclass_fields__ if key in values}
    folder = checkpoint.absolute().parents[1]
    return {**kept, "identity": Identity.of_older(folder, values["recipe_hash"], values["global_batch"])}
