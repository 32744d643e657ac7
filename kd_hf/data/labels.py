"""Training with few labels: which images keep theirs, and further images that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd_hf.data.folders import image_files, text_of
from kd_hf.data.notes import Notes
from kd_hf.data.source import UNLABELLED, Source
from kd_hf.draws import generator
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import DataConfig


class LabelSubset(Source):
    """A source of which only some labels are kept, evenly over the classes; the other rows have none, or are left out.

    Args:
        source: all rows.
        num_labels: how many labels are kept in total; None keeps all.
        drop: leave out the rows without a label.
        seed: of the choice.

    Raises:
        UserError: there are fewer labelled rows than `num_labels`.
    """

    def __init__(self, source: Source, num_labels: int | None, drop: bool, seed: int) -> None:
        self.source, self.note = source, source.note
        self.class_names = source.class_names
        labels = source.labels().copy()
        if num_labels is not None:
            kept = choose_labelled(labels, num_labels, seed)
            labels[~kept] = UNLABELLED
        used = labels >= 0 if drop else np.ones(len(labels), dtype=bool)
        groups = np.repeat(np.arange(len(source.group_sizes)), source.group_sizes)
        sizes = np.bincount(groups[used], minlength=len(source.group_sizes))
        self.group_sizes = tuple(int(size) for size in sizes if size)
        self._rows = np.flatnonzero(used)
        self._labels = labels[used]

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        return self.source.read(int(self._rows[row]))[0], int(self._labels[row])

    def place(self, row: int) -> str:
        """Where the row comes from; see :class:`Source`."""
        return self.source.place(int(self._rows[row]))

    def expect(self, lanes: int) -> None:
        """Pass it on."""
        self.source.expect(lanes)

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self.source.describe()}, of which {len(self)} are used and {int((self._labels >= 0).sum())} labelled"


def choose_labelled(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` labelled rows, as evenly over the classes as their sizes allow.

    Args:
        labels: int64 ``[N]``, -1 where there is none.
        count: how many.
        seed: decides the rows, and which classes get one more when `count` does not divide.

    Returns:
        bool ``[N]``.
    """
    known = int((labels >= 0).sum())
    if count > known:
        raise UserError(f"data.num_labels: {count} labels are asked for, but the training split has only {known}")
    draws = generator(seed, "labels")
    shuffled = draws.permutation(np.flatnonzero(labels >= 0))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    # the first row of every class, then the second of every class, …
    rank = np.arange(len(by_class)) - np.repeat(starts, sizes)
    turn = np.repeat(draws.permutation(len(classes)), sizes)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_class[np.lexsort((turn, rank))[:count]]] = True
    return chosen


class WithUnlabelled(Source):
    """A source of training images, and behind it the images of a folder, which have no label.

    Args:
        source: the first rows.
        folder: whose images, at any depth, are the others.

    Raises:
        UserError: there is no image in the folder.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        notes = Notes()
        self._files = sorted(image_files(folder, notes))
        if not self._files:
            raise UserError(f"data.unlabelled: no images in {text_of(folder)}" + (f"; {notes}" if str(notes) else ""))
        self.source, self.folder, self.class_names = source, folder, source.class_names
        self.group_sizes = (*source.group_sizes, len(self._files))
        self.note = "; ".join(filter(None, (source.note, str(notes))))

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        beyond = row - len(self.source)
        return self.source.read(row) if beyond < 0 else (Path(self._files[beyond]).read_bytes(), UNLABELLED)

    def place(self, row: int) -> str:
        """Where the row comes from; see :class:`Source`."""
        beyond = row - len(self.source)
        return self.source.place(row) if beyond < 0 else text_of(self._files[beyond])

    def expect(self, lanes: int) -> None:
        """Pass it on."""
        self.source.expect(lanes)

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return np.concatenate([self.source.labels(), np.full(len(self._files), UNLABELLED, np.int64)])

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self.source.describe()} and {len(self._files)} unlabelled ones of {text_of(self.folder)}"


def unlabelled_folder(cfg: DataConfig) -> Path | None:
    """The folder that `data.unlabelled` names, as `data.path` is named or inside it; None for `keep` and `drop`.

    Raises:
        UserError: there is none.
    """
    if cfg.unlabelled in ("keep", "drop"):
        return None
    named = Path(cfg.unlabelled).expanduser()
    folders = (named, Path(cfg.path).expanduser() / named)
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        near = nearest(cfg.unlabelled, ["keep", "drop"])
        raise UserError(f"data.unlabelled: expected keep, drop or a folder (there is no '{cfg.unlabelled}').{near}")
    return found
