"""Which methods a recipe chooses, what they read, and when they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd_hf.data.mix import is_mixing
from kd_hf.errors import UserError, nearest
from kd_hf.info import ModelInfo
from kd_hf.methods import get_method
from kd_hf.methods.base import Method, MethodConfig, Needs
from kd_hf.recipe.config import TASK, DataConfig, MethodBlock
from kd_hf.recipe.schedule import Duration, Ramp, Weight, weight_at
from kd_hf.tasks.base import Task

if TYPE_CHECKING:
    from kd_hf.store.reader import StoredTeacher


@dataclass(frozen=True)
class Choice:
    """One block of the recipe's `methods`, resolved and checked against the networks."""

    name: str
    method: type[Method]
    config: MethodConfig
    needs: Needs
    weight: Weight
    until: Duration | None
    teacher: str | None  # which teacher it reads

    @property
    def complement(self) -> str | None:
        """The loss whose weight this one completes to 1."""
        return self.weight.one_minus if isinstance(self.weight, Ramp) else None

    @property
    def may_pause(self) -> bool:
        """Whether its loss is off during a part of the run."""
        return self.until is not None or (isinstance(self.weight, Ramp) and self.weight.touches_zero)


def choose_methods(task: Task, student: ModelInfo, teachers: Mapping[str, ModelInfo]) -> tuple[Choice, ...]:
    """Resolve the recipe's methods for these networks; `task` is added unless the recipe speaks of it.

    Raises:
        UserError: when a network lacks a tap, a teacher is missing, or the data's labels do not serve a method.
    """
    recipe = task.recipe
    blocks = {TASK: MethodBlock(), **recipe.methods}
    choices = [_choose(task, name, block, student, teachers) for name, block in blocks.items()]
    active = tuple(choice for choice in choices if choice.weight != 0)
    if not active:
        raise UserError("methods: every weight is 0, so there is nothing to train")
    for choice in active:
        _check_complement(choice, [other.name for other in active if other.complement is None])
        _check_labels(choice, recipe.data)
    return active


def _choose(task: Task, name: str, block: MethodBlock, student: ModelInfo, teachers: Mapping[str, ModelInfo]) -> Choice:
    method = get_method(task.recipe.method_of(name), task.recipe.task)
    config = method.Config.model_validate(block.options)
    teacher = block.teacher or (next(iter(teachers)) if len(teachers) == 1 else None)
    taught = teachers.get(teacher) if teacher else None
    try:
        needs = method.needs(config, student, taught)
    except UserError:
        if taught is not None or len(teachers) < 2:
            raise
        several = ", ".join(teachers)
        raise UserError(f"methods.{name}: there are several teachers ({several}); say which: `teacher: …`") from None
    for tap in needs.student.values():
        task.check_tap(student, tap)
    if taught is not None:
        for tap in needs.teacher.values():
            task.check_tap(taught, tap)
    reads_teacher = bool(needs.teacher or needs.teacher_logits or needs.parts)
    weight = method.weight if block.weight is None else block.weight
    return Choice(name, method, config, needs, weight, block.until, teacher if reads_teacher else None)


def _check_complement(choice: Choice, others: Sequence[str]) -> None:
    if choice.complement is not None and choice.complement not in others:
        raise UserError(
            f"methods.{choice.name}.weight.one_minus: '{choice.complement}' is no loss of this recipe with a weight of "
            f"its own.{nearest(choice.complement, others)}"
        )


def _check_labels(choice: Choice, data: DataConfig) -> None:
    if choice.needs.samples and data.augment.repeats > 1:
        raise UserError(
            f"methods.{choice.name} keeps something of every training image, of which a batch may show one view only; "
            f"data.augment.repeats is {data.augment.repeats}: set it to 1, or use another method"
        )
    if choice.needs.strong and data.boxes is not None:
        raise UserError(f"methods.{choice.name} compares two views of each image; images with boxes have one")
    if choice.needs.labels == "hard" and is_mixing(data.augment):
        raise UserError(
            f"methods.{choice.name} is defined for index labels only, and data.augment mixes images (mixup, cutmix); "
            "turn mixing off, or use a method for mixed labels (kd, nkd, deit_soft)"
        )


def weights_at(choices: Sequence[Choice], step: int, total_steps: int, steps_per_epoch: int) -> dict[str, float]:
    """Factor of every chosen loss at an optimiser step counted from 0, by block name."""
    found: dict[str, float] = {}
    for choice in sorted(choices, key=lambda choice: choice.complement is not None):  # complements need the others
        found[choice.name] = weight_at(choice.weight, choice.until, step, total_steps, steps_per_epoch, found)
    return {choice.name: found[choice.name] for choice in choices}


def taps_of(choices: Sequence[Choice], teacher: str | None = None) -> tuple[str, ...]:
    """Tap names the choices read from the student, or from the named teacher; each once, in order."""
    named = (
        tap
        for choice in choices
        if teacher is None or choice.teacher == teacher
        for tap in (choice.needs.student if teacher is None else choice.needs.teacher).values()
    )
    return tuple(dict.fromkeys(named))


def check_methods(
    choices: Sequence[Choice], stored: Mapping[str, StoredTeacher | None], place: str = "teacher.store"
) -> None:
    """Raise :class:`UserError` for a method that needs the teacher itself, or a tap that is not stored.

    Args:
        choices: the recipe's methods.
        stored: by teacher; None while the store is being written.
        place: the recipe's key or command to name.
    """
    for choice in choices:
        if choice.teacher is None or choice.teacher not in stored:
            continue
        if choice.needs.strong:
            raise UserError(
                f"{place}: methods.{choice.name} shows the teacher a second view of every image, which a store does "
                "not hold; train with the teacher, or without this method"
            )
        if choice.needs.parts or not choice.needs.cacheable:
            parts = f" ({', '.join(choice.needs.parts)})" if choice.needs.parts else ""
            raise UserError(
                f"{place}: methods.{choice.name} runs parts of the teacher by itself{parts}, which stored outputs "
                "cannot replace; train with the teacher, or without this method"
            )
        teacher = stored[choice.teacher]
        missing = [tap for tap in choice.needs.teacher.values() if teacher and tap not in teacher.facts.taps]
        if teacher and missing:
            known = ", ".join(teacher.facts.taps) or "none"
            raise UserError(
                f"{place}: methods.{choice.name} reads the teacher's tap '{missing[0]}', which '{teacher.store.place}' "
                f"does not hold (taps: {known}); write a store for this recipe, with --taps"
            )
