"""Class folders: images in ``split/class/…``."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kd_hf.data.notes import Notes
from kd_hf.data.pixels import IMAGE_SUFFIXES
from kd_hf.data.source import UNLABELLED, Source, Split, choose_split
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig

UNLABELLED_FOLDERS = ("_unlabelled", "_unlabeled")  # of the training split: images that are in no class folder
ARCHIVE_FOLDER = "__MACOSX"  # what macOS adds to zip files beside the images themselves
HIDDEN = f"names that begin with a dot or are {ARCHIVE_FOLDER}, left out"


class FolderSource(Source):
    """Images in ``folder/split/class/…``; the sorted class names are the labels.

    Images in ``folder/train/_unlabelled/`` have no label.
    """

    def __init__(self, folder: Path, cfg: DataConfig, split: Split) -> None:
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_data(entry.name))
        self.folder = folder / choose_split(cfg, split, present)
        notes = Notes()
        classes = _class_folders(self.folder, notes)
        self.class_names = tuple(classes)
        self._check_agreement(cfg, split, present)
        files: list[str] = []
        labels: list[int] = []
        for label, (name, path) in enumerate(classes.items()):
            images = sorted(image_files(path, notes))
            files += images
            labels += [label] * len(images)
            if not images:
                notes.add("class folders without an image", name)
        for name in UNLABELLED_FOLDERS:
            images = sorted(image_files(self.folder / name, notes)) if (self.folder / name).is_dir() else []
            if split == "eval":
                notes.add("unlabelled images, left out of an evaluation", "".join(images[:1]), len(images))
                continue
            files += images
            labels += [UNLABELLED] * len(images)
        self._files, self._labels, self.note = files, np.asarray(labels, dtype=np.int64), str(notes)
        self.group_sizes = (len(files),)

    def _check_agreement(self, cfg: DataConfig, split: Split, present: Sequence[str]) -> None:
        other: Split = "eval" if split == "train" else "train"
        try:
            folder = self.folder.parent / choose_split(cfg, other, present)
            odd = sorted(set(self.class_names) ^ set(_class_folders(folder, Notes())))
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

    def place(self, row: int) -> str:
        """The file; see :class:`Source`."""
        return text_of(self._files[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        bare = int((self._labels == UNLABELLED).sum())
        more = f", {bare} of them unlabelled" if bare else ""
        return f"{text_of(self.folder)} ({len(self)} images{more}, {self.num_classes} classes)"


def is_data(name: str) -> bool:
    """Whether a file or folder of this name is the user's; macOS, notebooks and version control add others."""
    return not name.startswith(".") and name != ARCHIVE_FOLDER


def text_of(path: str | Path) -> str:
    """A path or name of the file system as text: UTF-8, else Latin-1; composed, as most systems write it."""
    name = os.fsencode(path)
    try:
        return unicodedata.normalize("NFC", name.decode())
    except UnicodeDecodeError:
        return name.decode("latin-1")


def _class_folders(folder: Path, notes: Notes) -> Mapping[str, Path]:
    """Folders by the name of their class, sorted; what lies beside them is counted."""
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = text_of(entry.name)
        if not is_data(entry.name):
            notes.add(HIDDEN, name)
        elif not entry.is_dir():
            notes.add("files beside the class folders, left out", name)
        elif name not in UNLABELLED_FOLDERS:
            if name in found:
                raise UserError(f"data.path: '{text_of(folder)}' has two class folders called '{name}'; rename one")
            if name != entry.name:
                notes.add("class names rewritten in composed UTF-8", name)
            found[name] = folder / entry.name
    if not found:
        raise UserError(f"data.path: '{text_of(folder)}' has no class folders; expected {folder}/<class>/<image>.jpg")
    return dict(sorted(found.items()))


def image_files(folder: Path, notes: Notes) -> Iterator[str]:
    """Images at any depth; links to folders are followed, each folder is entered once.

    Raises:
        UserError: a folder that cannot be listed.
    """
    entered = {_identity(above) for above in folder.resolve().parents}

    def is_new(parent: str, name: str) -> bool:
        identity = _identity(os.path.join(parent, name))
        first = identity not in entered
        entered.add(identity)
        return first

    for parent, inner, names in os.walk(folder, onerror=_unlistable, followlinks=True):
        hidden = [name for name in (*inner, *names) if not is_data(name)]
        notes.add(HIDDEN, text_of(hidden[0]) if hidden else "", len(hidden))
        inner[:] = [name for name in sorted(inner) if is_data(name) and is_new(parent, name)]
        for name in filter(is_data, names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.join(parent, name)
            else:
                notes.add("files that are no images by their name, left out", text_of(name))


def _identity(folder: str | Path) -> tuple[int, int]:
    facts = os.stat(folder)
    return facts.st_dev, facts.st_ino


def _unlistable(error: OSError) -> None:
    raise UserError(f"data.path: cannot list the folder '{text_of(error.filename)}': {error.strerror}") from error
