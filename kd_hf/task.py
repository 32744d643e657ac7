"""What is learned from an image, its class or the boxes in it: what differs between the two, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from kd_hf.config import Recipe
from kd_hf.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.data.loader import BatchLoader
    from kd_hf.data.source import Split
    from kd_hf.gate import GateResult
    from kd_hf.models.handle import ModelHandle
    from kd_hf.models.info import ModelInfo, Preprocessing
    from kd_hf.models.taps import Tapped
    from kd_hf.prediction import Predictions
    from kd_hf.teacher import Teacher


class Task(ABC):
    """Images, networks and measurements of one kind of learning."""

    metric: ClassVar[str]
    """The number that says how good a network is, in percent."""
    pipeline_tag: ClassVar[str]
    """What the Hub calls it."""
    unused_parameters: ClassVar[bool] = False
    """Whether a batch may leave parameters of the student without gradient."""

    @abstractmethod
    def open_images(
        self, recipe: Recipe, split: Split, dataset: Any = None, classes: Sequence[str] | None = None
    ) -> Any:
        """The images of a split: what the recipe names, or a data set handed over in Python.

        Args:
            recipe: the run.
            split: `train` or `eval`.
            dataset: instead of the recipe's.
            classes: of the training set, which an evaluation set must have.
        """

    @abstractmethod
    def noise(self, rows: int, size: int, num_classes: int) -> Any:
        """Random images with labels, to see that a recipe runs."""

    def small(self, recipe: Recipe) -> Recipe:
        """The recipe with images that are quick to compute on, where their size decides nothing else."""
        return recipe

    @abstractmethod
    def load(self, model: str, **options: Any) -> ModelHandle:
        """Load or build a network; options as of :func:`kd_hf.models.load.load_model`."""

    @abstractmethod
    def tapped(
        self, model: ModelHandle | nn.Module, info: ModelInfo, taps: Sequence[str], dist_head: bool = False
    ) -> Tapped:
        """The network as a module that gives outputs with these taps."""

    @abstractmethod
    def tap_shapes(self, model: Tapped, recipe: Recipe, image_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a tapped network's taps, without the batch dimension."""

    @abstractmethod
    def pretend(self, model: Tapped, recipe: Recipe, image_size: int, count: int) -> None:
        """Run a tapped network of the meta device on images without content, for whoever counts what it does."""

    @abstractmethod
    def example(self, view: Preprocessing, recipe: Recipe, device: torch.device) -> Any:
        """One random input of a network that is shown `view`."""

    @abstractmethod
    def predictions(self) -> Predictions:
        """What collects a network's outputs over a data set.

        Raises:
            UserError: this task has no such thing.
        """

    @abstractmethod
    def check_tap(self, info: ModelInfo, tap: str) -> None:
        """Raise :class:`UserError` when a network lacks a tap."""

    @abstractmethod
    def check_classes(self, student: ModelInfo, source: Any) -> None:
        """Raise :class:`UserError` when the student's outputs do not fit the data's classes."""

    def named(self, student: ModelHandle, class_names: Sequence[str], recipe: Recipe) -> ModelHandle:
        """The student as it is exported: with the data's class names, where its outputs are these classes."""
        fits = class_names and len(class_names) == student.info.num_classes
        return replace(student, label_names=tuple(class_names)) if fits else student

    @abstractmethod
    def batches(
        self, source: Any, recipe: Recipe, views: Mapping[str, Preprocessing], **position: int | bool
    ) -> BatchLoader[Any]:
        """Training batches; `position` is what :func:`kd_hf.data.loader.train_loader` takes by name."""

    @abstractmethod
    def stage(
        self, source: Any, views: Mapping[str, Preprocessing], student: ModelInfo
    ) -> Callable[[Any], tuple[Mapping[str, Any], Any]]:
        """What turns a batch on the device into the input of every network, by name, and the target."""

    @abstractmethod
    def evaluator(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, Teacher],
        source: Any,
        accelerator: Accelerator,
        recipe: Recipe,
    ) -> Any:
        """What measures students and teachers when it is called."""

    @abstractmethod
    def measure_teachers(
        self,
        teachers: Mapping[str, Teacher],
        fed: Mapping[str, Preprocessing],
        source: Any,
        accelerator: Accelerator,
        recipe: Recipe,
    ) -> list[GateResult]:
        """Measure teachers on held-out images, by themselves and as training feeds them."""


class Classification(Task):
    """One class an image."""

    metric, pipeline_tag = "top1", "image-classification"

    def open_images(
        self, recipe: Recipe, split: Split, dataset: Any = None, classes: Sequence[str] | None = None
    ) -> Any:
        """See :class:`Task`."""
        from kd_hf.data.rows import open_rows
        from kd_hf.data.source import Source, open_source, with_labels

        data, seed = recipe.data, recipe.train.seed
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

    def tap_shapes(self, model: Any, recipe: Recipe, image_size: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Task`."""
        from kd_hf.models.taps import tap_shapes

        return tap_shapes(model, image_size)

    def pretend(self, model: Tapped, recipe: Recipe, image_size: int, count: int) -> None:
        """See :class:`Task`."""
        reference = next(model.parameters())
        size = (count, 3, image_size, image_size)
        model(torch.zeros(size, device=reference.device, dtype=reference.dtype))

    def example(self, view: Preprocessing, recipe: Recipe, device: torch.device) -> Any:
        """See :class:`Task`."""
        return torch.randn(1, 3, view.image_size, view.image_size, device=device)

    def predictions(self) -> Predictions:
        """See :class:`Task`."""
        from kd_hf.prediction import Predictions

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

    def batches(
        self, source: Any, recipe: Recipe, views: Mapping[str, Preprocessing], **position: Any
    ) -> BatchLoader[Any]:
        """See :class:`Task`."""
        from kd_hf.data.loader import train_loader

        return train_loader(source, recipe.data, views, **position)

    def stage(self, source: Any, views: Mapping[str, Preprocessing], student: ModelInfo) -> Any:
        """See :class:`Task`."""
        from kd_hf.data.views import DeviceStage

        return DeviceStage(views, student.num_classes)

    def evaluator(self, *run: Any) -> Any:
        """See :class:`Task`."""
        from kd_hf.evaluation import Evaluator

        return Evaluator(*run)

    def measure_teachers(
        self,
        teachers: Mapping[str, Teacher],
        fed: Mapping[str, Preprocessing],
        source: Any,
        accelerator: Accelerator,
        recipe: Recipe,
    ) -> list[GateResult]:
        """See :class:`Task`."""
        from kd_hf.evaluation import measure_teachers

        return measure_teachers(teachers, fed, source, accelerator, recipe.train)


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe's data is labelled for."""
    if recipe.data.boxes is None:
        return Classification()
    from kd_hf.detection.task import Detection

    return Detection()
