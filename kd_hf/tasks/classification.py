"""Classification as a task: see :class:`kd_hf.tasks.base.Task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_hf.data.source import Source
from kd_hf.errors import UserError
from kd_hf.metrics.measure import Subject, eval_batch_size, measure
from kd_hf.metrics.meters import Accuracy
from kd_hf.recipe.config import TrainConfig
from kd_hf.recipe.resolved import flat
from kd_hf.tasks.base import GateResult, Task, Words, guessing_top1
from kd_hf.tasks.score import TOP1

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.data.loader import BatchLoader
    from kd_hf.data.source import Split
    from kd_hf.distillation.teacher import Teacher
    from kd_hf.info import ModelInfo, Preprocessing
    from kd_hf.metrics.evaluator import Evaluator
    from kd_hf.metrics.predictions import Predictions
    from kd_hf.models.handle import ModelHandle
    from kd_hf.models.taps import Tapped


def measure_teachers(
    teachers: Mapping[str, Teacher],
    fed: Mapping[str, Preprocessing],
    source: Source,
    accelerator: Accelerator,
    cfg: TrainConfig,
) -> list[GateResult]:
    """Measure teachers on held-out images in their own preprocessing and as training feeds them.

    Args:
        teachers: by name.
        fed: their training views, by the same names.
        source: held-out images.
        accelerator: gives device and ranks.
        cfg: the recipe's `train` block.
    """
    results = []
    for name, teacher in teachers.items():
        if teacher.info.num_classes != source.num_classes:
            continue  # its classes are not the data's: there is no accuracy to measure
        own = teacher.info.native or teacher.info.preprocessing
        views = {"own": own} if own == fed[name] else {"own": own, "fed": fed[name]}
        values = measure(
            {key: Subject(teacher, view, (Accuracy(accelerator.device),)) for key, view in views.items()},
            source,
            accelerator,
            batch_size=eval_batch_size(cfg),
            workers=cfg.dataloader_num_workers,
            max_samples=teacher.cfg.gate.samples,
        )
        top1 = {key: value["top1"] for key, value in values.items() if "top1" in value}
        if "own" in top1:
            samples = int(values["own"]["samples"])
            sizes, chance = (own.image_size, fed[name].image_size), guessing_top1(source.num_classes, samples)
            fed_top1 = top1.get("fed", top1["own"])
            results.append(GateResult(name, samples, top1["own"], fed_top1, *sizes, guessing=chance))
    return results


class Classification(Task):
    """One class an image."""

    pipeline_tag, score = "image-classification", TOP1
    pictures = "kd_hf.report.build:add_classifiers"
    words = Words(
        "An image classifier",
        "accuracy",
        "It gives one of the classes of {data} for any image, also for one that shows none of them.",
    )

    def open_images(self, split: Split, dataset: Any = None, classes: Sequence[str] | None = None) -> Any:
        """See :class:`Task`."""
        from kd_hf.data.opening import open_source, with_labels
        from kd_hf.data.rows import open_rows
        from kd_hf.data.source import Source

        data, seed = self.recipe.data, self.recipe.train.seed
        if dataset is None:
            return open_source(data, split, seed)
        given = isinstance(dataset, Source)
        source = dataset if given else open_rows(dataset, split, data.image_column, data.label_column, classes or None)
        return with_labels(source, data, split, seed)

    def noise(self, rows: int, size: int, num_classes: int) -> Any:
        """See :class:`Task`."""
        from kd_hf.data.noise import NoiseSource

        return NoiseSource(rows, size, num_classes)

    def load(self, model: str, **options: Any) -> ModelHandle:
        """See :class:`Task`."""
        from kd_hf.models.load import load_model

        return load_model(model, **options)

    def tapped(
        self, model: ModelHandle | nn.Module, info: ModelInfo, taps: Sequence[str], dist_head: bool = False
    ) -> Tapped:
        """See :class:`Task`."""
        from kd_hf.models.taps import TappedModel

        return TappedModel(model, info, taps, dist_head)

    def tap_shapes(self, model: Any, image_size: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Task`."""
        from kd_hf.models.taps import tap_shapes

        return tap_shapes(model, image_size)

    def pretend(self, model: Tapped, image_size: int, count: int) -> None:
        """See :class:`Task`."""
        reference = next(model.parameters())
        size = (count, 3, image_size, image_size)
        model(torch.zeros(size, device=reference.device, dtype=reference.dtype))

    def example(self, view: Preprocessing, device: torch.device) -> Any:
        """See :class:`Task`."""
        return torch.randn(1, 3, view.image_size, view.image_size, device=device)

    def predictions(self) -> Predictions:
        """See :class:`Task`."""
        from kd_hf.metrics.predictions import Predictions

        return Predictions()

    def check_tap(self, info: ModelInfo, tap: str) -> None:
        """See :class:`Task`."""
        from kd_hf.models.taps import check_tap

        check_tap(info, tap)

    def check_classes(self, student: ModelInfo, source: Any) -> None:
        """See :class:`Task`."""
        own = student.num_classes
        if own != source.num_classes:
            raise UserError(f"student.num_classes is {own}, but {source.describe()} has {source.num_classes} classes")

    def batches(self, source: Any, views: Mapping[str, Preprocessing], **position: Any) -> BatchLoader[Any]:
        """See :class:`Task`."""
        from kd_hf.data.loader import train_loader

        return train_loader(source, self.recipe.data, views, **position)

    def stage(self, source: Any, views: Mapping[str, Preprocessing], student: ModelInfo) -> Any:
        """See :class:`Task`."""
        from kd_hf.data.views import DeviceStage

        return DeviceStage(views, student.num_classes)

    def evaluator(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, Teacher],
        source: Source,
        accelerator: Accelerator,
    ) -> Evaluator:
        """See :class:`Task`."""
        from kd_hf.metrics.evaluator import Evaluator

        return Evaluator(students, view, teachers, source, accelerator, self.recipe)

    def measure_teachers(
        self,
        teachers: Mapping[str, Teacher],
        fed: Mapping[str, Preprocessing],
        source: Any,
        accelerator: Accelerator,
    ) -> list[GateResult]:
        """See :class:`Task`."""
        return measure_teachers(teachers, fed, source, accelerator, self.recipe.train)

    def drawn(self, strong: bool = False) -> list[str]:
        """See :class:`Task`."""
        from kd_hf.data.geometry import takes_jitter

        augment = self.recipe.data.augment
        drawn = {
            "crop": augment.crop.kind != "resize",
            "flip": augment.hflip > 0,
            str(augment.auto_augment): bool(augment.auto_augment),
            "colour": augment.color_jitter > 0 and takes_jitter(augment.auto_augment),
            "erasing": augment.erasing > 0,
            "mixup": augment.mixup > 0,
            "cutmix": augment.cutmix > 0,
            f"a second view ({augment.strong.describe()})": strong,
        }
        return [name for name, is_drawn in drawn.items() if is_drawn]

    def augmentation(self) -> dict[str, Any]:
        """See :class:`Task`."""
        augment = self.recipe.data.augment
        main = {"crop.kind": augment.crop.kind, "hflip": augment.hflip}
        return main | flat(augment.model_dump(mode="json", exclude_defaults=True))
