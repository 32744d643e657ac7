"""Object detection as a task: see :class:`kd_hf.tasks.base.Task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kd_hf.data.loader import BatchLoader
from kd_hf.data.source import Split
from kd_hf.detection.data.categories import is_matched, outputs_of_classes
from kd_hf.detection.data.loader import train_loader
from kd_hf.detection.data.noise import NoiseBoxes
from kd_hf.detection.data.opening import open_boxes, open_given
from kd_hf.detection.data.source import BoxSource
from kd_hf.detection.data.stage import BoxStage, Images
from kd_hf.detection.metrics.evaluator import BoxEvaluator, BoxSubject, measure_boxes
from kd_hf.detection.networks.detector import TappedDetector, pretend, tap_shapes
from kd_hf.detection.networks.info import check_tap
from kd_hf.detection.networks.load import load_detector
from kd_hf.detection.networks.processors import image_processor
from kd_hf.distillation.teacher import Teacher
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing
from kd_hf.metrics.measure import eval_batch_size
from kd_hf.metrics.predictions import Predictions
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import Tapped
from kd_hf.recipe.config import BoxAugment, Recipe
from kd_hf.recipe.resolved import flat
from kd_hf.tasks.base import GateResult, Task, Words
from kd_hf.tasks.score import AP

_GUESSING = 0.5  # average precision in percent that a network without knowledge does not reach
_SMOKE = {"sizes": (320,), "max_size": 480, "crop": 0.0, "eval_size": 320}


class Detection(Task):
    """Boxes and their classes."""

    pipeline_tag, score = "object-detection", AP
    pictures = "kd_hf.report.detections:add_detectors"
    words = Words(
        "An object detector",
        "precision",
        "It knows the classes of {data} only: other things are not found, or taken for one of them.",
    )
    fixed_size = False
    unused_parameters = True  # embeddings of classes and of denoising, where a batch has no object of theirs

    def open_images(self, split: Split, dataset: Any = None, classes: Sequence[str] | None = None) -> BoxSource:
        """See :class:`Task`."""
        data, boxes = self.recipe.data, self.recipe.data.boxes
        if dataset is None:
            return open_boxes(data, split, boxes, classes)
        if isinstance(dataset, BoxSource):
            return dataset
        return open_given(dataset, split, boxes, data.image_column, data.label_column, classes)

    def noise(self, rows: int, size: int, num_classes: int) -> BoxSource:
        """See :class:`Task`."""
        return NoiseBoxes(rows, num_classes)

    def small(self, recipe: Recipe) -> Recipe:
        """See :class:`Task`."""
        boxes = recipe.data.boxes
        assert boxes is not None
        smaller = boxes.model_copy(update={"augment": boxes.augment.model_copy(update=_SMOKE)})
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"boxes": smaller})})

    def load(self, model: str, **options: Any) -> ModelHandle:
        """See :class:`Task`."""
        options.pop("image_size", None)  # detectors take images of any size
        return load_detector(model, **options)

    def tapped(self, model: Any, info: Any, taps: Sequence[str], dist_head: bool = False) -> Tapped:
        """See :class:`Task`."""
        return TappedDetector(model, info, taps)

    def tap_shapes(self, model: Any, image_size: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Task`."""
        return tap_shapes(model, _frame(self.recipe))

    def pretend(self, model: Any, image_size: int, count: int) -> None:
        """See :class:`Task`."""
        pretend(model, _frame(self.recipe), count)

    def example(self, view: Preprocessing, device: torch.device) -> Images:
        """See :class:`Task`."""
        height, width = _frame(self.recipe)
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
        return Images(torch.randn(1, 3, height, width, device=device), mask)

    def check_tap(self, info: Any, tap: str) -> None:
        """See :class:`Task`."""
        check_tap(info, tap)

    def check_classes(self, student: ModelInfo, source: BoxSource) -> None:
        """See :class:`Task`."""
        if not is_matched(source.class_names, student.num_classes):
            raise UserError(
                f"student.num_classes is {student.num_classes}, but {source.describe()} has {source.told_classes()}"
            )

    def named(self, student: ModelHandle, class_names: Sequence[str]) -> ModelHandle:
        """See :class:`Task`; the image processor gives images the size that evaluation does."""
        facts, augment = student.info.preprocessing, _augment(self.recipe)
        processor = image_processor(student, facts.mean, facts.std, augment.eval_size, augment.max_size)
        return replace(super().named(student, class_names), image_processor=processor)

    def batches(self, source: BoxSource, views: Mapping[str, Preprocessing], **position: Any) -> BatchLoader[Any]:
        """See :class:`Task`."""
        return train_loader(source, self.recipe.data, views, augment=_augment(self.recipe), **position)

    def stage(self, source: BoxSource, views: Mapping[str, Preprocessing], student: ModelInfo) -> BoxStage:
        """See :class:`Task`."""
        return BoxStage(views, outputs_of_classes(source.class_names, student.num_classes))

    def evaluator(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, Teacher],
        source: BoxSource,
        accelerator: Accelerator,
    ) -> BoxEvaluator:
        """See :class:`Task`."""
        named: Mapping[str, Any] = teachers  # whose calls give what detectors predict
        return BoxEvaluator(students, view, named, source, accelerator, self.recipe, _augment(self.recipe))

    def predictions(self) -> Predictions:
        """See :class:`Task`."""
        raise UserError("predict and compute_metrics are for classifiers; evaluate measures a detector's precision")

    def measure_teachers(
        self,
        teachers: Mapping[str, Teacher],
        fed: Mapping[str, Preprocessing],
        source: BoxSource,
        accelerator: Accelerator,
    ) -> list[GateResult]:
        """See :class:`Task`; networks of other classes than the data's are not measured."""
        results = []
        for name, teacher in teachers.items():
            if not is_matched(source.class_names, teacher.info.num_classes):
                continue
            run: Any = teacher
            own = teacher.info.native or teacher.info.preprocessing
            views = {"own": own} if own == fed[name] else {"own": own, "fed": fed[name]}
            found = measure_boxes(
                {key: BoxSubject(run, view) for key, view in views.items()},
                source,
                accelerator,
                batch_size=eval_batch_size(self.recipe.train),
                augment=_augment(self.recipe),
                workers=self.recipe.train.dataloader_num_workers,
                max_samples=teacher.cfg.gate.samples,
            )
            ap = {key: values.get("ap", 0.0) for key, values in found.items()}
            size = _augment(self.recipe).eval_size
            samples = int(found["own"]["samples"])
            results.append(GateResult(name, samples, ap["own"], ap.get("fed", ap["own"]), size, size, "AP", _GUESSING))
        return results

    def drawn(self, strong: bool = False) -> list[str]:
        """See :class:`Task`."""
        augment = _augment(self.recipe)
        drawn = {"flip": augment.hflip > 0, "crop": augment.crop > 0, "size": len(augment.sizes) > 1}
        return [name for name, is_drawn in drawn.items() if is_drawn]

    def augmentation(self) -> dict[str, Any]:
        """See :class:`Task`."""
        augment = _augment(self.recipe)
        main = {"hflip": augment.hflip, "crop": augment.crop}
        return main | flat(augment.model_dump(mode="json", exclude_defaults=True))

    def size_of(self, view: Preprocessing) -> dict[str, int]:
        """Of detectors the shortest side in evaluation; see :class:`Task`."""
        return {"shortest_side": _augment(self.recipe).eval_size}


def _augment(recipe: Recipe) -> BoxAugment:
    return recipe.data.boxes.augment if recipe.data.boxes is not None else BoxAugment()


def _frame(recipe: Recipe) -> tuple[int, int]:
    """Height and width of an ordinary image (3:2) as evaluation shows it."""
    augment = _augment(recipe)
    width = min(augment.max_size, augment.eval_size * 3 // 2)
    height, step = augment.eval_size, augment.multiple_of
    return height // step * step, width // step * step
