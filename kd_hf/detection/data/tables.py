"""Images with boxes from Parquet files, local or on the Hub, and from a ``datasets.Dataset``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_hf.data.classes import plain_names
from kd_hf.data.columns import LABEL_NAMES, find_columns, image_bytes
from kd_hf.data.parquet import ParquetFiles
from kd_hf.data.reading import library_errors
from kd_hf.data.rows import undecoded
from kd_hf.data.source import Split, choose_split
from kd_hf.data.tables import Listing, _list
from kd_hf.detection.data.categories import LARGEST
from kd_hf.detection.data.objects import Objects, make_objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.errors import UserError, nearest
from kd_hf.hub_client import without_retries
from kd_hf.recipe.config import BoxData, DataConfig

if TYPE_CHECKING:
    import pyarrow

BOXES = "bbox"
CATEGORIES = ("category", "category_id", "label", "labels")
IMAGE_ID, SIZE = "image_id", ("width", "height")


@dataclass(frozen=True)
class BoxColumns:
    """Which columns of a table hold what."""

    image: str
    objects: str
    """A struct of lists, or a list of structs, with the box and the class of each object."""
    category: str
    """The name of the class in it."""
    class_names: tuple[str, ...] | None
    """None where classes are only numbers."""
    facts: tuple[str, ...]
    """Further columns that are read: number and size of the image."""
    box_format: str

    @property
    def annotated(self) -> list[str]:
        """All columns but the image."""
        return [self.objects, *self.facts]

    def is_category(self, path: Sequence[str]) -> bool:
        """Whether a leaf of a Parquet file holds the classes."""
        return path[0] == self.objects and self.category in path[1:]

    def check(self, number: int | None, where: str) -> None:
        """Raise :class:`UserError` for a number that is no class."""
        last = LARGEST if self.class_names is None else len(self.class_names) - 1
        if number is None or not 0 <= number <= last:
            raise UserError(f"data.path: {where} has the category {number}; expected 0 to {last}")

    def parse(self, cells: Mapping[str, Any], row: int, where: str) -> Objects:
        """The objects of a row from its cells.

        Raises:
            UserError: a class that is none, or lists of different lengths.
        """
        found = cells[self.objects] or {}
        if isinstance(found, list):
            found = {name: [item[name] for item in found] for name in (found[0] if found else ())}
        classes = found.get(self.category) or []
        for number in classes:
            self.check(number, f"row {row} of {where}")
        size = tuple(int(cells[name]) for name in SIZE) if set(SIZE) <= set(self.facts) else None
        number = int(cells[IMAGE_ID]) if IMAGE_ID in self.facts else row
        try:
            return make_objects(
                found.get(BOXES) or [],
                classes,
                found.get("area"),
                found.get("iscrowd"),
                number,
                (size[0], size[1]) if size else None,
                self.box_format,
            )
        except ValueError as error:
            raise UserError(f"data.path: the objects of row {row} of {where} do not fit together: {error}") from None


def find_box_columns(features: Any, cfg: DataConfig, boxes: BoxData) -> BoxColumns:
    """Find the columns by the types of `features` (``datasets.Features``), or as the recipe says.

    Raises:
        UserError: naming the columns there are, when there is no column of objects, or several.
    """
    from datasets import ClassLabel, Value

    objects, fields = _find_objects(features, cfg)
    category = next((name for name in CATEGORIES if name in fields), None)
    if category is None:
        raise UserError(f"data.label_column: the objects of '{objects}' have no category among {', '.join(fields)}")
    # the door of classification finds the image, given something that it can take for labels
    others = {name: feature for name, feature in features.items() if not isinstance(feature, ClassLabel)}
    plain = cfg.model_copy(update={"label_column": None})
    image = find_columns({**others, LABEL_NAMES[0]: Value("int64")}, plain).image
    kind = getattr(fields[category], "feature", fields[category])
    numbers = [name for name in (IMAGE_ID, *SIZE) if "int" in str(getattr(features.get(name), "dtype", ""))]
    names = tuple(kind.names) if isinstance(kind, ClassLabel) else None
    return BoxColumns(image, objects, category, names, tuple(numbers), boxes.box_format)


def _find_objects(features: Any, cfg: DataConfig) -> tuple[str, Mapping[str, Any]]:
    """The column of objects and its fields."""
    wanted = cfg.label_column
    if wanted is not None and wanted not in features:
        raise UserError(f"data.label_column: there is no column '{wanted}'.{nearest(wanted, features)}")
    held = {name: fields for name, feature in features.items() if BOXES in (fields := _fields(feature))}
    chosen = [name for name in held if wanted in (None, name)]
    if len(chosen) != 1:
        problem = "several columns hold" if chosen else "no column holds" if wanted is None else f"'{wanted}' lacks"
        raise UserError(
            f"data.label_column: {problem} objects, which are structs with '{BOXES}' and a category; "
            f"there are {', '.join(features)}"
        )
    return chosen[0], held[chosen[0]]


def _fields(feature: Any) -> Mapping[str, Any]:
    """The fields of a struct, or of the structs in a list."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, dict) else {}


# --- Parquet ------------------------------------------------------------------------------------------------------


def open_tables(cfg: DataConfig, split: Split, boxes: BoxData) -> BoxSource:
    """Open one split of a Hub data set, or of a folder of Parquet files.

    Files on the Hub are read where they lie with ``cfg.streaming``, and downloaded first without; what is not Parquet
    is prepared by `datasets`.

    Raises:
        UserError: it cannot be found or read.
    """
    with without_retries():
        listing = _list(cfg)
        name = choose_split(cfg, split, list(listing.files or listing.builder.info.splits or {}))
        source = _open_split(listing, name, cfg, boxes)
    source.revision = listing.commit
    return source


def _open_split(listing: Listing, name: str, cfg: DataConfig, boxes: BoxData) -> BoxSource:
    if listing.all_are(".parquet", name):
        parquet = ParquetFiles(_files(listing, name))
        columns = find_box_columns(listing.builder.info.features or parquet.features, cfg, boxes)
        parquet.check([columns.image, columns.objects], columns.objects)
        return ParquetBoxes(parquet, columns, cfg.shuffle_block, listing.where(name))
    if cfg.streaming:
        raise UserError(f"data.streaming: '{cfg.path}' is not stored as Parquet files; set data.streaming=false")
    with library_errors(cfg):
        listing.builder.download_and_prepare()
        return TableBoxes(listing.builder.as_dataset(split=name), cfg, boxes, listing.where(name))


def _files(listing: Listing, split: str) -> Sequence[str]:
    """The files of a split, on this machine unless they are streamed."""
    import datasets

    files = listing.files[split]
    if listing.cfg.streaming or not any("://" in file for file in files):
        return files
    with library_errors(listing.cfg):
        manager = datasets.DownloadManager(dataset_name=listing.builder.dataset_name)
        found: list[str] = manager.download(list(files))
    return found


class ParquetBoxes(BoxSource):
    """Parquet files of which a row group is read when one of its rows is needed.

    Args:
        parquet: the files of one split.
        columns: of them.
        shuffle_block: row groups of a lane that are needed at a time.
        where: place and split, for people.
    """

    def __init__(self, parquet: ParquetFiles, columns: BoxColumns, shuffle_block: int, where: str) -> None:
        self._parquet, self.columns, self._where = parquet, columns, where
        self.group_sizes = parquet.group_sizes
        self._ends = np.cumsum(self.group_sizes)
        self._groups_per_lane = shuffle_block + 2  # a block does not start at a row group
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        largest = self._largest()
        self.class_names = columns.class_names or plain_names(largest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _largest(self) -> int:
        """The largest class, by the files' statistics where they are there; raises for one that is none."""
        found = self._parquet.label_range(self._category_path())
        if found is None:
            return _largest(self.annotations())
        for number in found:
            self.columns.check(number, self._where)
        return found[1]

    def _category_path(self) -> str:
        """What Parquet calls the leaf of the classes, such as ``objects.category.list.element``."""
        schema = self._parquet.footers[0].schema
        paths = (schema.column(leaf).path for leaf in range(len(schema.names)))
        return next(path for path in paths if self.columns.is_category(path.split(".")))

    def _cached(self, group: int) -> pyarrow.Table:
        if group not in self._cache:
            while len(self._cache) >= self.lanes * self._groups_per_lane:
                self._cache.popitem(last=False)
            self._cache[group] = self._parquet.read(group, [self.columns.image, *self.columns.annotated])
        self._cache.move_to_end(group)
        return self._cache[group]

    def read(self, row: int) -> tuple[bytes, Objects]:
        """Encoded image and its objects; see :class:`BoxSource`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        inside = row - int(self._ends[group]) + self.group_sizes[group]
        cells = self._cached(group).slice(inside, 1).to_pylist()[0]
        return image_bytes(cells[self.columns.image]), self.columns.parse(cells, row, self._where)

    def annotations(self) -> Iterator[Objects]:
        """All objects; see :class:`BoxSource`."""
        row = 0
        for group in range(len(self.group_sizes)):
            for cells in self._parquet.read(group, self.columns.annotated).to_pylist():
                yield self.columns.parse(cells, row, self._where)
                row += 1

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images in {len(self.group_sizes)} row groups, {self.told_classes()})"


# --- datasets.Dataset ---------------------------------------------------------------------------------------------


class TableBoxes(BoxSource):
    """A ``datasets.Dataset``: any row at any time.

    Args:
        dataset: one split.
        cfg: the recipe's `data` block.
        boxes: the rest of it.
        where: place and split, for people.

    Raises:
        UserError: a transform, which would be dropped in silence otherwise, or columns that are not clear.
    """

    def __init__(self, dataset: Any, cfg: DataConfig, boxes: BoxData, where: str) -> None:
        if dataset.format["type"] == "custom":
            raise UserError(f"{where}: it has a transform; give dataset.with_format(None)")
        self.columns = find_box_columns(dataset.features, cfg, boxes)
        self.group_sizes, self._where = (len(dataset),), where
        self._images = undecoded(dataset, self.columns.image)
        self._rows = dataset.with_format(None).select_columns(self.columns.annotated)
        self.class_names = self.columns.class_names or plain_names(_largest(self.annotations()))

    def read(self, row: int) -> tuple[bytes, Objects]:
        """Encoded image and its objects; see :class:`BoxSource`."""
        data = image_bytes(self._images[row][self.columns.image])
        return data, self.columns.parse(self._rows[row], row, self._where)

    def annotations(self) -> Iterator[Objects]:
        """All objects; see :class:`BoxSource`."""
        return (self.columns.parse(cells, row, self._where) for row, cells in enumerate(self._rows))

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images, {self.told_classes()})"


def _largest(annotations: Iterator[Objects]) -> int:
    return max((int(objects.classes.max(initial=-1)) for objects in annotations), default=-1)
