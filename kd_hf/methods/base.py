"""The interface of a distillation method: what it reads, what it learns, what it returns.

A method is one file in this folder (or one class in another package's entry-point group ``kd_hf.methods``).
It declares its taps, is built with their shapes, and maps tensors to named losses. It never draws a random
number (draws are arguments), never holds its outer weight (the recipe does), and never runs a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Shapes

if TYPE_CHECKING:
    from kd_hf.outputs import Outputs, Target

OF_STUDENT = "student:"  # begins the names of the student's own parts


class MethodConfig(BaseModel):
    """Options of a method; subclasses add fields with the paper's values as defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Reference:
    """Where a method comes from: for docs and model cards."""

    title: str
    url: str
    code: str = ""


@dataclass(frozen=True)
class Needs:
    """What a method reads. `student` and `teacher` map the method's own role names to tap names."""

    student: Mapping[str, str] = field(default_factory=dict)
    teacher: Mapping[str, str] = field(default_factory=dict)
    teacher_logits: bool = False  # when no loss of a step reads them, the teacher stops after its last tap
    dist_head: bool = False  # the student must train with its distillation head apart
    strong: bool = False  # both networks see a second, strongly augmented view of every image: `Outputs.strong`
    parts: tuple[str, ...] = ()  # live teacher modules, by reference: "head", "after:stage:-2", …
    student_parts: tuple[str, ...] = ()  # live modules of the student, which train; `parts` has them as "student:head"
    labels: Literal["none", "optional", "hard", "soft"] = "none"  # hard: index labels only; soft: mixed rows too
    batch_coupled: bool = False  # the loss mixes samples of a batch
    gathered: bool = False  # a coupled loss mixes those of all processes, so that their number does not matter
    samples: bool = False  # it keeps something of each training image: reads `Target.row` and `Shapes.samples`
    cacheable: bool = True  # the teacher's outputs alone are enough


@dataclass(frozen=True)
class Moment:
    """Where a run stands: `step` optimiser steps are done of `total_steps`, `steps_per_epoch` an epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> int:
        """The epoch the next step belongs to, counted from 1 as papers do."""
        return self.step // self.steps_per_epoch + 1


@dataclass(frozen=True)
class Cost:
    """Per image: multiply–accumulates of the method's own modules (forward), and its parameters.

    `sample_bytes` are what it keeps of every training image.
    """

    parameters: int = 0
    macs: int = 0
    sample_bytes: int = 0


class Method(nn.Module, ABC):
    """Base of every method. Subclasses set `name`, `Config`, `paper`, `weight` and implement `needs` and `forward`."""

    name: ClassVar[str]
    paper: ClassVar[Reference]
    weight: ClassVar[float] = 1.0  # the paper's overall factor: the default of the recipe's `weight`
    least_images: ClassVar[int] = 1  # of the batch that a coupled loss mixes: of fewer there is nothing to learn
    kept_equal: ClassVar[tuple[str, ...]] = ()  # buffers that the method itself keeps the same on all processes

    class Config(MethodConfig):
        """No options."""

    @classmethod
    @abstractmethod
    def needs(cls, cfg: Any, student: ModelInfo, teacher: ModelInfo | None) -> Needs:
        """Say what is read; `cfg` is a `cls.Config`. Raises :class:`UserError` when these networks cannot serve."""

    def __init__(
        self,
        cfg: Any,
        student: Shapes,
        teacher: Shapes | None,
        parts: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.cfg = cfg
        # by reference: a plain dict is not registered, so the networks stay out of state_dict and optimiser
        self.parts = dict(parts)

    def draw(self, draws: Draws) -> Mapping[str, Tensor]:
        """Random tensors for this batch; called outside `forward` so that tests can inject others."""
        return {}

    def scheduled(self, moment: Moment) -> Mapping[str, float]:
        """Numbers that move with the run, beside the weight; `forward` has them as scalars among its draws."""
        return {}

    @abstractmethod
    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a batch to named scalar losses; the method's loss is their sum.

        `draws` holds what `draw` and `scheduled` give.
        """

    def cost(self) -> Cost:
        """Own parameters and multiply–accumulates per image."""
        return Cost(parameters=sum(p.numel() for p in self.parameters()))


def require_teacher(name: str, teacher: ModelInfo | None, student: ModelInfo, same_classes: bool = True) -> ModelInfo:
    """Refuse a missing teacher, or one with another number of classes, in the words of the recipe.

    A method that compares features only passes ``same_classes=False``.
    """
    if teacher is None:
        raise UserError(f"methods.{name} needs a teacher; add a `teacher:` block to the recipe")
    if same_classes and teacher.num_classes != student.num_classes:
        raise UserError(
            f"methods.{name}: the teacher '{teacher.name}' has {teacher.num_classes} classes and the student "
            f"'{student.name}' has {student.num_classes}; logits can only be compared class by class"
        )
    return teacher
