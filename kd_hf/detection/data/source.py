"""Where images with boxes come from: the interface; :mod:`kd_hf.detection.data.opening` is the door."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kd_hf.data.fingerprint import samples_hash
from kd_hf.detection.data.categories import category_ids
from kd_hf.detection.data.objects import Objects, trainable
from kd_hf.files import digest


class BoxSource(ABC):
    """Encoded images and their objects by row. Instances travel to worker processes, so they pickle.

    The class of an object is the number that is stored: official numbers of COCO stay as they are (1 to 90, for
    networks with 91 outputs), and so do those that count from 0 without gaps.
    """

    class_names: tuple[str, ...]
    """By number; :data:`kd_hf.detection.data.categories.UNUSED` for a number that is no class."""
    group_sizes: tuple[int, ...]
    """Rows that are cheap to read together, in order; a set with random access is one group."""
    revision: str | None = None
    """Commit of the Hub's repository that it was read from."""
    note: str = ""
    """What reading left out or changed, counted, in one line; empty where nothing was."""

    def __len__(self) -> int:
        return sum(self.group_sizes)

    @property
    def num_classes(self) -> int:
        """Outputs of a network for this data: one for each number up to the largest."""
        return len(self.class_names)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The numbers that are classes."""
        return category_ids(self.class_names)

    @abstractmethod
    def read(self, row: int) -> tuple[bytes, Objects]:
        """Encoded image and its objects. Raises OSError for a row that cannot be read."""

    @abstractmethod
    def annotations(self) -> Iterator[Objects]:
        """The objects of all rows, in order, without their images."""

    def place(self, row: int) -> str:
        """Where a row comes from, for people: a file where there is one."""
        return f"row {row}"

    lanes = 1

    def expect(self, lanes: int) -> None:
        """Hear how many sequences of row groups will be read side by side."""
        self.lanes = lanes

    def fingerprint(self) -> str:
        """A hash of all objects, in order, and of some images; of the commit, where that says it all."""
        if self.revision is not None:
            return self.revision
        known = (part for objects in self.annotations() for part in (objects.boxes, objects.classes, objects.iscrowd))
        return digest(*(np.ascontiguousarray(part).tobytes() for part in known), samples_hash(self).encode())

    @abstractmethod
    def describe(self) -> str:
        """What a person should know: place, split, rows, classes and their numbers."""

    def told_classes(self) -> str:
        """The number of classes and how they are numbered, for people."""
        used = self.category_ids
        return f"{len(used)} classes, numbered {used[0]} to {used[-1]}" if used else "no classes"


@dataclass(frozen=True)
class Counts:
    """What is in a set."""

    images: int
    boxes: int
    crowds: int
    removed: int
    """Boxes that are no boxes; known where the annotations tell the images' sizes."""
    empty: int
    """Images without an object that training learns from."""


def count_objects(source: BoxSource) -> Counts:
    """Count everything; reads all annotations."""
    images = boxes = crowds = removed = empty = 0
    for objects in source.annotations():
        kept, dropped = trainable(objects, objects.size or (2**31, 2**31))
        images, boxes, crowds = images + 1, boxes + len(objects), crowds + int(objects.iscrowd.sum())
        removed, empty = removed + dropped, empty + (len(kept) == 0)
    return Counts(images, boxes, crowds, removed, empty)


class WithoutEmpty(BoxSource):
    """The rows of a source that have objects to learn from."""

    def __init__(self, source: BoxSource) -> None:
        self.source, self.class_names, self.note = source, source.class_names, source.note
        used = np.array([bool(trainable(o, o.size or (2**31, 2**31))[0]) for o in source.annotations()], bool)
        groups = np.repeat(np.arange(len(source.group_sizes)), source.group_sizes)
        sizes = np.bincount(groups[used], minlength=len(source.group_sizes))
        self.group_sizes = tuple(int(size) for size in sizes if size)
        self._rows = np.flatnonzero(used)

    def read(self, row: int) -> tuple[bytes, Objects]:
        """Encoded image and its objects; see :class:`BoxSource`."""
        return self.source.read(int(self._rows[row]))

    def annotations(self) -> Iterator[Objects]:
        """All objects; see :class:`BoxSource`."""
        used = set(self._rows.tolist())
        return (objects for row, objects in enumerate(self.source.annotations()) if row in used)

    def place(self, row: int) -> str:
        """Where the row comes from; see :class:`BoxSource`."""
        return self.source.place(int(self._rows[row]))

    def expect(self, lanes: int) -> None:
        """Pass it on."""
        self.source.expect(lanes)

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self.source.describe()}, of which {len(self)} with objects are used"
