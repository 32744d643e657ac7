"""The gate: what a teacher must show before the first step is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from kd_hf.config import GateConfig, Recipe
from kd_hf.errors import UserError
from kd_hf.models.handle import ModelHandle
from kd_hf.models.info import Preprocessing
from kd_hf.task import task_of
from kd_hf.teacher import Teacher


@dataclass(frozen=True)
class GateResult:
    """What the gate measured, in percent: in the teacher's own preprocessing, and as training feeds it."""

    teacher: str
    samples: int
    own: float
    fed: float
    own_size: int
    fed_size: int
    metric: str = "top-1"
    guessing: float = 0.0
    """What a teacher that knows nothing may reach."""

    def describe(self) -> str:
        """One line for the log."""
        text = f"teacher '{self.teacher}': {self.metric} {self.own:.1f} on {self.samples} held-out images"
        if self.fed_size == self.own_size and self.fed == self.own:
            return text
        text += f" in its own preprocessing ({self.own_size} px)"
        return f"{text}, {self.fed:.1f} as training feeds it ({self.fed_size} px)"

    def warning(self) -> str | None:
        """What to tell the user when the pipeline costs the teacher accuracy; None when it does not."""
        if self.own - self.fed <= 2.0:
            return None
        return (
            f"teacher '{self.teacher}' loses {self.own - self.fed:.1f} points in the training pipeline: check its "
            "image_size and preprocessing (mean, std, interpolation) in the recipe"
        )

    def check(self, gate: GateConfig, key: str = "min_top1") -> None:
        """Raise :class:`UserError` when the teacher is below the gate's `key`, or no better than guessing."""
        least: float | None = getattr(gate, key)
        reached = f"teacher '{self.teacher}' reaches {self.metric} {self.own:.1f} on {self.samples} held-out images"
        check = "check its weights, preprocessing and label order"
        if least is not None and self.own < least:
            raise UserError(f"{reached}, below gate.{key} = {least:g}; {check}")
        if least is None and self.own <= self.guessing:
            raise UserError(f"{reached}, no better than guessing; {check}, or set gate.enabled: false")


def guessing_top1(classes: int, samples: int) -> float:
    """Top-1 in percent that guessing among so many classes stays below: three standard errors above its mean."""
    chance = 100.0 / classes
    return chance + 3.0 * (chance * (100.0 - chance) / max(1, samples)) ** 0.5


def check_label_order(name: str, handle: ModelHandle, class_names: Sequence[str]) -> None:
    """Refuse a teacher that knows the data's class names in another order."""
    known = [label.lower() for label in handle.label_names]
    wanted = [label.lower() for label in class_names]
    if known and wanted and known != wanted and sorted(known) == sorted(wanted):
        first = next(i for i, pair in enumerate(zip(known, wanted, strict=True)) if pair[0] != pair[1])
        raise UserError(
            f"teacher '{name}' has the data's classes in another order: class {first} is "
            f"'{handle.label_names[first]}' for the teacher and '{class_names[first]}' in the data"
        )


def pass_gate(
    teachers: Mapping[str, Teacher],
    views: Mapping[str, Preprocessing],
    class_names: Sequence[str],
    source: Any,
    accelerator: Accelerator,
    recipe: Recipe,
    tell: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Measure the teachers whose gate is enabled, and refuse one that is below it; a call of all ranks.

    Args:
        teachers: by name.
        views: what training feeds each of them.
        class_names: of the data.
        source: held-out images.
        accelerator: gives device and ranks.
        recipe: the run.
        tell: called with a line for a person and the numbers for the log.

    Raises:
        UserError: a teacher is below its gate, or knows the classes in another order.
    """
    gated = {name: teacher for name, teacher in teachers.items() if teacher.cfg.gate.enabled}
    for name, teacher in gated.items():
        check_label_order(name, teacher.handle, class_names)
    task, metric = task_of(recipe), task_of(recipe).metric
    for result in task.measure_teachers(gated, views, source, accelerator, recipe):
        warning = result.warning()
        numbers = {"step": 0, "gate": result.teacher, metric: result.own, f"{metric}_as_fed": result.fed}
        tell(result.describe() + (f"\nwarning: {warning}" if warning else ""), numbers)
        result.check(gated[result.teacher].cfg.gate, f"min_{metric}")
