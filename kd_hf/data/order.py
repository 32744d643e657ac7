"""Which row stands at which position of an epoch: pure functions of (seed, epoch, position)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kd_hf.draws import generator
from kd_hf.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How the positions of a global batch are dealt to ranks and micro steps; counts of images and processes."""

    per_device: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1

    @property
    def global_batch(self) -> int:
        """Images per optimiser step, over all ranks and micro steps."""
        return self.per_device * self.world * self.accumulation

    def locate(self, micro_step: int, steps_per_epoch: int) -> tuple[int, int]:
        """Return (epoch, first position in it) of this rank's part of a micro step counted over the whole run.

        A rank's micro steps are neighbours in the global batch, so that it stays in its own lanes.
        """
        step, micro = divmod(micro_step, self.accumulation)
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        start = step_in_epoch * self.global_batch + (self.rank * self.accumulation + micro) * self.per_device
        return epoch, start


class EpochOrder:
    """The order of all epochs of a run.

    Row groups are permuted by (seed, epoch), laid end to end and cut into lanes. Every lane gives the same number of
    images to each global batch, at fixed places of it; inside a lane, rows are permuted within blocks of about
    `shuffle_block` row groups. So whoever reads a part of the batch needs one block of its own lanes at a time, and the
    batches do not depend on who that is. With one row group this is a plain permutation.

    Args:
        group_sizes: rows of each row group, in file order.
        seed: of the run.
        shuffle_block: row groups per block.
        repeats: how often each image occurs in a global batch (repeated augmentation), the last ones once less where
            it does not divide the batch; the epoch keeps its positions and so shows ``1 / repeats`` of the images.
        global_batch: images per optimiser step.
        lanes: at most so many; never more than a global batch has images.

    Raises:
        UserError: the global batch is larger than the data set.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        seed: int,
        shuffle_block: int,
        repeats: int = 1,
        global_batch: int = 1,
        lanes: int = 1,
    ) -> None:
        self._sizes = np.asarray(group_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.seed, self.global_batch = seed, global_batch
        if len(self) < global_batch:
            raise UserError(
                f"train.per_device_train_batch_size: the global batch of {global_batch} images (over all processes"
                f" and accumulation steps) is larger than the data set of {len(self)} images"
            )
        self.distinct = -(-global_batch // repeats)
        self.lanes = min(self.distinct, lanes) if len(self._sizes) > 1 else 1
        # lane l gives the images from cuts[l] to cuts[l + 1] of every global batch
        self._cuts = np.arange(self.lanes + 1) * self.distinct // self.lanes
        self._block = max(1, math.ceil(shuffle_block * len(self) / len(self._sizes)))  # in rows
        self._memo: tuple[int, np.ndarray] | None = None  # of the epoch asked for last; not state: a pure function

    def __len__(self) -> int:
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; the positions after the last whole global batch are not used."""
        return len(self) // self.global_batch

    @property
    def lane_starts(self) -> np.ndarray:
        """Where each lane begins in :meth:`permutation`, and its end; int64 ``[lanes + 1]``."""
        return self._cuts * (len(self) // self.distinct)

    def permutation(self, epoch: int) -> np.ndarray:
        """Rows of `epoch`, lane after lane, each in the order in which it gives them."""
        if self._memo is None or self._memo[0] != epoch:
            self._memo = (epoch, self._permute(epoch))
        return self._memo[1]

    def _permute(self, epoch: int) -> np.ndarray:
        draws = generator(self.seed, "order", epoch)
        rows = self._rows_of(draws.permutation(len(self._sizes)))
        # the rows left over after the last whole batch belong to the last lane, so that others take their turn
        ends = [*self.lane_starts[:-1].tolist(), len(rows)]
        for lane, end in pairwise(ends):
            for start in range(lane, end, self._block):
                draws.shuffle(rows[start : min(end, start + self._block)])
        return rows

    def _rows_of(self, groups: np.ndarray) -> np.ndarray:
        sizes = self._sizes[groups]
        offsets = np.cumsum(sizes) - sizes
        return np.arange(sizes.sum()) + np.repeat(self._starts[groups] - offsets, sizes)

    def rows(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows at positions ``start … stop - 1`` of an epoch's whole global batches.

        Returns:
            int64 rows ``[stop - start]`` and, for each, which repeat of the image in its global batch it is.
            A batch holds its images one after the other, then all of them again, so that neighbours differ.
        """
        if not 0 <= start <= stop <= self.steps_per_epoch * self.global_batch:
            raise ValueError(f"positions {start}–{stop} are outside an epoch of {self.steps_per_epoch} global batches")
        batch, inside = np.divmod(np.arange(start, stop), self.global_batch)
        repeat, image = np.divmod(inside, self.distinct)
        lane = np.searchsorted(self._cuts, image, side="right") - 1
        first = self._cuts[lane]
        place = self.lane_starts[lane] + batch * (self._cuts[lane + 1] - first) + image - first
        return self.permutation(epoch)[place], repeat


def spread_rows(group_sizes: Sequence[int], count: int) -> np.ndarray:
    """`count` rows that stand for the whole set: evenly spaced, from at most 16 row groups where these suffice."""
    sizes = np.asarray(group_sizes, dtype=np.int64)
    count = min(count, int(sizes.sum()))
    starts = np.cumsum(sizes) - sizes
    for wanted in range(min(16, len(sizes)), len(sizes) + 1):
        groups = np.arange(wanted) * len(sizes) // wanted
        if sizes[groups].sum() >= count:
            break
    rows = np.concatenate([starts[g] + np.arange(sizes[g]) for g in groups])
    return rows[np.arange(count) * len(rows) // count]
