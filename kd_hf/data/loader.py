"""Batches: every micro step of a run is a pure function of its number, so any process can produce any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from kd_hf.data.batch import Batch
from kd_hf.data.geometry import Placing, draw_moves, scaled_moves
from kd_hf.data.held import HeldViews, held_views
from kd_hf.data.mix import Erasing, Mixing, batch_mixing, check_mixing, draw_erasing, is_mixing
from kd_hf.data.order import EpochOrder, Layout, spread_rows
from kd_hf.data.pixels import UnreadableImage, exif_warnings_silenced
from kd_hf.data.source import Source
from kd_hf.data.views import EvalTransform, TrainTransform, ViewPlan, plan_views
from kd_hf.draws import hash_key, hash_keys, python_state_kept
from kd_hf.errors import LocalError, UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import DataConfig
from kd_hf.signals import leave_stopping_to_the_parent

Transform = Callable[[bytes, int], dict[str, Tensor]]
MAX_SKIP = 100  # consecutive unreadable rows after which something else must be wrong


class Rows(Protocol):
    """What the loader asks of a source of any kind."""

    group_sizes: tuple[int, ...]

    def __len__(self) -> int: ...

    def expect(self, lanes: int) -> None:
        """Hear how many sequences of row groups will be read side by side."""

    def describe(self) -> str:
        """What a person should know."""


class Joinable(Protocol):
    """What the loader asks of a batch of any kind."""

    valid: Tensor

    @classmethod
    def join(cls, parts: Any, pin: bool = False) -> Any:
        """One batch of consecutive parts, in page-locked memory if `pin`."""


S = TypeVar("S")  # one image of a batch
B = TypeVar("B", bound=Joinable)


class TrainItems(Dataset[B], Generic[S, B], ABC):
    """The training batches of one rank, by micro step over the whole run, each in `parts` of consecutive images.

    Item ``micro_step * parts + part``. A worker that always builds the same part reads the same lanes of the data.
    """

    def __init__(self, source: Rows, cfg: DataConfig, layout: Layout, seed: int, parts: int = 1) -> None:
        self.source, self.layout, self.seed = source, layout, seed
        repeats = cfg.augment.repeats
        self.order = EpochOrder(source.group_sizes, seed, cfg.shuffle_block, repeats, layout.global_batch, cfg.lanes)
        # at even positions, so that images that are mixed with each other stay together
        self.cuts = [layout.per_device * part // parts // 2 * 2 for part in range(parts)] + [layout.per_device]
        source.expect(-(-self.order.lanes // (layout.world * parts)) + 1)

    @abstractmethod
    def sample(self, row: int, key: int) -> S:
        """One image; raises :class:`UnreadableImage` or OSError for a row that cannot be read."""

    @abstractmethod
    def assemble(self, samples: Sequence[S], epoch: int, start: int, keys: Sequence[int], corrupt: list[int]) -> B:
        """The batch of `samples` with their `keys`, from a position of an epoch on."""

    def __getitem__(self, index: int) -> B:
        """Build item `index`."""
        micro_step, part = divmod(index, len(self.cuts) - 1)
        epoch, start = self.layout.locate(micro_step, self.order.steps_per_epoch)
        start, count = start + self.cuts[part], self.cuts[part + 1] - self.cuts[part]
        rows, repeats = self.order.rows(epoch, start, start + count)
        return self.build(rows, repeats, epoch, start)

    def build(self, rows: np.ndarray, repeats: np.ndarray, epoch: int, start: int) -> B:
        """The batch of `rows`, int64 ``[B]``, and which repeat each is, from a position of an epoch on."""
        corrupt: list[int] = []
        numbers = hash_keys(self.seed, epoch, rows, repeats).tolist()
        with python_state_kept():
            samples = [self.readable(row, key, corrupt) for row, key in zip(rows.tolist(), numbers, strict=True)]
        return self.assemble(samples, epoch, start, numbers, corrupt)

    def readable(self, row: int, key: int, corrupt: list[int]) -> S:
        """The first readable row from `row` on; the others are added to `corrupt`."""
        reason: Exception | None = None
        for candidate in range(row, row + min(MAX_SKIP, len(self.source))):
            candidate %= len(self.source)
            try:
                return self.sample(candidate, key)
            except (UnreadableImage, OSError) as error:
                corrupt.append(candidate)
                reason = error
        raise UserError(
            f"data.path: no readable image in {self.source.describe()} from row {row} on (tried {len(corrupt)});"
            f" the last reason was: {reason}"
        )


class EvalItems(Dataset[B], Generic[S, B], ABC):
    """The evaluation batches of one rank. All ranks have the same number, the last ones padded."""

    def __init__(self, source: Rows, layout: Layout, max_samples: int | None = None) -> None:
        self.source, self.layout = source, layout
        count = len(source) if max_samples is None else max_samples
        rows = spread_rows(source.group_sizes, count)
        self.share = -(-len(rows) // layout.world)  # neighbouring rows, so that ranks read different row groups
        self.rows = rows[layout.rank * self.share : (layout.rank + 1) * self.share]
        source.expect(1)

    @abstractmethod
    def sample(self, row: int, key: int) -> S:
        """One image; see :class:`TrainItems`."""

    @abstractmethod
    def assemble(self, samples: Sequence[S | None], corrupt: list[int]) -> B:
        """The batch of `samples`; None where a place stays empty."""

    def __len__(self) -> int:
        return -(-self.share // self.layout.per_device)

    def __getitem__(self, index: int) -> B:
        """Build batch number `index` of the rank's share."""
        size = self.layout.per_device
        return self.build(self.rows[index * size : (index + 1) * size])

    def build(self, rows: np.ndarray) -> B:
        """The batch of `rows`, int64 ``[≤ B]``."""
        samples: list[S | None] = [None] * self.layout.per_device
        corrupt: list[int] = []
        for position, row in enumerate(rows.tolist()):
            try:
                samples[position] = self.sample(row, hash_key(row))
            except (UnreadableImage, OSError):
                corrupt.append(row)
        return self.assemble(samples, corrupt)


# --- images with labels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """One image of a batch; the defaults are those of a place that stays empty."""

    views: dict[str, Tensor] | None = None
    label: int = -1
    row: int = -1
    key: int = 0


def _assembled(plan: ViewPlan, samples: Sequence[_Sample], **rest: Any) -> Batch:
    """The batch of `samples`; zeros where there is none."""
    views = {}
    for name, spec in plan.views.items():
        empty = torch.zeros(3, spec.image_size, spec.image_size, dtype=torch.uint8)
        # in a worker this stacks them where the main process can see them
        views[name] = default_collate([empty if sample.views is None else sample.views[name] for sample in samples])
    label = torch.tensor([sample.label for sample in samples])
    row = torch.tensor([sample.row for sample in samples])
    key = torch.tensor([sample.key for sample in samples])
    valid = torch.tensor([sample.views is not None for sample in samples])
    return Batch(views, label, row, key, valid, dict(plan.view_of), **rest)


class TrainBatches(TrainItems[_Sample, Batch]):
    """Training batches of images with labels.

    Args:
        source: of the images.
        cfg: the recipe's `data` block.
        plan: of the views.
        layout: of the global batch.
        seed: of the run.
        parts: see :class:`TrainItems`.
        held: where decoded views are taken from, to be moved and flipped on the device.
    """

    source: Source

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        plan: ViewPlan,
        layout: Layout,
        seed: int,
        parts: int = 1,
        held: HeldViews | None = None,
    ) -> None:
        check_mixing(cfg.augment, layout.per_device)
        super().__init__(source, cfg, layout, seed, parts)
        self.augment, self.plan, self.held = cfg.augment, plan, held
        self.transform = TrainTransform(plan, cfg.augment, cfg.decoder)
        # of the epoch asked for last; not state: a pure function, whose cost is that of its calls and not of its rows
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def build(self, rows: np.ndarray, repeats: np.ndarray, epoch: int, start: int) -> Batch:
        """The batch; see :class:`TrainItems`."""
        if self.held is None:
            return super().build(rows, repeats, epoch, start)
        keys, moves = (drawn[repeats, rows] for drawn in self._draw(epoch))
        corrupt: list[int] = []
        shown = rows
        if (unreadable := self.held.unreadable(rows)).any():
            shown = rows.copy()
            for place in np.flatnonzero(unreadable).tolist():
                shown[place] = self.readable(int(rows[place]), int(keys[place]), corrupt).row
        row = torch.from_numpy(shown)
        views, label = self.held.take(row)
        valid = torch.ones(len(rows), dtype=torch.bool)
        batch = Batch(views, label, row, torch.from_numpy(keys), valid, dict(self.plan.view_of), epoch)
        mixing, erasing = self._mixing(epoch, start, len(keys)), self._erasing(keys.tolist())
        return replace(batch, mixing=mixing, erasing=erasing, placing=self._placing(moves), corrupt=corrupt)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys int64 ``[repeats, N]`` and moves int64 ``[repeats, N, 3]`` of all rows in an epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            each, rows = range(self.augment.repeats), np.arange(len(self.source))
            keys = np.stack([hash_keys(self.seed, epoch, rows, repeat) for repeat in each])
            self._drawn = (epoch, keys, np.stack([draw_moves(self.augment, keys[repeat]) for repeat in each]))
        return self._drawn[1:]

    def _placing(self, moves: np.ndarray) -> dict[str, Placing]:
        crop = self.augment.crop
        padding = crop.padding if crop.kind == "pad" else 0
        return {
            name: scaled_moves(moves, padding, self.plan.size, spec.image_size)
            for name, spec in self.plan.views.items()
        }

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`TrainItems`. Without its views where they are held."""
        if self.held is not None:
            self.held.make(row)
            return _Sample(row=row)
        data, label = self.source.read(row)
        return _Sample(self.transform(data, key), label, row, key)

    def assemble(
        self, samples: Sequence[_Sample], epoch: int, start: int, keys: Sequence[int], corrupt: list[int]
    ) -> Batch:
        """The batch with what is mixed and erased in it; see :class:`TrainItems`."""
        mixing, erasing = self._mixing(epoch, start, len(keys)), self._erasing(keys)
        return _assembled(self.plan, samples, epoch=epoch, mixing=mixing, erasing=erasing, corrupt=corrupt)

    def _erasing(self, keys: Sequence[int]) -> tuple[Erasing, ...]:
        if not self.augment.erasing:
            return ()
        boxes = (draw_erasing(self.augment.erasing, self.plan.size, key) for key in keys)
        return tuple(Erasing(position, box) for position, box in enumerate(boxes) if box is not None)

    def _mixing(self, epoch: int, start: int, count: int) -> tuple[Mixing, ...] | None:
        if not is_mixing(self.augment):
            return None
        return batch_mixing(self.augment, self.seed, epoch, start, count, self.layout.global_batch, self.plan.size)


class EvalBatches(EvalItems[_Sample, Batch]):
    """Evaluation batches of images with labels."""

    source: Source

    def __init__(
        self,
        source: Source,
        plan: ViewPlan,
        layout: Layout,
        max_samples: int | None = None,
        held: HeldViews | None = None,
    ) -> None:
        super().__init__(source, layout, max_samples)
        self.plan, self.held = plan, held
        self.transform: Transform = EvalTransform(plan)

    def build(self, rows: np.ndarray) -> Batch:
        """The batch; see :class:`EvalItems`."""
        if self.held is None or len(rows) < self.layout.per_device or (bad := self.held.unreadable(rows)).any():
            return super().build(rows)
        row, key = torch.from_numpy(rows), torch.from_numpy(hash_keys(rows))
        views, label = self.held.take(row)
        return Batch(views, label, row, key, torch.from_numpy(~bad), dict(self.plan.view_of))

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`TrainItems`."""
        if self.held is not None:
            self.held.make(row)
            views, labels = self.held.take(torch.tensor([row]))
            return _Sample({name: view[0] for name, view in views.items()}, int(labels), row, key)
        data, label = self.source.read(row)
        return _Sample(self.transform(data, key), label, row, key)

    def assemble(self, samples: Sequence[_Sample | None], corrupt: list[int]) -> Batch:
        """The batch, with zeros where there is no image; see :class:`EvalItems`."""
        return _assembled(self.plan, [sample or _Sample() for sample in samples], corrupt=corrupt)


# --- loading ------------------------------------------------------------------------------------------------------


class _Guarded(Dataset["B | UserError"], Generic[B]):
    """Hands a :class:`UserError` over as a value: the DataLoader would bury the message of a raised one under a
    worker's traceback."""

    def __init__(self, batches: Dataset[B]) -> None:
        self.batches = batches

    def __getitem__(self, index: int) -> B | UserError:
        try:
            with exif_warnings_silenced():
                return self.batches[index]
        except UserError as error:
            return error


class BatchLoader(Generic[B]):
    """Iterates over whole batches with a DataLoader; a worker's :class:`UserError` is raised as it was.

    Args:
        batches: by item number.
        indices: the items, in order.
        workers: processes that build them; 0 builds them here.
        prefetch_factor: items that each worker is ahead.
        pin_memory: give page-locked tensors.
        parts: consecutive items that make one batch.
        note: on how they are made, for people.
    """

    def __init__(
        self,
        batches: Dataset[B],
        indices: Sequence[int],
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        parts: int = 1,
        note: str = "",
    ) -> None:
        self.batches, self.indices, self.parts, self.note = batches, indices, parts, note
        self.workers, self.prefetch_factor, self.pin_memory = workers, prefetch_factor, pin_memory
        self._dataloader: DataLoader[B | UserError] | None = None

    def _build(self) -> DataLoader[B | UserError]:
        return DataLoader(
            _Guarded(self.batches),
            batch_size=None,
            sampler=self.indices,
            num_workers=self.workers,
            pin_memory=self.pin_memory and self.parts == 1,  # parts are joined in page-locked memory instead
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws a number from the global one
            worker_init_fn=_start_worker,
            persistent_workers=self.workers > 0,
            prefetch_factor=self.prefetch_factor if self.workers else None,
        )

    def __len__(self) -> int:
        return len(self.indices) // self.parts

    def __iter__(self) -> Iterator[B]:
        if self._dataloader is None:
            self._dataloader = self._build()
        parts: list[B] = []
        for item in self._dataloader:
            if isinstance(item, UserError):
                break
            parts.append(item)
            if len(parts) == self.parts:
                yield parts[0].join(parts, self.pin_memory) if self.parts > 1 else item
                parts = []
        else:
            return
        # end the workers now: as part of the cycle exception – traceback – frame they would take 10 s to
        self._dataloader = None
        raise LocalError(str(item))


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(number: int) -> None:
    leave_stopping_to_the_parent()


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
) -> BatchLoader[Batch]:
    """This rank's micro batches of optimiser steps ``start_step … total_steps - 1``, in order.

    The batches do not depend on `workers`, nor on where the run was resumed; the global batch (the union over
    ranks and accumulation) does not depend on how it is divided.

    Raises:
        UserError: a batch larger than the data set, an odd batch with mixing, repeats that do not divide it.
    """
    layout, plan = Layout(per_device, world, rank, accumulation), plan_views(views, training=True)
    held = held_views(source, plan, cfg.augment, cfg.decoder)
    workers = 0 if held else workers
    parts = max(1, min(workers, per_device // 2))
    batches = TrainBatches(source, cfg, plan, layout, seed, parts, held)
    indices = range(start_step * accumulation * parts, total_steps * accumulation * parts)
    note = held.describe() if held else ""
    return BatchLoader(batches, indices, workers, prefetch_factor, pin_memory, parts, note)


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
) -> BatchLoader[Batch]:
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
    plan = plan_views(views)
    held = held_views(source, plan, None, "pil")
    batches = EvalBatches(source, plan, Layout(batch_size, world, rank), max_samples, held)
    return BatchLoader(batches, range(len(batches)), 0 if held else workers, 2, pin_memory)
