"""Which row stands at which position of an epoch: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_hf.data.draws import generator
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
        """Return (epoch, first position in it) of this rank's part of a micro step counted over the whole run."""
        step, micro = divmod(micro_step, self.accumulation)
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        start = step_in_epoch * self.global_batch + (micro * self.world + self.rank) * self.per_device
        return epoch, start


class EpochOrder:
    """The order of all epochs of a run.

    Row groups are permuted by (seed, epoch), `shuffle_block` neighbours form a block, and rows are permuted
    inside a block, so that a reader needs only one block of row groups at a time. With one row group this is
    a plain permutation.

    Args:
        group_sizes: rows of each row group, in file order.
        seed: of the run.
        shuffle_block: row groups per block.
        repeats: how often each image occurs in a global batch (repeated augmentation); the epoch keeps its
            number of positions and so shows ``1 / repeats`` of the images.
        global_batch: images per optimiser step.

    Raises:
        UserError: the global batch is larger than the data set, or not a multiple of `repeats`.
    """

    def __init__(
        self, group_sizes: Sequence[int], seed: int, shuffle_block: int, repeats: int = 1, global_batch: int = 1
    ) -> None:
        self._sizes = np.asarray(group_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.seed, self.shuffle_block, self.repeats, self.global_batch = seed, shuffle_block, repeats, global_batch
        if global_batch % repeats:
            raise UserError(
                f"data.augment.repeats: {repeats} does not divide the global batch of {global_batch} images"
                " (train.per_device_train_batch_size × processes × gradient_accumulation_steps)"
            )
        if len(self) < global_batch:
            raise UserError(
                f"train.per_device_train_batch_size: the global batch of {global_batch} images (over all processes"
                f" and accumulation steps) is larger than the data set of {len(self)} images"
            )
        self._memo: tuple[int, np.ndarray] | None = None  # of the epoch asked for last; not state: a pure function

    def __len__(self) -> int:
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch; the positions after the last whole global batch are not used."""
        return len(self) // self.global_batch

    def permutation(self, epoch: int) -> np.ndarray:
        """All rows in the order of `epoch`, int64 ``[len(self)]``."""
        if self._memo is None or self._memo[0] != epoch:
            self._memo = (epoch, self._permute(epoch))
        return self._memo[1]

    def _permute(self, epoch: int) -> np.ndarray:
        draws = generator(self.seed, "order", epoch)
        groups = draws.permutation(len(self._sizes))
        blocks = [groups[i : i + self.shuffle_block] for i in range(0, len(groups), self.shuffle_block)]
        return np.concatenate([draws.permutation(self._rows_of(block)) for block in blocks])

    def _rows_of(self, groups: np.ndarray) -> np.ndarray:
        sizes = self._sizes[groups]
        offsets = np.cumsum(sizes) - sizes
        return np.arange(sizes.sum()) + np.repeat(self._starts[groups] - offsets, sizes)

    def rows(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows at positions ``start … stop - 1`` of an epoch.

        Returns:
            int64 rows ``[stop - start]`` and, for each, which repeat of the image in its global batch it is.
            A batch holds its images one after the other, then all of them again, so that neighbours differ.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"positions {start}–{stop} are outside an epoch of {len(self)}")
        batch, inside = np.divmod(np.arange(start, stop), self.global_batch)
        distinct = self.global_batch // self.repeats
        repeat, image = np.divmod(inside, distinct)
        return self.permutation(epoch)[batch * distinct + image], repeat


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
