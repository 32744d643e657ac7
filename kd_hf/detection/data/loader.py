"""Batches of images with boxes; as in :mod:`kd_hf.data.loader`, each is a pure function of its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kd_hf.data.loader import BatchLoader, EvalItems, TrainItems
from kd_hf.data.order import Layout
from kd_hf.detection.data.batch import BoxBatch, filled_up
from kd_hf.detection.data.checks import check_data
from kd_hf.detection.data.objects import Objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.detection.data.views import EvalTransform, TrainTransform, View
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import BoxAugment, DataConfig


@dataclass(frozen=True, eq=False)
class _Sample:
    """One image of a batch."""

    view: View
    objects: Objects
    row: int
    key: int


def _assembled(samples: Sequence[_Sample | None], side: int = 1) -> BoxBatch:
    """The batch of `samples`; where there is none, a black image that fills its place, of `side` at least."""
    found = [sample for sample in samples if sample is not None]
    sides = [sample.view.pixels.shape[1:] for sample in found] or [torch.Size((side, side))]
    height, width = (max(extent[axis] for extent in sides) for axis in (0, 1))
    black = torch.zeros(3, height, width, dtype=torch.uint8)
    views = [
        sample.view if sample else View(black, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (width, height), 0)
        for sample in samples
    ]
    return BoxBatch(
        pixels=filled_up([view.pixels[None] for view in views]),
        extent=torch.tensor([view.pixels.shape[1:] for view in views]),
        boxes=torch.cat([view.boxes for view in views]),
        classes=torch.cat([view.classes for view in views]),
        counts=tuple(len(view.classes) for view in views),
        size=torch.tensor([view.size[::-1] for view in views]),
        image_id=torch.tensor([sample.objects.image_id if sample else -1 for sample in samples]),
        row=torch.tensor([sample.row if sample else -1 for sample in samples]),
        key=torch.tensor([sample.key if sample else 0 for sample in samples]),
        valid=torch.tensor([sample is not None for sample in samples]),
        removed=sum(view.removed for view in views),
    )


class TrainBatches(TrainItems[_Sample, BoxBatch]):
    """Training batches of images with boxes."""

    source: BoxSource

    def __init__(
        self, source: BoxSource, cfg: DataConfig, augment: BoxAugment, layout: Layout, seed: int, parts: int = 1
    ) -> None:
        check_data(cfg)
        super().__init__(source, cfg, layout, seed, parts)
        self.transform = TrainTransform(augment)

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`TrainItems`."""
        data, objects = self.source.read(row)
        return _Sample(self.transform(data, objects, key), objects, row, key)

    def assemble(
        self, samples: Sequence[_Sample], epoch: int, start: int, keys: Sequence[int], corrupt: list[int]
    ) -> BoxBatch:
        """The batch; see :class:`TrainItems`."""
        batch = _assembled(samples)
        batch.epoch, batch.corrupt = epoch, corrupt
        return batch


class EvalBatches(EvalItems[_Sample, BoxBatch]):
    """Evaluation batches of images with boxes, with all that is annotated."""

    source: BoxSource

    def __init__(self, source: BoxSource, augment: BoxAugment, layout: Layout, max_samples: int | None = None) -> None:
        super().__init__(source, layout, max_samples)
        self.transform, self.side = EvalTransform(augment), augment.eval_size

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`EvalItems`."""
        data, objects = self.source.read(row)
        return _Sample(self.transform(data, objects, key), objects, row, key)

    def assemble(self, samples: Sequence[_Sample | None], corrupt: list[int]) -> BoxBatch:
        """The batch; see :class:`EvalItems`."""
        batch = _assembled(samples, self.side)
        batch.truth, batch.corrupt = tuple(sample.objects if sample else None for sample in samples), corrupt
        return batch


def train_loader(
    source: BoxSource,
    cfg: DataConfig,
    views: Mapping[str, Preprocessing],
    *,
    augment: BoxAugment | None = None,
    per_device: int,
    world: int = 1,
    rank: int = 0,
    accumulation: int = 1,
    seed: int = 0,
    start_step: int = 0,
    total_steps: int,
    workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> BatchLoader[BoxBatch]:
    """This rank's micro batches of optimiser steps ``start_step … total_steps - 1``, in order.

    As :func:`kd_hf.data.loader.train_loader`: the images do not depend on `workers`, nor on where the run was resumed;
    the global batch (the union over ranks and accumulation) does not depend on how it is divided. `views` has no part
    in it, since all networks are shown the same pixels.

    Raises:
        UserError: a batch larger than the data set, or an augmentation that is not for boxes.
    """
    layout = Layout(per_device, world, rank, accumulation)
    parts = max(1, min(workers, per_device // 2))
    batches = TrainBatches(source, cfg, augment or BoxAugment(), layout, seed, parts)
    indices = range(start_step * accumulation * parts, total_steps * accumulation * parts)
    return BatchLoader(batches, indices, workers, prefetch_factor, pin_memory, parts)


def eval_loader(
    source: BoxSource,
    views: Mapping[str, Preprocessing],
    *,
    augment: BoxAugment | None = None,
    batch_size: int,
    world: int = 1,
    rank: int = 0,
    workers: int = 0,
    max_samples: int | None = None,
    pin_memory: bool = False,
) -> BatchLoader[BoxBatch]:
    """This rank's evaluation batches: each row once over all ranks, the same number of batches on every rank.

    As :func:`kd_hf.data.loader.eval_loader`.
    """
    batches = EvalBatches(source, augment or BoxAugment(), Layout(batch_size, world, rank), max_samples)
    return BatchLoader(batches, range(len(batches)), workers, 2, pin_memory)
