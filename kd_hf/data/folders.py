"""Class folders: images in ``split/class/…``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kd_hf.data.source import Source, Split, choose_split
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class FolderSource(Source):
    """Images in ``folder/split/class/…``; the sorted class names are the labels."""

    def __init__(self, folder: Path, cfg: DataConfig, split: Split) -> None:
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.folder = folder / choose_split(cfg, split, present)
        self.class_names = _class_folders(self.folder)
        self._check_agreement(cfg, split, present)
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = sorted(_image_files(self.folder / name))
            files += found
            labels += [label] * len(found)
        self._files, self._labels = files, np.asarray(labels, dtype=np.int64)
        self.group_sizes = (len(files),)

    def _check_agreement(self, cfg: DataConfig, split: Split, present: Sequence[str]) -> None:
        other: Split = "eval" if split == "train" else "train"
        try:
            folder = self.folder.parent / choose_split(cfg, other, present)
            odd = sorted(set(self.class_names) ^ set(_class_folders(folder)))
        except UserError:
            return  # the other split need not be in order until somebody opens it
        if odd:
            raise UserError(
                f"data.path: '{self.folder}' and '{folder}' have different classes; only one of them has "
                + ", ".join(f"'{name}'" for name in odd[:5])
                + (", …" if len(odd) > 5 else "")
            )

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        return Path(self._files[row]).read_bytes(), int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self.folder} ({len(self)} images, {self.num_classes} classes)"


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise UserError(f"data.path: '{folder}' has no class folders; expected {folder}/<class>/<image>.jpg")
    return names


def _image_files(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (os.path.join(parent, name) for name in names if name.lower().endswith(IMAGE_SUFFIXES))
