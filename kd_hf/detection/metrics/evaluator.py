"""Running detectors over an evaluation set: the student while it trains, teachers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from kd_hf.data.loader import BatchLoader
from kd_hf.detection.data.batch import BoxBatch
from kd_hf.detection.data.categories import is_matched
from kd_hf.detection.data.loader import EvalBatches, eval_loader
from kd_hf.detection.data.objects import Objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.detection.data.stage import BoxStage, Images
from kd_hf.detection.metrics.average_precision import Results, average_precision, need_pycocotools
from kd_hf.detection.metrics.postprocess import Detections, Head
from kd_hf.info import Preprocessing
from kd_hf.metrics.measure import eval_batch_size
from kd_hf.recipe.config import BoxAugment, Recipe
from kd_hf.text.terminal import watched


class Predicted(Protocol):
    """What a detector gives for a batch."""

    @property
    def logits(self) -> Tensor:
        """``[B, Q, K]``."""

    @property
    def boxes(self) -> Tensor:
        """``[B, Q, 4]``: centre, width and height, relative to the image without padding."""


Run = Callable[[Images], Predicted]


class BoxTeacher(Protocol):
    """What evaluation asks of a teacher."""

    info: Any
    """With `preprocessing` and `num_classes`."""

    def __call__(self, images: Images) -> Predicted:
        """Predictions without gradient."""


@dataclass(frozen=True)
class BoxSubject:
    """A detector under measurement."""

    run: Run
    view: Preprocessing
    """What it is shown."""


class Finder:
    """Collects the detections of one network batch by batch, on its device."""

    def __init__(self, source: BoxSource) -> None:
        self.names = source.class_names
        self._head: Head | None = None  # known with the first logits
        self._found: list[Detections] = []
        self._rows: list[Tensor] = []
        self._truth: list[Objects | None] = []

    def find(self, predicted: Predicted, size: Tensor) -> Detections:
        """The detections of a batch; see :class:`kd_hf.detection.metrics.postprocess.Head`."""
        if self._head is None:
            self._head = Head(self.names, predicted.logits.shape[-1])
        return self._head(predicted.logits, predicted.boxes, size)

    def add(self, batch: BoxBatch, predicted: Predicted) -> None:
        """Keep what was found in a batch; padding and unreadable images are left out at the end."""
        self._found.append(self.find(predicted, batch.size))
        self._rows.append(torch.where(batch.valid, batch.row, -1))
        self._truth += batch.truth

    def results(self) -> Results:
        """What this process saw."""
        rows = torch.cat(self._rows).cpu().numpy()
        seen = np.flatnonzero(rows >= 0)
        scores, classes, boxes = (
            torch.cat([getattr(part, name) for part in self._found]).cpu().numpy()[seen]
            for name in ("scores", "classes", "boxes")
        )
        return Results(rows[seen], scores, classes, boxes, tuple(o for o in self._truth if o is not None))


def measure_boxes(
    subjects: Mapping[str, BoxSubject],
    source: BoxSource,
    accelerator: Accelerator,
    *,
    batch_size: int,
    augment: BoxAugment | None = None,
    workers: int = 0,
    max_samples: int | None = None,
    keep: dict[str, Results] | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Run several detectors over the same images, exact over ranks; their average precision, by network.

    Args:
        subjects: detectors by name.
        source: the images.
        accelerator: gives device and ranks.
        batch_size: per process.
        augment: sizes of the images.
        workers: loader processes.
        max_samples: stop after so many images of the set (taken evenly from all of it).
        keep: filled with what each network found in all images, by name, on the main process.
        progress: show a bar.

    Returns:
        by :data:`kd_hf.detection.metrics.average_precision.NAMES`, and ``samples``; the same on all processes.

    Raises:
        UserError: pycocotools is missing, or a network's classes are not the data's.
    """
    need_pycocotools()
    views = {name: subject.view for name, subject in subjects.items()}
    stage, finders = BoxStage(views), {name: Finder(source) for name in subjects}
    loader = eval_loader(
        source,
        views,
        augment=augment,
        batch_size=batch_size,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
        workers=workers,
        max_samples=max_samples,
    )
    for cpu_batch in _with_bar(loader, accelerator, progress):
        batch = cpu_batch.to(accelerator.device)
        images, _ = stage(batch)
        for name, subject in subjects.items():
            finders[name].add(batch, subject.run(images[name]))
    values: dict[str, dict[str, float]] = {}
    for name, finder in finders.items():
        parts = gather_object([finder.results()])
        if accelerator.is_main_process:
            whole = Results.join(parts)
            values[name] = average_precision(whole, source.category_ids) | {"samples": float(len(whole.rows))}
            if keep is not None:
                keep[name] = whole
    # the others only hear of it: pycocotools takes its time on one core
    told: dict[str, dict[str, float]] = broadcast_object_list([values])[0]
    return told


def _with_bar(loader: BatchLoader[BoxBatch], accelerator: Accelerator, progress: bool) -> Iterator[BoxBatch]:
    """The batches, with a bar over the images of all processes."""
    hidden, world = not (progress and watched()), accelerator.num_processes
    total = len(loader.batches.rows) * world if isinstance(loader.batches, EvalBatches) else None
    with tqdm(desc="evaluate", total=total, unit="image", leave=False, disable=hidden) as bar:
        for batch in loader:
            yield batch
            bar.update(int(batch.valid.sum()) * world)


def box_runner(model: nn.Module, accelerator: Accelerator) -> Run:
    """Run a detector that takes :class:`Images`, in eval mode under the run's autocast, without gradient."""

    def run(images: Images) -> Predicted:
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            predicted: Predicted = model(images)
        return predicted

    return run


class BoxEvaluator:
    """A student's evaluation during and after training; teachers are run once and remembered.

    Args:
        students: ``student`` is what will be exported; others (``raw``, ``ema``) are measured beside it. They take
            :class:`Images` and give :class:`Predicted`.
        view: what the students are shown.
        teachers: by name; those whose classes are not the data's are left out.
        source: the images.
        accelerator: gives device and ranks.
        recipe: the run.
        augment: sizes of the images.

    Raises:
        UserError: pycocotools is missing.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, BoxTeacher],
        source: BoxSource,
        accelerator: Accelerator,
        recipe: Recipe,
        augment: BoxAugment | None = None,
    ) -> None:
        need_pycocotools()
        self.students = {name: box_runner(model, accelerator) for name, model in students.items()}
        self.view, self.augment = view, augment
        wanted = teachers if recipe.eval.teacher else {}
        self.teachers = {n: t for n, t in wanted.items() if is_matched(source.class_names, t.info.num_classes)}
        self.source, self.accelerator, self.recipe = source, accelerator, recipe
        self._teacher_values: dict[str, dict[str, float]] = {}

    def __call__(self, found: dict[str, Results] | None = None) -> dict[str, float]:
        """``ap``, ``ap50`` … ``ar_large`` in percent and ``samples`` of the student.

        Beside them ``raw_ap`` or ``ema_ap``, and ``<teacher>_ap``.

        Args:
            found: collects what the student (and whatever else was run) found, by name, on the main process.
        """
        new = {name: teacher for name, teacher in self.teachers.items() if name not in self._teacher_values}
        subjects = {name: BoxSubject(run, self.view) for name, run in self.students.items()}
        subjects |= {name: BoxSubject(teacher, teacher.info.preprocessing) for name, teacher in new.items()}
        args = self.recipe.train
        values = measure_boxes(
            subjects,
            self.source,
            self.accelerator,
            batch_size=eval_batch_size(args),
            augment=self.augment,
            workers=args.dataloader_num_workers,
            max_samples=self.recipe.eval.max_samples,
            keep=found,
            progress=self.accelerator.is_main_process and not args.disable_tqdm,
        )
        self._teacher_values |= {name: values[name] for name in new}
        beside = {name: values[name] for name in self.students if name != "student"} | self._teacher_values
        return values["student"] | {f"{name}_ap": seen["ap"] for name, seen in beside.items() if "ap" in seen}
