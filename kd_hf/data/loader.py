"""Batches: every micro step of a run is a pure function of its number, so any process can produce any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from kd_hf.config import DataConfig
from kd_hf.data.batch import Batch
from kd_hf.data.draws import hash_key, python_state_kept
from kd_hf.data.mix import Erasing, Mixing, batch_mixing, check_mixing, draw_erasing, is_mixing
from kd_hf.data.order import EpochOrder, Layout, spread_rows
from kd_hf.data.pixels import UnreadableImage, exif_warnings_silenced
from kd_hf.data.source import Source
from kd_hf.data.views import EvalTransform, TrainTransform, ViewPlan, plan_views
from kd_hf.errors import LocalError, UserError
from kd_hf.models.info import Preprocessing

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
        keys = [
            hash_key(self.seed, epoch, row, repeat) for row, repeat in zip(rows.tolist(), repeats.tolist(), strict=True)
        ]
        corrupt: list[int] = []
        with python_state_kept():
            samples = [self._readable(row, key, corrupt) for row, key in zip(rows.tolist(), keys, strict=True)]
        return self.assemble(samples, epoch, start, keys, corrupt)

    def _readable(self, row: int, key: int, corrupt: list[int]) -> S:
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
        samples: list[S | None] = [None] * size
        corrupt: list[int] = []
        for position, row in enumerate(self.rows[index * size : (index + 1) * size].tolist()):
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
    """Training batches of images with labels."""

    source: Source

    def __init__(
        self, source: Source, cfg: DataConfig, plan: ViewPlan, layout: Layout, seed: int, parts: int = 1
    ) -> None:
        check_mixing(cfg.augment, layout.per_device)
        super().__init__(source, cfg, layout, seed, parts)
        self.augment, self.plan = cfg.augment, plan
        self.transform = TrainTransform(plan, cfg.augment, cfg.decoder)

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`TrainItems`."""
        data, label = self.source.read(row)
        return _Sample(self.transform(data, key), label, row, key)

    def assemble(
        self, samples: Sequence[_Sample], epoch: int, start: int, keys: Sequence[int], corrupt: list[int]
    ) -> Batch:
        """The batch with what is mixed and erased in it; see :class:`TrainItems`."""
        mixing, erasing = self._mixing(epoch, start, len(keys)), self._erasing(keys)
        return _assembled(self.plan, samples, epoch=epoch, mixing=mixing, erasing=erasing, corrupt=corrupt)

    def _erasing(self, keys: Sequence[int]) -> tuple[Erasing, ...]:
        boxes = (draw_erasing(self.augment.erasing, self.plan.size, key) for key in keys)
        return tuple(Erasing(position, box) for position, box in enumerate(boxes) if box is not None)

    def _mixing(self, epoch: int, start: int, count: int) -> tuple[Mixing, ...] | None:
        if not is_mixing(self.augment):
            return None
        return batch_mixing(self.augment, self.seed, epoch, start, count, self.layout.global_batch, self.plan.size)


class EvalBatches(EvalItems[_Sample, Batch]):
    """Evaluation batches of images with labels."""

    source: Source

    def __init__(self, source: Source, plan: ViewPlan, layout: Layout, max_samples: int | None = None) -> None:
        super().__init__(source, layout, max_samples)
        self.plan = plan
        self.transform: Transform = EvalTransform(plan)

    def sample(self, row: int, key: int) -> _Sample:
        """One image; see :class:`TrainItems`."""
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
    """

    def __init__(
        self,
        batches: Dataset[B],
        indices: Sequence[int],
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
        parts: int = 1,
    ) -> None:
        self.batches, self.indices, self.parts = batches, indices, parts
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
    batches = EvalBatches(source, plan_views(views), Layout(batch_size, world, rank), max_samples)
    return BatchLoader(batches, range(len(batches)), workers, 2, pin_memory)
