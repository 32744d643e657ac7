"""The one module that is trained: the student and everything the methods learn; one forward → named losses."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import Samples, Shapes
from kd_hf.methods.base import OF_STUDENT, Method, Moment
from kd_hf.models.taps import Tapped
from kd_hf.outputs import Outputs, Target
from kd_hf.recipe.config import TASK

if TYPE_CHECKING:
    from kd_hf.distillation.choices import Choice


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
        strong: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run the student once, or on both views, and every active method on what it gave.

        Args:
            pixels: normalised student images ``[B, 3, H, W]``.
            teachers: outputs by teacher name, taps keyed by tap name.
            target: labels.
            draws: from :meth:`draw`.
            active: block names to compute; all by default.
            strong: the same images strongly augmented, where a method compares two views.

        Returns:
            Unweighted scalar losses named ``block/part``.
        """
        seen = self.student(pixels, target)
        if strong is not None:
            seen = replace(seen, strong=self.student(strong, target))
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
    strong = None if outputs.strong is None else by_role(outputs.strong, roles)
    return replace(outputs, taps={role: outputs.taps[tap] for role, tap in roles.items()}, strong=strong)


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
