"""A classifier's evaluation during and after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import Tensor, nn

from kd_hf.data.source import Source
from kd_hf.info import Preprocessing
from kd_hf.metrics.measure import Subject, eval_batch_size, measure, predictor, runner
from kd_hf.metrics.meters import Accuracy, Calibration
from kd_hf.metrics.predictions import Predictions
from kd_hf.recipe.config import Recipe

if TYPE_CHECKING:
    from kd_hf.distillation.teacher import Teacher


class Evaluator:
    """A student's evaluation during and after training; teachers are run once and remembered.

    Args:
        students: ``student`` is what will be exported; others (``raw``, ``ema``) are measured beside it.
        view: what the students are shown.
        teachers: by name; the first whose classes are the data's is what agreement is measured against.
        source: the images.
        accelerator: gives device and ranks.
        recipe: the run.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, Teacher],
        source: Source,
        accelerator: Accelerator,
        recipe: Recipe,
    ) -> None:
        self.students = {name: predictor(model, accelerator) for name, model in students.items()}
        self._runs = {name: runner(model, accelerator) for name, model in students.items()}
        self.view = view
        wanted = teachers if recipe.eval.teacher else {}
        self.teachers = {name: t for name, t in wanted.items() if t.info.num_classes == source.num_classes}
        self.source, self.accelerator, self.recipe = source, accelerator, recipe
        self._teacher_choices: list[Tensor] = []
        self._teacher_values: dict[str, dict[str, float]] = {}

    def __call__(self, found: Predictions | None = None) -> dict[str, float]:
        """``top1``, ``top5``, ``nll``, ``ece``, ``brier``, ``agreement`` and ``samples`` of the student.

        Units as in :mod:`kd_hf.metrics.meters`. Beside them ``raw_top1`` or ``ema_top1``, and ``<teacher>_top1``. Only
        the teacher's choices are kept, not its logits: divergence and similarity are for ``kd_hf.eval``.

        Args:
            found: collects the student's logits.
        """
        device = self.accelerator.device
        new = {name: teacher for name, teacher in self.teachers.items() if name not in self._teacher_values}
        subjects = {
            name: Subject(run, self.view, (Accuracy(device), Calibration(device))) for name, run in self._runs.items()
        }
        subjects |= {name: Subject(t, t.info.preprocessing, (Accuracy(device),)) for name, t in new.items()}
        reference = next(iter(self.teachers), None)
        values = measure(
            subjects,
            self.source,
            self.accelerator,
            batch_size=eval_batch_size(self.recipe.train),
            workers=self.recipe.train.dataloader_num_workers,
            max_samples=self.recipe.eval.max_samples,
            reference=reference,
            known=self._teacher_choices if reference else None,
            keep={"student": found} if found is not None else None,
            progress=self.accelerator.is_main_process and not self.recipe.train.disable_tqdm,
        )
        self._teacher_values |= {name: values[name] for name in new}
        beside = {name: values[name] for name in self.students if name != "student"} | self._teacher_values
        return values["student"] | {f"{name}_top1": found["top1"] for name, found in beside.items() if "top1" in found}
