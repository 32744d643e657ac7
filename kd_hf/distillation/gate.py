"""The gate: what a teacher must show before the first step is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from kd_hf.distillation.teacher import Teacher
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.models.handle import ModelHandle
from kd_hf.tasks.base import Task


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
    task: Task,
    tell: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Measure the teachers whose gate is enabled, and refuse one that is below it; a call of all ranks.

    Args:
        teachers: by name.
        views: what training feeds each of them.
        class_names: of the data.
        source: held-out images.
        accelerator: gives device and ranks.
        task: of the run.
        tell: called with a line for a person and the numbers for the log.

    Raises:
        UserError: a teacher is below its gate, or knows the classes in another order.
    """
    gated = {name: teacher for name, teacher in teachers.items() if teacher.cfg.gate.enabled}
    for name, teacher in gated.items():
        check_label_order(name, teacher.handle, class_names)
    metric = task.score.key
    for result in task.measure_teachers(gated, views, source, accelerator):
        warning = result.warning()
        numbers = {"step": 0, "gate": result.teacher, metric: result.own, f"{metric}_as_fed": result.fed}
        tell(result.describe() + (f"\nwarning: {warning}" if warning else ""), numbers)
        result.check(gated[result.teacher].cfg.gate)
