"""The one module that is trained: the student and everything the methods learn; one forward → named losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from kd_hf.balance import Duration, Ramp, Weight, weight_at
from kd_hf.config import TASK, DataConfig, MethodBlock, Recipe
from kd_hf.data.draws import Draws
from kd_hf.data.mix import is_mixing
from kd_hf.errors import UserError, nearest
from kd_hf.methods import get_method
from kd_hf.methods.base import OF_STUDENT, Method, MethodConfig, Moment, Needs, Outputs, Target
from kd_hf.models.info import ModelInfo, Samples, Shapes
from kd_hf.models.taps import Tapped
from kd_hf.task import task_of


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


def choose_methods(recipe: Recipe, student: ModelInfo, teachers: Mapping[str, ModelInfo]) -> tuple[Choice, ...]:
    """Resolve the recipe's methods for these networks; `task` is added unless the recipe speaks of it.

    Raises:
        UserError: when a network lacks a tap, a teacher is missing, or the data's labels do not serve a method.
    """
    blocks = {TASK: MethodBlock(), **recipe.methods}
    choices = [_choose(recipe, name, block, student, teachers) for name, block in blocks.items()]
    active = tuple(choice for choice in choices if choice.weight != 0)
    if not active:
        raise UserError("methods: every weight is 0, so there is nothing to train")
    for choice in active:
        _check_complement(choice, [other.name for other in active if other.complement is None])
        _check_labels(choice, recipe.data)
    return active


def _choose(
    recipe: Recipe, name: str, block: MethodBlock, student: ModelInfo, teachers: Mapping[str, ModelInfo]
) -> Choice:
    task, method = task_of(recipe), get_method(recipe.method_of(name))
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
    if choice.needs.labels == "hard" and is_mixing(data.augment):
        raise UserError(
            f"methods.{choice.name} is defined for index labels only, and data.augment mixes images (mixup, cutmix); "
            "turn mixing off, or use a method for mixed labels (kd, nkd, deit_soft)"
        )


def check_batch(choices: Sequence[Choice], per_device: int, processes: int) -> None:
    """Refuse a batch of so few images that a loss which compares them with each other has nothing to learn from.

    Args:
        choices: what the recipe chose.
        per_device: images of a process in a micro step.
        processes: that train together.

    Raises:
        UserError: naming the loss and what would help.
    """
    for choice in choices:
        least, images = choice.method.least_images, per_device * (processes if choice.needs.gathered else 1)
        if images >= least:
            continue
        gatherable = "gather" in type(choice.config).model_fields and per_device * processes >= least
        raise UserError(
            f"methods.{choice.name} compares the images of a batch with each other and learns nothing from fewer than "
            f"{least}, but train.per_device_train_batch_size is {per_device}; raise it"
            + (f", or set methods.{choice.name}.gather: true" if gatherable else "")
        )


def weights_at(choices: Sequence[Choice], step: int, total_steps: int, steps_per_epoch: int) -> dict[str, float]:
    """Factor of every chosen loss at an optimiser step counted from 0, by block name."""
    found: dict[str, float] = {}
    for choice in sorted(choices, key=lambda choice: choice.complement is not None):  # complements need the others
        found[choice.name] = weight_at(choice.weight, choice.until, step, total_steps, steps_per_epoch, found)
    return {choice.name: found[choice.name] for choice in choices}


class DistillModule(nn.Module):
    """Student and methods as one module, so that wrapping, optimising and saving see all that is learned.

    Args:
        student: the student with the taps that `choices` need.
        methods: built methods by block name, in the order of `choices`.
        choices: what the recipe chose.
    """

    def __init__(self, student: Tapped, methods: Mapping[str, Method], choices: Sequence[Choice]) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict(methods)
        self.choices = {choice.name: choice for choice in choices}

    @property
    def may_pause(self) -> bool:
        """Whether some steps leave parameters without gradient: every loss on the student's own outputs can be off."""
        return TASK not in self.choices or any(choice.may_pause for choice in self.choices.values())

    def draw(
        self, draws: Draws, moment: Moment, active: Collection[str] | None = None
    ) -> dict[str, Mapping[str, Tensor]]:
        """Random tensors and scheduled numbers of every active method for a batch, by block name; of all by default."""
        chosen = self.choices if active is None else active
        return {name: drawn(method, draws, moment) for name, method in self.named_methods() if name in chosen}

    def forward(
        self,
        pixels: Tensor,
        teachers: Mapping[str, Outputs],
        target: Target,
        draws: Mapping[str, Mapping[str, Tensor]],
        active: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """Run the student once and every active method on what it gave.

        Args:
            pixels: normalised student images ``[B, 3, H, W]``.
            teachers: outputs by teacher name, taps keyed by tap name.
            target: labels.
            draws: from :meth:`draw`.
            active: block names to compute; all by default.

        Returns:
            Unweighted scalar losses named ``block/part``.
        """
        seen = self.student(pixels, target)
        losses: dict[str, Tensor] = {}
        for name, method in self.named_methods():
            if active is not None and name not in active:
                continue
            choice = self.choices[name]
            teacher = by_role(teachers[choice.teacher], choice.needs.teacher) if choice.teacher else None
            parts = method(by_role(seen, choice.needs.student), teacher, target, draws[name])
            losses.update({f"{name}/{part}": value for part, value in parts.items()})
        return losses

    def named_methods(self) -> list[tuple[str, Method]]:
        """Methods by block name, typed."""
        return list(cast("dict[str, Method]", self.methods).items())


def drawn(method: Method, draws: Draws, moment: Moment) -> dict[str, Tensor]:
    """What a method's `forward` is given beside outputs and labels."""
    device = draws.keys.device
    # filled on the device: a tensor made of a number would be copied there, and waited for
    scheduled = {name: torch.full((), value, device=device) for name, value in method.scheduled(moment).items()}
    return {**method.draw(draws), **scheduled}


def by_role(outputs: Outputs, roles: Mapping[str, str]) -> Outputs:
    """The same outputs with the taps a method asked for, under the method's own names."""
    return replace(outputs, taps={role: outputs.taps[tap] for role, tap in roles.items()})


def taps_of(choices: Sequence[Choice], teacher: str | None = None) -> tuple[str, ...]:
    """Tap names the choices read from the student, or from the named teacher; each once, in order."""
    named = (
        tap
        for choice in choices
        if teacher is None or choice.teacher == teacher
        for tap in (choice.needs.student if teacher is None else choice.needs.teacher).values()
    )
    return tuple(dict.fromkeys(named))


def build_methods(
    choices: Sequence[Choice],
    student: Shapes,
    teachers: Mapping[str, Shapes],
    parts: Mapping[str, Mapping[str, nn.Module]],
    student_parts: Mapping[str, nn.Module] = MappingProxyType({}),
    samples: Samples | None = None,
) -> dict[str, Method]:
    """Build the chosen methods from the shapes of their taps.

    Args:
        choices: what the recipe chose.
        student: shapes keyed by tap name.
        teachers: shapes keyed by tap name, by teacher.
        parts: live teacher modules by part name, by teacher.
        student_parts: live modules of the student by part name.
        samples: the training images, where they are known.
    """
    built = {}
    for choice in choices:
        seen = _shapes_by_role(student, choice.needs.student)
        seen = replace(seen, samples=samples) if choice.needs.samples else seen
        taught = _shapes_by_role(teachers[choice.teacher], choice.needs.teacher) if choice.teacher else None
        live = {part: parts[choice.teacher][part] for part in choice.needs.parts} if choice.teacher else {}
        live |= {f"{OF_STUDENT}{part}": student_parts[part] for part in choice.needs.student_parts}
        built[choice.name] = choice.method(choice.config, seen, taught, live)
    return built


def _shapes_by_role(shapes: Shapes, roles: Mapping[str, str]) -> Shapes:
    return replace(shapes, taps={role: shapes.taps[tap] for role, tap in roles.items()})
