"""Where images come from: one interface, and the door to class folders, Parquet and tar files, the Hub, the digits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from kd_hf.config import DataConfig
from kd_hf.errors import UserError, nearest

Split = Literal["train", "eval"]
EVAL_NAMES = ("validation", "val", "valid", "test")  # tried in this order when the configured one is among them
TABLE_PATTERNS = ("*.parquet", "*/*.parquet", "*.tar", "*/*.tar")  # a folder of these is not one of class folders
DIGITS_SEED, DIGITS_SIZE = 0, 32
UNLABELLED = -1
GIVEN_DATA = "given:dataset"  # the path in the record of a run whose data sets were handed over in Python


class Source(ABC):
    """Encoded images and labels by row. Instances travel to worker processes, so they pickle."""

    class_names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    """Rows that are cheap to read together, in order; a set with random access is one group."""
    revision: str | None = None
    """The commit of the Hub repository that the rows are of; None for what does not come from there."""
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

    lanes = 1

    def expect(self, lanes: int) -> None:
        """Hear how many sequences of row groups will be read side by side."""
        self.lanes = lanes

    @abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, int64 ``[len]``, -1 where there is none."""

    @abstractmethod
    def describe(self) -> str:
        """What a person should know: place, split, rows, classes."""


def open_source(cfg: DataConfig, split: Split, seed: int = 0) -> Source:
    """Open one split of the recipe's data.

    Args:
        cfg: the recipe's `data` block.
        split: which of its two splits.
        seed: decides which training images keep their label when `cfg.num_labels` is set.

    Raises:
        UserError: the data, split or columns do not exist, or more labels are asked for than there are.
    """
    return with_labels(_open(cfg, split), cfg, split, seed)


def with_labels(source: Source, cfg: DataConfig, split: Split, seed: int = 0) -> Source:
    """The source with the labels that the recipe's `data` block leaves it; see :func:`open_source`."""
    if len(source) == 0:
        raise UserError(f"data.path: no images in {source.describe()}")
    source.hold = cfg.hold
    if split == "eval" or (cfg.num_labels is None and cfg.unlabelled == "keep"):
        return source
    from kd_hf.data.labels import LabelSubset

    subset = LabelSubset(source, cfg.num_labels, cfg.unlabelled, seed)
    subset.revision, subset.hold = source.revision, cfg.hold
    return subset


def _open(cfg: DataConfig, split: Split) -> Source:
    if cfg.path == GIVEN_DATA:
        raise UserError("data.path: the images of this run were handed over in Python; give them again, or a path")
    if cfg.path.startswith("builtin:"):
        if cfg.path != "builtin:digits":
            raise UserError(f"data.path: unknown built-in data '{cfg.path}'.{nearest(cfg.path, ['builtin:digits'])}")
        return DigitsSource(split)
    from kd_hf.data.folders import FolderSource
    from kd_hf.data.tables import open_files

    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        listed = cfg.data_files or any(any(folder.glob(pattern)) for pattern in TABLE_PATTERNS)
        return open_files(cfg, split) if listed else FolderSource(folder, cfg, split)
    if folder.is_absolute() or cfg.path.startswith((".", "~")) or cfg.path.count("/") > 1:
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{near}")
    return open_files(cfg, split)


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


# --- built-in ----------------------------------------------------------------------------------------------------


class DigitsSource(Source):
    """scikit-learn's 1797 handwritten digits, 8×8 grey, as 32×32 RGB PNGs; 1078 for training, 719 for evaluation."""

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=0.4, stratify=digits.target, random_state=DIGITS_SEED
        )
        rows = np.sort(parts[0 if split == "train" else 1])
        self.split = split
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.group_sizes = (len(rows),)
        self._labels = digits.target[rows].astype(np.int64)
        self._images = digits.images[rows]
        self._encoded: dict[int, bytes] = {}  # most runs of a few steps read few of them

    @staticmethod
    def _encode(image: np.ndarray) -> bytes:
        import io

        from PIL import Image

        grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        buffer = io.BytesIO()
        large = grey.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        large.convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        if row not in self._encoded:
            self._encoded[row] = self._encode(self._images[row])
        return self._encoded[row], int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"builtin:digits ({self.split}, {len(self)} images, {self.num_classes} classes)"
