"""A task of another package, whole: one number for each image, here the number that a digit stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.methods.base import Method, MethodConfig, Needs, Reference
from kd_hf.metrics.evaluator import Evaluator
from kd_hf.metrics.measure import Subject, eval_batch_size, measure
from kd_hf.metrics.meters import Meter
from kd_hf.outputs import Outputs, Target
from kd_hf.tasks.base import Words
from kd_hf.tasks.classification import Classification
from kd_hf.tasks.score import Score


class AbsoluteError(Meter):
    """``mae``: the mean distance of the number said from the right one, and ``samples``."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def update(self, batch: Any) -> None:
        """Add a batch."""
        counted = batch.valid & (batch.label >= 0)
        distance = (batch.logits[:, 0].double() - batch.label).abs() * counted
        self.sums += torch.stack([distance.sum(), counted.sum().double()])

    def compute(self, reduce_sum: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, float]:
        """The values over all ranks."""
        total, count = reduce_sum(self.sums).tolist()
        return {"mae": total / max(count, 1.0), "samples": count}


class Squared(Method):
    """``1/B Σ_b (ŷ_b - y_b)²``."""

    name = "squared"
    paper = Reference("Least squares", "https://example.org")

    class Config(MethodConfig):
        """No options."""

    @classmethod
    def needs(cls, cfg: Any, student: Any, teacher: Any) -> Needs:
        """Labels."""
        return Needs(labels="hard")

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Target, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ``{"mse": scalar}``."""
        return {"mse": (student.logits[:, 0].float() - target.hard.float()).square().mean()}


class _Numbers(Evaluator):
    """The student's and the teachers' distances."""

    def __call__(self, found: Any = None) -> dict[str, float]:
        device = self.accelerator.device
        subjects = {name: Subject(run, self.view, (AbsoluteError(device),)) for name, run in self._runs.items()}
        size, data = eval_batch_size(self.recipe.train), self.recipe.eval.max_samples
        return measure(subjects, self.source, self.accelerator, batch_size=size, max_samples=data)["student"]


class Number(Classification):
    """One number an image, as the only output of a network."""

    pipeline_tag, score = "image-regression", Score("mae", "error", "Mean absolute error")
    words = Words("A network that reads a number", "error", "It says a number for any image, not only for {data}.")
    loss, methods, pictures = "squared", {"squared": __name__, "kd": "kd_hf.methods.kd"}, None

    def check_classes(self, student: Any, source: Any) -> None:
        """One output."""
        if student.num_classes != 1:
            raise UserError(f"student.num_classes is {student.num_classes}; a number is one output: set it to 1")

    def named(self, student: Any, class_names: Any) -> Any:
        """Without names of classes."""
        return student

    def evaluator(self, students: Any, view: Any, teachers: Any, source: Any, accelerator: Any) -> Any:
        """Distances."""
        return _Numbers(students, view, {}, source, accelerator, self.recipe)

    def measure_teachers(self, teachers: Any, fed: Any, source: Any, accelerator: Any) -> list[Any]:
        """None is gated."""
        return []
