"""Where images come from: the interface; :mod:`kd_hf.data.opening` is the door."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kd_hf.data.fingerprint import samples_hash
from kd_hf.errors import UserError, nearest
from kd_hf.files import digest
from kd_hf.recipe.config import DataConfig

Split = Literal["train", "eval"]
EVAL_NAMES = ("validation", "val", "valid", "test")  # tried in this order when the configured one is among them
TABLE_PATTERNS = ("*.parquet", "*/*.parquet", "*.tar", "*/*.tar")  # a folder of these is not one of class folders
UNLABELLED = -1
GIVEN_DATA = "given:dataset"  # the path in the record of a run whose data sets were handed over in Python


class Source(ABC):
    """Encoded images and labels by row. Instances travel to worker processes, so they pickle."""

    class_names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    """Rows that are cheap to read together, in order; a set with random access is one group."""
    revision: str | None = None
    """The commit of the Hub repository that the rows are of; None for what does not come from there."""
    note: str = ""
    """What reading left out or changed, counted, in one line; empty where nothing was."""
    hold: bool | Literal["auto"] = "auto"
    """Whether decoded images are held; see `data.hold`."""

    def __len__(self) -> int:
        return sum(self.group_sizes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label (-1: none). Raises OSError for a row that cannot be read."""

    def place(self, row: int) -> str:
        """Where a row comes from, for people: a file where there is one."""
        return f"row {row}"

    lanes = 1

    def expect(self, lanes: int) -> None:
        """Hear how many sequences of row groups will be read side by side."""
        self.lanes = lanes

    @abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, int64 ``[len]``, -1 where there is none."""

    def fingerprint(self) -> str:
        """A hash of labels, in order, and of some images; of the commit, where that says it all."""
        if self.revision is not None:
            return self.revision
        return digest(np.ascontiguousarray(self.labels()).tobytes(), samples_hash(self).encode())

    @abstractmethod
    def describe(self) -> str:
        """What a person should know: place, split, rows, classes."""


def choose_split(cfg: DataConfig, split: Split, present: Sequence[str]) -> str:
    """Return which of the splits `present` is meant; the usual names of an evaluation split stand in for each other.

    Raises:
        UserError: it is not there.
    """
    wanted = cfg.train_split if split == "train" else cfg.eval_split
    candidates = (wanted, *EVAL_NAMES) if split == "eval" and wanted in EVAL_NAMES else (wanted,)
    for name in candidates:
        if name in present:
            return name
    raise UserError(f"data.{split}_split: '{cfg.path}' has no split '{wanted}'.{nearest(wanted, present)}")
