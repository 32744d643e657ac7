"""COCO as its authors give it: a folder of images for each split, and a JSON file of their objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd_hf.data.pixels import IMAGE_SUFFIXES
from kd_hf.data.source import EVAL_NAMES, Split
from kd_hf.detection.data.categories import numbered_names
from kd_hf.detection.data.objects import Objects, make_objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import BoxData, DataConfig

PREFIX, SUFFIX = "instances_", ".json"


class CocoFiles(BoxSource):
    """``annotations/instances_train2017.json`` and ``train2017/*.jpg``, or files by the names that the recipe gives.

    Args:
        folder: that holds both.
        cfg: the recipe's `data` block, of which the names of the splits matter.
        boxes: names of other files.
        split: which of the two splits.

    Raises:
        UserError: a file or folder that is not there, is not COCO's, or does not fit the other one.
    """

    def __init__(self, folder: Path, cfg: DataConfig, boxes: BoxData, split: Split) -> None:
        self.file, self.folder = _places(folder, cfg, boxes, split)
        found = _load(self.file)
        names = {int(category["id"]): str(category["name"]) for category in found["categories"]}
        self.class_names = numbered_names(names, str(self.file))
        images = found["images"]
        self._names = [str(image["file_name"]) for image in images]
        self._ids = np.array([image["id"] for image in images], np.int64)
        self._sizes = np.array([(image["width"], image["height"]) for image in images], np.int64).reshape(-1, 2)
        self._check_folder(subset=boxes.annotations is not None)
        self._sort(found["annotations"], names)
        self.group_sizes = (len(images),)

    def _check_folder(self, subset: bool) -> None:
        """Compare the entries with the files; a file of which the recipe gives the name may list some images only."""
        files = _image_names(self.folder)
        missing = [name for name in self._names if name not in files]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"data.path: {self.folder} lacks {missing[0]}{more}, which {self.file} lists")
        extra = sorted(files - set(self._names))
        if extra and not subset:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(
                f"data.path: {self.file} does not list {extra[0]}{more} of {self.folder}; "
                "to use a part of the images, name the file in data.boxes.annotations"
            )

    def _sort(self, annotations: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
        """Keep the objects as arrays, image after image."""
        place = {int(number): row for row, number in enumerate(self._ids.tolist())}
        for entry in annotations:
            if entry["image_id"] not in place:
                raise UserError(
                    f"data.path: {self.file} has an object (id {entry.get('id')}) in the image {entry['image_id']}, "
                    "which it does not list"
                )
            if entry["category_id"] not in names:
                known = f"{min(names, default=0)} to {max(names, default=0)}"
                raise UserError(
                    f"data.path: {self.file} has an object (id {entry.get('id')}) of the category "
                    f"{entry['category_id']}, which it does not list; it has {len(names)}, numbered {known}"
                )
        rows = np.array([place[entry["image_id"]] for entry in annotations], np.int64)
        order = np.argsort(rows, kind="stable")
        ordered = [annotations[index] for index in order]
        self._ends = np.searchsorted(rows[order], np.arange(len(self._ids)), side="right")
        # "area" is the object's own, of which the size classes of AP are made
        area = [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in ordered]
        self._objects = make_objects(
            [entry["bbox"] for entry in ordered],
            [entry["category_id"] for entry in ordered],
            area,
            [entry.get("iscrowd", 0) for entry in ordered],
        )

    def _of(self, row: int) -> Objects:
        inside = slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))
        width, height = self._sizes[row].tolist()
        return replace(self._objects.only(inside), image_id=int(self._ids[row]), size=(width, height))

    def read(self, row: int) -> tuple[bytes, Objects]:
        """Encoded image and its objects; see :class:`BoxSource`."""
        return (self.folder / self._names[row]).read_bytes(), self._of(row)

    def annotations(self) -> Iterator[Objects]:
        """All objects; see :class:`BoxSource`."""
        return (self._of(row) for row in range(len(self)))

    def describe(self) -> str:
        """Place, split and size."""
        size = f"{len(self)} images, {len(self._objects)} boxes, {self.told_classes()}"
        return f"{self.folder} with {self.file.name} ({size})"


def _places(folder: Path, cfg: DataConfig, boxes: BoxData, split: Split) -> tuple[Path, Path]:
    """The JSON file and the folder of a split."""
    wanted = cfg.train_split if split == "train" else cfg.eval_split
    listed = sorted((folder / "annotations").glob(f"{PREFIX}*{SUFFIX}"))
    present = [path.name.removeprefix(PREFIX).removesuffix(SUFFIX) for path in listed]
    name = _choose(wanted, split, list(boxes.annotations or present), cfg.path)
    file = folder / (boxes.annotations[name] if boxes.annotations else f"annotations/{PREFIX}{name}{SUFFIX}")
    images = folder / (boxes.images or {}).get(name, name)
    if not file.is_file():
        near = nearest(file.name, [path.name for path in file.parent.iterdir()] if file.parent.is_dir() else [])
        raise UserError(f"data.boxes.annotations: there is no file {file}.{near}")
    if not images.is_dir():
        near = nearest(images.name, [path.name for path in folder.iterdir() if path.is_dir()])
        raise UserError(f"data.boxes.images: there is no folder {images} for the images of {file.name}.{near}")
    return file, images


def _choose(wanted: str, split: Split, present: Sequence[str], path: str) -> str:
    """The split that is meant: by its name, with or without a year, or by one of the usual names for evaluation."""
    for name in (wanted, *EVAL_NAMES) if split == "eval" and wanted in EVAL_NAMES else (wanted,):
        found = [other for other in present if other == name] or [p for p in present if p.rstrip("0123456789") == name]
        if len(found) > 1:
            raise UserError(f"data.{split}_split: '{path}' has {' and '.join(found)}; name one of them")
        if found:
            return found[0]
    raise UserError(f"data.{split}_split: '{path}' has no split '{wanted}'.{nearest(wanted, present)}")


def _image_names(folder: Path) -> set[str]:
    """Image files by their path in the folder."""
    found = set()
    for parent, _, names in os.walk(folder):
        inner = os.path.relpath(parent, folder)
        images = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        found |= {name if inner == "." else f"{inner}/{name}" for name in images}
    return found


def _load(file: Path) -> dict[str, Any]:
    """A JSON file of COCO without its outlines, which are most of it."""

    def slim(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)
        return entry

    try:
        found = json.loads(file.read_bytes(), object_hook=slim)
    except ValueError as error:
        raise UserError(f"data.path: {file} is not JSON: {error}") from None
    _check_shape(found, file)
    return dict(found)


NEEDED: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def _check_shape(found: Any, file: Path) -> None:
    for part, keys in NEEDED.items():
        if not isinstance(found, dict) or not isinstance(found.get(part), list):
            raise UserError(f"data.path: {file} is not a file of COCO's: it has no list '{part}'")
        for place, entry in enumerate(found[part]):
            lacking = next((key for key in keys if not isinstance(entry, dict) or key not in entry), None)
            if lacking:
                raise UserError(f"data.path: {file}: entry {place} of '{part}' has no '{lacking}'")
            if part == "annotations" and len(entry["bbox"]) != 4:
                raise UserError(f"data.path: {file}: the box of entry {place} has {len(entry['bbox'])} numbers, not 4")
