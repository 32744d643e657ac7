"""Batches: every micro step of a run is a pure function of its number, so any process can produce any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kd_hf.config import DataConfig
from kd_hf.data.batch import Batch
from kd_hf.data.draws import hash_key, python_state_kept
from kd_hf.data.mix import Erasing, Mixing, batch_mixing, check_mixing, draw_erasing, is_mixing
from kd_hf.data.order import EpochOrder, Layout, spread_rows
from kd_hf.data.source import Source
from kd_hf.data.views import EvalTransform, TrainTransform, UnreadableImage, ViewPlan, plan_views
from kd_hf.errors import LocalError, UserError
from kd_hf.models.info import Preprocessing

Transform = Callable[[bytes, int], dict[str, np.ndarray]]
MAX_SKIP = 100  # consecutive unreadable rows after which something else must be wrong


class _Assembler:
    """Fills the tensors of a batch sample by sample."""

    def __init__(self, plan: ViewPlan, size: int) -> None:
        self.view_of = plan.view_of
        self.views = {
            name: np.zeros((size, 3, spec.image_size, spec.image_size), np.uint8) for name, spec in plan.views.items()
        }
        self.label, self.row = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
        self.key, self.valid = np.zeros(size, np.int64), np.zeros(size, bool)

    def put(self, position: int, views: dict[str, np.ndarray], label: int, row: int, key: int) -> None:
        for name, view in views.items():
            self.views[name][position] = view
        self.label[position], self.row[position], self.key[position] = label, row, key
        self.valid[position] = True

    def batch(self, **rest: Any) -> Batch:
        label, row, key, valid = (torch.from_numpy(array) for array in (self.label, self.row, self.key, self.valid))
        views = {name: torch.from_numpy(view) for name, view in self.views.items()}
        return Batch(views, label, row, key, valid, dict(self.view_of), **rest)


class TrainBatches(Dataset[Batch]):
    """The training batches of one rank, by micro step over the whole run, each in `parts` of consecutive images.

    Item ``micro_step * parts + part``. A worker that always builds the same part reads the same lanes of the data.
    """

    def __init__(
        self, source: Source, cfg: DataConfig, plan: ViewPlan, layout: Layout, seed: int, parts: int = 1
    ) -> None:
        check_mixing(cfg.augment, layout.per_device)
        self.source, self.augment, self.plan, self.layout, self.seed = source, cfg.augment, plan, layout, seed
        self.transform = TrainTransform(plan, cfg.augment)
        self.order = EpochOrder(
            source.group_sizes, seed, cfg.shuffle_block, cfg.augment.repeats, layout.global_batch, cfg.lanes
        )
        # at even positions, so that images that are mixed with each other stay together
        self.cuts = [layout.per_device * part // parts // 2 * 2 for part in range(parts)] + [layout.per_device]
        source.expect(-(-self.order.lanes // (layout.world * parts)) + 1)

    def __getitem__(self, index: int) -> Batch:
        """Build item `index`."""
        micro_step, part = divmod(index, len(self.cuts) - 1)
        epoch, start = self.layout.locate(micro_step, self.order.steps_per_epoch)
        start, count = start + self.cuts[part], self.cuts[part + 1] - self.cuts[part]
        rows, repeats = self.order.rows(epoch, start, start + count)
        keys = [
            hash_key(self.seed, epoch, row, repeat) for row, repeat in zip(rows.tolist(), repeats.tolist(), strict=True)
        ]
        assembler = _Assembler(self.plan, count)
        corrupt: list[int] = []
        with python_state_kept():
            for position, (row, key) in enumerate(zip(rows.tolist(), keys, strict=True)):
                views, label, used = self._readable(row, key, corrupt)
                assembler.put(position, views, label, used, key)
        return assembler.batch(
            epoch=epoch, mixing=self._mixing(epoch, start, count), erasing=self._erasing(keys), corrupt=corrupt
        )

    def _erasing(self, keys: Sequence[int]) -> tuple[Erasing, ...]:
        boxes = (draw_erasing(self.augment.erasing, self.plan.size, key) for key in keys)
        return tuple(Erasing(position, box) for position, box in enumerate(boxes) if box is not None)

    def _readable(self, row: int, key: int, corrupt: list[int]) -> tuple[dict[str, np.ndarray], int, int]:
        """(views, label, row) of the first readable row from `row` on; the others are added to `corrupt`."""
        reason: Exception | None = None
        for candidate in range(row, row + min(MAX_SKIP, len(self.source))):
            candidate %= len(self.source)
            try:
                data, label = self.source.read(candidate)
                return self.transform(data, key), label, candidate
            except (UnreadableImage, OSError) as error:
                corrupt.append(candidate)
                reason = error
        raise UserError(
            f"data.path: no readable image in {self.source.describe()} from row {row} on (tried {len(corrupt)});"
            f" the last reason was: {reason}"
        )

    def _mixing(self, epoch: int, start: int, count: int) -> tuple[Mixing, ...] | None:
        if not is_mixing(self.augment):
            return None
        return batch_mixing(self.augment, self.seed, epoch, start, count, self.layout.global_batch, self.plan.size)


class EvalBatches(Dataset[Batch]):
    """The evaluation batches of one rank. All ranks have the same number, the last ones padded."""

    def __init__(self, source: Source, plan: ViewPlan, layout: Layout, max_samples: int | None = None) -> None:
        self.source, self.plan, self.layout = source, plan, layout
        self.transform: Transform = EvalTransform(plan)
        count = len(source) if max_samples is None else max_samples
        rows = spread_rows(source.group_sizes, count)
        self.share = -(-len(rows) // layout.world)  # neighbouring rows, so that ranks read different row groups
        self.rows = rows[layout.rank * self.share : (layout.rank + 1) * self.share]
        source.expect(1)

    def __len__(self) -> int:
        return -(-self.share // self.layout.per_device)

    def __getitem__(self, index: int) -> Batch:
        """Build batch number `index` of the rank's share."""
        size = self.layout.per_device
        assembler = _Assembler(self.plan, size)
        corrupt = []
        for position, row in enumerate(self.rows[index * size : (index + 1) * size].tolist()):
            try:
                data, label = self.source.read(row)
                assembler.put(position, self.transform(data, 0), label, row, hash_key(row))
            except (UnreadableImage, OSError):
                corrupt.append(row)
        return assembler.batch(corrupt=corrupt)


class _Guarded(Dataset["Batch | UserError"]):
    """Hands a :class:`UserError` over as a value: the DataLoader would bury the message of a raised one under a
    worker's traceback."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> Batch | UserError:
        try:
            return self.batches[index]
        except UserError as error:
            return error


class BatchLoader:
    """Iterates over whole batches with a DataLoader; a worker's :class:`UserError` is raised as it was.

    Args:
        batches: by item number.
        indices: the items, in order.
        workers: processes that build them; 0 builds them here.
        prefetch_factor: items that each worker is ahead.
        pin_memory: give page-locked tensors.
        parts: consecutive items that make one batch.
    """

    def __init__(
        self,
        batches: Dataset[Batch],
        indices: Sequence[int],
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        parts: int = 1,
    ) -> None:
        self.batches, self.indices, self.parts = batches, indices, parts
        self.workers, self.prefetch_factor, self.pin_memory = workers, prefetch_factor, pin_memory
        self._dataloader: DataLoader[Batch | UserError] | None = None

    def _build(self) -> DataLoader[Batch | UserError]:
        return DataLoader(
            _Guarded(self.batches),
            batch_size=None,
            sampler=self.indices,
            num_workers=self.workers,
            pin_memory=self.pin_memory and self.parts == 1,  # parts are joined in page-locked memory instead
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws a number from the global one
            persistent_workers=self.workers > 0,
            prefetch_factor=self.prefetch_factor if self.workers else None,
        )

    def __len__(self) -> int:
        return len(self.indices) // self.parts

    def __iter__(self) -> Iterator[Batch]:
        if self._dataloader is None:
            self._dataloader = self._build()
        parts: list[Batch] = []
        for item in self._dataloader:
            if isinstance(item, UserError):
                break
            parts.append(item)
            if len(parts) == self.parts:
                yield Batch.join(parts, self.pin_memory) if self.parts > 1 else item
                parts = []
        else:
            return
        # end the workers now: as part of the cycle exception – traceback – frame they would take 10 s to
        self._dataloader = None
        raise LocalError(str(item))


def _as_it_is(item: Any) -> Any:
    return item


def train_loader(
    source: Source,
    cfg: DataConfig,
    views: Mapping[str, Preprocessing],
    *,
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
) -> BatchLoader:
    """This rank's micro batches of optimiser steps ``start_step … total_steps - 1``, in order.

    The batches do not depend on `workers`, nor on where the run was resumed; the global batch (the union over
    ranks and accumulation) does not depend on how it is divided.

    Raises:
        UserError: a batch larger than the data set, an odd batch with mixing, repeats that do not divide it.
    """
    layout = Layout(per_device, world, rank, accumulation)
    parts = max(1, min(workers, per_device // 2))
    batches = TrainBatches(source, cfg, plan_views(views, training=True), layout, seed, parts)
    indices = range(start_step * accumulation * parts, total_steps * accumulation * parts)
    return BatchLoader(batches, indices, workers, prefetch_factor, pin_memory, parts)


def eval_loader(
    source: Source,
    views: Mapping[str, Preprocessing],
    *,
    batch_size: int,
    world: int = 1,
    rank: int = 0,
    workers: int = 0,
    max_samples: int | None = None,
    pin_memory: bool = False,
) -> BatchLoader:
    """This rank's evaluation batches: each row once over all ranks, the same number of batches on every rank.

    Args:
        source: of the images.
        views: preprocessing by network name.
        batch_size: images per rank and batch; padding has ``valid = False``.
        world: number of ranks.
        rank: of this process.
        workers: processes that decode.
        max_samples: look at this many images only, spread over the whole set.
        pin_memory: hand over page-locked tensors.
    """
    batches = EvalBatches(source, plan_views(views), Layout(batch_size, world, rank), max_samples)
    return BatchLoader(batches, range(len(batches)), workers, 2, pin_memory)
