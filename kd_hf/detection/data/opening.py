"""The door to images with boxes: COCO's files, Parquet, the Hub, and data sets of Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_hf.data.source import GIVEN_DATA, TABLE_PATTERNS, Split
from kd_hf.detection.data.categories import UNUSED
from kd_hf.detection.data.checks import check_data
from kd_hf.detection.data.source import WithoutEmpty
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import BoxData, DataConfig

if TYPE_CHECKING:
    from kd_hf.detection.data.source import BoxSource

SEEN = 200  # images whose boxes are looked at before a run
OUTSIDE = 2.0  # pixels by which a box may leave its image
TOLERATED = 0.25  # part of the boxes that may leave it further, or end before they start


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

    from kd_hf.detection.data.tables import TableBoxes

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
    from kd_hf.detection.data.coco_files import CocoFiles
    from kd_hf.detection.data.tables import open_tables

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
