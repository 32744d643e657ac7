"""The facts about a detector, the names of its taps, and what it gives for a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from kd_hf.detection.data.stage import BoxTarget
from kd_hf.errors import UserError, nearest
from kd_hf.info import ModelInfo
from kd_hf.outputs import Outputs

MAP, VALID, BODY, QUERIES, NECK, MODULE = "map", "valid", "body", "queries", "neck", "module"


@dataclass(frozen=True)
class DetectorInfo(ModelInfo):
    """The facts about a detector that decide which methods can serve it."""

    model_type: str = ""
    levels: int = 0
    """Maps."""
    states: int = 0
    """Stages that the queries pass."""
    queries: int = 0
    body: bool = False
    """Whether it has [DET] tokens in its body."""
    softmax: bool = False
    """Whether the last output of its class head is "no object"."""
    masks: bool = False
    """Whether its loss needs the objects' masks."""


@dataclass(kw_only=True)
class BoxOutputs(Outputs):
    """What a detector gives for a batch. `logits` ``[B, Q, K]`` are the raw outputs of the last stage's class head."""

    boxes: Tensor
    """``[B, Q, 4]``: centre, width and height, relative to the image without padding; full precision."""
    softmax: bool = False
    """Whether the last of the K classes is "no object" and they share a softmax; else each has a sigmoid."""
    auxiliary: tuple[tuple[Tensor, Tensor], ...] = ()
    """Logits and boxes of the stages before the last, where the configuration lets them predict."""
    criterion: Callable[[BoxTarget], dict[str, Tensor]] | None = field(default=None, repr=False)
    """The architecture's own loss of this pass: see :class:`kd_hf.detection.networks.criterion.Judge`."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """See :class:`Outputs`; what the architecture's own loss holds stays as it is."""
        auxiliary = tuple((function(logits), function(boxes)) for logits, boxes in self.auxiliary)
        return replace(super().map(function), boxes=function(self.boxes), auxiliary=auxiliary)


def available_taps(info: DetectorInfo) -> tuple[str, ...]:
    """All named taps of a detector, without ``module:`` ones and negative indices."""
    maps = (f"{kind}:{level}" for kind in (MAP, VALID) for level in range(info.levels))
    states = (f"{QUERIES}:{stage}" for stage in range(info.states))
    return (*maps, *((BODY,) if info.body else ()), *states, NECK)


def check_tap(info: DetectorInfo, tap: str) -> None:
    """Raise :class:`UserError`, naming what exists instead, when the detector has no such tap. Runs nothing."""
    kind, index = parse_tap(info, tap)
    if (kind != MODULE and _named(kind, index) not in available_taps(info)) or (kind == MODULE and index is None):
        raise UserError(_no_such_tap(info, tap))


def parse_tap(info: DetectorInfo, tap: str) -> tuple[str, int | str | None]:
    """Kind and index of a tap, negative indices counted from the end; for a module its path. None: there is none."""
    kind, _, argument = tap.partition(":")
    if kind == MODULE:
        return kind, argument if argument in info.modules else None
    counts = {MAP: info.levels, VALID: info.levels, QUERIES: info.states}
    if kind not in counts:
        return tap, None
    if not argument.removeprefix("-").isdecimal():
        return tap, None
    index = int(argument)
    return kind, index + counts[kind] if index < 0 else index


def _named(kind: str, index: int | str | None) -> str:
    return kind if index is None else f"{kind}:{index}"


def _no_such_tap(info: DetectorInfo, tap: str) -> str:
    path = tap.removeprefix(f"{MODULE}:")
    if path != tap:
        return f"tap '{tap}': {info.name} has no module '{path}'.{nearest(path, info.modules)}"
    counts = {MAP: info.levels, VALID: info.levels, QUERIES: info.states}
    ranges = [f"{kind}:0 … {kind}:{count - 1}" for kind, count in counts.items()]
    single = [BODY] if info.body else []
    return f"tap '{tap}' does not exist in {info.name}. It has: {', '.join([*ranges, *single, NECK])}, module:PATH."
