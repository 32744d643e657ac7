"""What is learned from an image, its class or the boxes in it: what differs between the two, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from kd_hf.errors import UserError
from kd_hf.recipe.config import GateConfig, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.data.loader import BatchLoader
    from kd_hf.data.source import Split
    from kd_hf.distillation.teacher import Teacher
    from kd_hf.info import ModelInfo, Preprocessing
    from kd_hf.metrics.predictions import Predictions
    from kd_hf.models.handle import ModelHandle
    from kd_hf.models.taps import Tapped
    from kd_hf.tasks.score import Score


@dataclass(frozen=True)
class Words:
    """What a card says of a task's networks.

    Args:
        kind: what one is, as the first words of a sentence.
        goodness: what its score measures.
        limit: a sentence about what it cannot do; ``{data}`` stands for the data's name.
    """

    kind: str
    goodness: str
    limit: str


class Task(ABC):
    """Images, networks and measurements of one kind of learning."""

    pipeline_tag: ClassVar[str]
    """What the Hub calls it."""
    score: ClassVar[Score]
    """The number that says how good a network is, in percent."""
    words: ClassVar[Words]
    """What cards say of its networks."""
    loss: ClassVar[str] = "task"
    """The method that the block `task` of a recipe means; known to :mod:`kd_hf.task_table` of our own tasks."""
    methods: ClassVar[Mapping[str, str]] = {}
    """Its own methods, name → module; empty where those of :mod:`kd_hf.methods` serve it."""
    unlabelled: ClassVar[bool] = True
    """Whether training images may lack labels."""
    pictures: ClassVar[str | None] = None
    """``module:function`` that draws its networks into a report, see :func:`kd_hf.report.build.write_report`."""
    fixed_size: ClassVar[bool] = True
    """Whether networks are made for images of one size."""
    unused_parameters: ClassVar[bool] = False
    """Whether a batch may leave parameters of the student without gradient."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def open_images(self, split: Split, dataset: Any = None, classes: Sequence[str] | None = None) -> Any:
        """The images of a split: what the recipe names, or a data set handed over in Python.

        Args:
            split: `train` or `eval`.
            dataset: instead of the recipe's.
            classes: of the training set, which an evaluation set must have.
        """

    @abstractmethod
    def noise(self, rows: int, size: int, num_classes: int) -> Any:
        """Random images with labels, to see that a recipe runs."""

    def small(self, recipe: Recipe) -> Recipe:
        """A recipe of this task with images that are quick to compute on, where their size decides nothing else."""
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
    def tap_shapes(self, model: Tapped, image_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a tapped network's taps, without the batch dimension."""

    @abstractmethod
    def pretend(self, model: Tapped, image_size: int, count: int) -> None:
        """Run a tapped network of the meta device on images without content, for whoever counts what it does."""

    @abstractmethod
    def example(self, view: Preprocessing, device: torch.device) -> Any:
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

    def named(self, student: ModelHandle, class_names: Sequence[str]) -> ModelHandle:
        """The student as it is exported: with the data's class names, where its outputs are these classes."""
        fits = class_names and len(class_names) == student.info.num_classes
        return replace(student, label_names=tuple(class_names)) if fits else student

    @abstractmethod
    def batches(self, source: Any, views: Mapping[str, Preprocessing], **position: int | bool) -> BatchLoader[Any]:
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
    ) -> Any:
        """What measures students and teachers when it is called."""

    @abstractmethod
    def measure_teachers(
        self,
        teachers: Mapping[str, Teacher],
        fed: Mapping[str, Preprocessing],
        source: Any,
        accelerator: Accelerator,
    ) -> list[GateResult]:
        """Measure teachers on held-out images, by themselves and as training feeds them."""

    @abstractmethod
    def drawn(self, strong: bool = False) -> list[str]:
        """What is drawn at random for every training image, a word each.

        Args:
            strong: whether a method looks at a second, strongly augmented view.
        """

    @abstractmethod
    def augmentation(self) -> dict[str, Any]:
        """What training does to images, option → value: the main ones, and those that are not at their defaults."""

    def size_of(self, view: Preprocessing) -> dict[str, int]:
        """What is known of the pixels of the images that a network is shown."""
        return {"image_size": view.image_size}


@dataclass(frozen=True)
class GateResult:
    """What the gate measured, in percent: in the teacher's own preprocessing, and as training feeds it."""

    teacher: str
    samples: int
    own: float
    fed: float
    own_size: int
    fed_size: int
    metric: str = "top-1"
    guessing: float = 0.0
    """What a teacher that knows nothing may reach."""

    def describe(self) -> str:
        """One line for the log."""
        text = f"teacher '{self.teacher}': {self.metric} {self.own:.1f} on {self.samples} held-out images"
        if self.fed_size == self.own_size and self.fed == self.own:
            return text
        text += f" in its own preprocessing ({self.own_size} px)"
        return f"{text}, {self.fed:.1f} as training feeds it ({self.fed_size} px)"

    def warning(self) -> str | None:
        """What to tell the user when the pipeline costs the teacher accuracy; None when it does not."""
        if self.own - self.fed <= 2.0:
            return None
        return (
            f"teacher '{self.teacher}' loses {self.own - self.fed:.1f} points in the training pipeline: check its "
            "image_size and preprocessing (mean, std, interpolation) in the recipe"
        )

    def check(self, gate: GateConfig) -> None:
        """Raise :class:`UserError` when the teacher is below the gate, or no better than guessing."""
        least = gate.min_score
        reached = f"teacher '{self.teacher}' reaches {self.metric} {self.own:.1f} on {self.samples} held-out images"
        check = "check its weights, preprocessing and label order"
        if least is not None and self.own < least:
            raise UserError(f"{reached}, below gate.min_score = {least:g}; {check}")
        if least is None and self.own <= self.guessing:
            raise UserError(f"{reached}, no better than guessing; {check}, or set gate.enabled: false")


def guessing_top1(classes: int, samples: int) -> float:
    """Top-1 in percent that guessing among so many classes stays below: three standard errors above its mean."""
    chance = 100.0 / classes
    return chance + 3.0 * (chance * (100.0 - chance) / max(1, samples)) ** 0.5
