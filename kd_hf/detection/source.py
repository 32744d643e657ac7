"""Where images with boxes come from: one interface, and the door to COCO's files, Parquet, the Hub and data sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_hf.config import BoxData, DataConfig
from kd_hf.data.source import GIVEN_DATA, TABLE_PATTERNS, Split
from kd_hf.detection.categories import UNUSED, category_ids
from kd_hf.detection.checks import check_data
from kd_hf.detection.objects import Objects, trainable
from kd_hf.errors import UserError, nearest

SEEN = 200  # images whose boxes are looked at before a run
OUTSIDE = 2.0  # pixels by which a box may leave its image
TOLERATED = 0.25  # part of the boxes that may leave it further, or end before they start


class BoxSource(ABC):
    """Encoded images and their objects by row. Instances travel to worker processes, so they pickle.

    The class of an object is the number that is stored: official numbers of COCO stay as they are (1 to 90, for
    networks with 91 outputs), and so do those that count from 0 without gaps.
    """

    class_names: tuple[str, ...]
    """By number; :data:`kd_hf.detection.categories.UNUSED` for a number that is no class."""
    group_sizes: tuple[int, ...]
    """Rows that are cheap to read together, in order; a set with random access is one group."""
    revision: str | None = None
    """Commit of the Hub's repository that it was read from."""

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

    lanes = 1

    def expect(self, lanes: int) -> None:
        """Hear how many sequences of row groups will be read side by side."""
        self.lanes = lanes

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
        self.source, self.class_names = source, source.class_names
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

    def expect(self, lanes: int) -> None:
        """Pass it on."""
        self.source.expect(lanes)

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self.source.describe()}, of which {len(self)} with objects are used"


def open_boxes(
    cfg: DataConfig, split: Split, boxes: BoxData | None = None, classes: Sequence[str] | None = None
) -> BoxSource:
    """Open one split of a recipe's images with boxes.

    A folder with COCO's JSON files, one with Parquet files, or a data set of the Hub.

    Args:
        cfg: the recipe's `data` block; `label_column` is the column of the objects.
        split: which of its two splits.
        boxes: the rest of what the recipe says.
        classes: of the training set, which an evaluation set must have.

    Raises:
        UserError: the data, split or columns do not exist, files do not fit together, or the classes are other ones.
    """
    check_data(cfg)
    boxes = boxes or BoxData()
    return checked(_open(cfg, split, boxes), split, boxes, classes)


def open_given(
    dataset: Any,
    split: Split,
    boxes: BoxData | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
) -> BoxSource:
    """A data set handed over in Python as a source: a ``datasets.Dataset`` with a column of objects.

    Raises:
        UserError: something else was given, the columns are not clear, or the classes are other ones.
    """
    from datasets import Dataset

    from kd_hf.detection.tables import TableBoxes

    name = f"{split}_dataset"
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise UserError(f"{name}: a {kind} has no columns of images and objects; give a datasets.Dataset")
    boxes = boxes or BoxData()
    cfg = DataConfig(path=GIVEN_DATA, image_column=image_column, label_column=label_column)
    return checked(TableBoxes(dataset, cfg, boxes, name), split, boxes, classes)


def checked(source: BoxSource, split: Split, boxes: BoxData, classes: Sequence[str] | None) -> BoxSource:
    """The source with what the options leave of it; see :func:`open_boxes` for the errors."""
    if len(source) == 0:
        raise UserError(f"data.path: no images in {source.describe()}")
    source.class_names = _agreed(source, classes)
    _check_format(source)
    if split == "eval" or boxes.empty == "keep":
        return source
    kept = WithoutEmpty(source)
    kept.revision = source.revision
    if len(kept) == 0:
        raise UserError(f"data.boxes.empty: no image with an object in {source.describe()}")
    return kept


def _agreed(source: BoxSource, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The classes, which must be those of the training set; numbers without names may stop earlier."""
    own = source.class_names
    if classes is None or own == tuple(classes):
        return own
    if len(own) < len(classes) and all(name in (str(number), UNUSED) for number, name in enumerate(own)):
        return tuple(classes)
    differ = next((n for n, (a, b) in enumerate(zip(own, classes, strict=False)) if a != b), None)
    ours, theirs = (f"{len(names)} numbers" if differ is None else f"'{names[differ]}'" for names in (own, classes))
    which = "" if differ is None else f" for class {differ}"
    raise UserError(
        f"data.path: {source.describe()} has {ours}{which}, the training set {theirs}; their classes have to agree"
    )


def _check_format(source: BoxSource) -> None:
    """Refuse boxes of another format than is said, which shows in where they lie."""
    total = odd = 0
    for _, objects in zip(range(SEEN), source.annotations(), strict=False):
        if objects.size is not None:
            total += len(objects)
            starts, ends = objects.boxes[:, :2], objects.boxes[:, 2:]
            odd += int(((ends > np.asarray(objects.size) + OUTSIDE) | (ends < starts)).any(1).sum())
    if odd > TOLERATED * total:
        raise UserError(
            f"data.boxes.box_format: {odd} of the first {total} boxes in {source.describe()} do not lie in their "
            "images; xywh means left, top, width and height, xyxy left, top, right and bottom"
        )


def _open(cfg: DataConfig, split: Split, boxes: BoxData) -> BoxSource:
    from kd_hf.detection.coco_files import CocoFiles
    from kd_hf.detection.tables import open_tables

    if cfg.path == GIVEN_DATA:
        raise UserError("data.path: the images of this run were handed over in Python; give them again, or a path")
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or cfg.path.startswith((".", "~")) or cfg.path.count("/") > 1:
            near = nearest(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
            raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{near}")
        return open_tables(cfg, split, boxes)
    listed = cfg.data_files or any(any(folder.glob(pattern)) for pattern in TABLE_PATTERNS)
    if boxes.annotations or (not listed and (folder / "annotations").is_dir()):
        return CocoFiles(folder, cfg, boxes, split)
    if not listed:
        raise UserError(
            f"data.path: '{cfg.path}' holds neither Parquet files nor COCO's annotations/instances_<split>.json"
        )
    return open_tables(cfg, split, boxes)
