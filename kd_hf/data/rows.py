"""Data sets handed over in Python: a ``datasets.Dataset``, or anything else whose rows can be asked for by number."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd_hf.data.classes import Numbered, Written, number_column, number_labels
from kd_hf.data.columns import LABEL_NAMES, find_columns, image_bytes
from kd_hf.data.pixels import DEEP
from kd_hf.data.source import GIVEN_DATA, UNLABELLED, Source, Split
from kd_hf.errors import UserError
from kd_hf.files import digest
from kd_hf.recipe.config import DataConfig

_EXPECTED = "expected a PIL image, encoded bytes or a path"


class RowSource(Source):
    """Rows of encoded images at any time, and their labels as an array.

    Args:
        rows: of mappings, such as a ``datasets.Dataset``; see :func:`undecoded`.
        image: the column of the images.
        labels: of all rows, and the classes.
        where: place and split, for people.
        group_sizes: rows that lie together; by default all of them.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        labels: Numbered,
        where: str,
        group_sizes: Sequence[int] = (),
    ) -> None:
        self.class_names, self.note = labels.names, labels.note
        self.group_sizes = tuple(group_sizes) or (len(labels.numbers),)
        self._rows, self._image, self._labels, self._where = rows, image, labels.numbers, where

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        return image_bytes(self._rows[row][self._image]), int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images, {self.num_classes} classes)"


class ItemSource(Source):
    """Any object with ``__len__`` and ``__getitem__`` that gives mappings or pairs; an item is made when it is read.

    Labels are known without making the items where the object has torchvision's ``targets``. Otherwise
    :meth:`labels` goes over all items once, and so does the constructor when the object has no ``classes``.

    Args:
        items: the object.
        image: key of the image in an item.
        label: key of the label; None where there is none.
        names: of the classes; None where the labels themselves tell.
        where: place and split, for people.

    Raises:
        UserError: an item whose image or label is of another type, or a label that is no class.
    """

    def __init__(self, items: Any, image: Any, label: Any, names: Sequence[str] | None, where: str) -> None:
        self._items, self._image, self._label, self._where = items, image, label, where
        self.group_sizes = (len(items),)
        self._labels = np.full(len(items), UNLABELLED, np.int64) if label is None else self._targets()
        self.class_names = tuple(names or ())
        if label is not None and (names is None or self._labels is not None):
            values = self._values() if self._labels is None else self._labels.tolist()
            numbered = number_labels(values, names, where)
            self._labels, self.class_names, self.note = numbered.numbers, numbered.names, numbered.note
        self._knows_labels = self._labels is not None  # without making the items

    def _targets(self) -> np.ndarray | None:
        targets = _find_targets(self._items)
        agree = targets is not None and len(targets) == len(self) and targets[0] == self._value(self._items[0], 0)
        return targets if agree else None

    def _values(self) -> list[Written]:
        return [self._value(self._items[row], row) for row in range(len(self))]

    def _value(self, item: Any, row: int) -> Written:
        """The label of an item as it is."""
        value: Any = UNLABELLED if self._label is None else item[self._label]
        if getattr(value, "ndim", None) == 0:  # numpy and torch
            value = value.item()
        if value is not None and not isinstance(value, (int, float, str)):
            raise UserError(
                f"{self._where}: the label of row {row} is a {type(value).__name__}, expected a class number or a name"
            )
        return value

    def _number(self, value: Written, row: int) -> int:
        return int(number_labels([value], self.class_names, f"row {row} of {self._where}").numbers[0])

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        item = self._items[row]
        return encode_image(item[self._image]), self._number(self._value(item, row), row)

    def fingerprint(self) -> str:
        """A hash of the labels where they are known: an item may be another one each time that it is made."""
        return digest(np.ascontiguousarray(self.labels()).tobytes() if self._knows_labels else b"")

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        if self._labels is None:
            self._labels = np.asarray([self._number(value, row) for row, value in enumerate(self._values())], np.int64)
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images, {self.num_classes} classes)"


def open_rows(
    dataset: Any,
    split: Split,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
) -> Source:
    """A data set handed over in Python as a source. Nothing is copied, and all rows are one group.

    A transform of the data set is refused and not dropped in silence: it may do more than augment, and whoever set it
    would take its work for done. A format that only changes types (``with_format("torch")``) has no part in it.

    Args:
        dataset: a ``datasets.Dataset`` (images as such, as bytes or as paths), or any object with ``__len__`` and
            ``__getitem__`` that gives mappings or pairs of image and label, such as a data set of torchvision.
            A label is a number from 0 on, text, or -1 or None for none; a data set may also have images only.
        split: what it is for; messages call it ``train_dataset`` or ``eval_dataset``.
        image_column: column of the images, when it is not clear.
        label_column: column of the labels, when it is not clear.
        classes: the classes of the training set, which an evaluation set must have. By default those that a
            ``ClassLabel`` column or ``dataset.classes`` names, else the sorted values of text, else plain numbers.

    Raises:
        UserError: something else was given, the columns are not clear, or the classes are other ones.
    """
    from datasets import Dataset, IterableDataset

    name = f"{split}_dataset"
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        listed = ", ".join(map(str, dataset))
        raise UserError(f"{name}: a {kind} holds several splits ({listed}); give one of them, e.g. dataset['{split}']")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(
            f"{name}: a {kind} cannot be read from any row on, so a run could not be resumed exactly; "
            "give its files in a recipe, data: {path: …, streaming: true}, which can"
        )
    if len(dataset) == 0:
        raise UserError(f"{name}: there are no rows in it")
    cfg = DataConfig(path=GIVEN_DATA, image_column=image_column, label_column=label_column)
    opened = _open_dataset if isinstance(dataset, Dataset) else _open_items
    return opened(dataset, name, cfg, None if classes is None else tuple(classes))


# --- datasets.Dataset ---------------------------------------------------------------------------------------------


def undecoded(dataset: Any, column: str) -> Any:
    """The image column of a ``datasets.Dataset`` alone, as bytes and paths, whatever its format."""
    from datasets import Image as ImageFeature

    return dataset.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))


def _open_dataset(dataset: Any, name: str, cfg: DataConfig, classes: tuple[str, ...] | None) -> Source:
    if dataset.format["type"] == "custom":
        raise UserError(
            f"{name}: it has a transform, but kd_hf crops, augments and normalises by itself (data.augment); "
            "give dataset.with_format(None)"
        )
    image, label, names = _find(dataset.features, cfg)
    if label is None:
        labels = Numbered(np.full(len(dataset), UNLABELLED, np.int64), classes or (), "")
    else:
        # not dataset.data: that knows nothing of a selection or a shuffle
        column = dataset.select_columns([label]).with_format("arrow")[:].column(label)
        labels = number_column(column, _agreed(names, classes, name), name)
    return RowSource(undecoded(dataset, image), image, labels, name)


def _find(features: Mapping[str, Any], cfg: DataConfig) -> tuple[str, str | None, tuple[str, ...] | None]:
    """Image column, label column (None: there is no other column) and the classes that the features name."""
    from datasets import Value

    if len(features) == 1 and cfg.label_column is None:
        return find_columns({**features, LABEL_NAMES[0]: Value("int64")}, cfg).image, None, None
    try:
        columns = find_columns(features, cfg)
    except UserError as error:
        raise UserError(f"{error}; without labels, give dataset.select_columns of the images alone") from None
    return columns.image, columns.label, columns.class_names


def _agreed(names: Sequence[str] | None, classes: tuple[str, ...] | None, where: str) -> tuple[str, ...] | None:
    """The names of the classes, which must be those of the training set when that is known."""
    if names is None or classes is None or tuple(names) == classes:
        return classes if names is None else tuple(names)
    odd = sorted(set(names) ^ set(classes))
    difference = f"only one of them has {', '.join(map(repr, odd[:5]))}" if odd else "the same names in another order"
    raise UserError(f"{where}: its classes are not those of the training set; {difference}")


# --- other objects ------------------------------------------------------------------------------------------------


def _open_items(items: Any, name: str, cfg: DataConfig, classes: tuple[str, ...] | None) -> Source:
    layers = [items]
    while hasattr(layers[-1], "dataset"):  # torch's Subset
        layers.append(layers[-1].dataset)
    if any(getattr(layer, "transform", None) is not None for layer in layers):
        raise UserError(
            f"{name}: it has a transform, but kd_hf crops, augments and normalises by itself (data.augment); "
            "build it without `transform`"
        )
    try:
        first = items[0]
    except OSError as error:
        raise UserError(f"{name}: its first row cannot be read: {error}") from error
    named = next((layer.classes for layer in layers if getattr(layer, "classes", None)), None)
    names = None if named is None else [n if isinstance(n, str) else ", ".join(map(str, n)) for n in named]
    image, label = _find_keys(first, name, cfg)
    if not _is_image(first[image]):
        raise UserError(f"{name}: the image of row 0 is a {type(first[image]).__name__}; {_EXPECTED}")
    return ItemSource(items, image, label, _agreed(names, classes, name), name)


def _find_keys(item: Any, name: str, cfg: DataConfig) -> tuple[Any, Any]:
    """Keys of image and label in an item: 0 and 1 of a pair, else as in a table."""
    from datasets import Image as ImageFeature
    from datasets import Value

    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return 0, 1
    if not isinstance(item, Mapping):
        raise UserError(f"{name}: row 0 is a {type(item).__name__}, expected a mapping, or a pair of image and label")
    features = {
        key: ImageFeature() if _is_image(value) and not isinstance(value, str)
        else Value("string" if isinstance(value, str) else "int64" if _is_number(value) else "null")
        for key, value in item.items()
    }  # fmt: skip
    return _find(features, cfg)[:2]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or value is None or getattr(value, "ndim", None) == 0


def _is_image(value: Any) -> bool:
    struct = isinstance(value, Mapping) and {"bytes", "path"} == set(value)
    return struct or isinstance(value, (Image.Image, bytes, str, Path))


def _find_targets(items: Any) -> np.ndarray | None:
    """The labels that an object has at hand: torchvision's ``targets``, also behind torch's ``Subset``; else None."""
    if hasattr(items, "indices") and hasattr(items, "dataset"):
        inner = _find_targets(items.dataset)
        return None if inner is None else inner[np.asarray(items.indices)]
    targets = getattr(items, "targets", None)
    if targets is None or getattr(items, "target_transform", None) is not None:
        return None
    numbers = np.asarray(targets)
    return numbers.astype(np.int64) if numbers.ndim == 1 and numbers.dtype.kind in "iu" else None


def encode_image(value: Any) -> bytes:
    """The bytes of a file for an image: those that are there already, or its pixels in a format without compression.

    Args:
        value: a PIL image, bytes, a path, or a mapping of ``bytes`` and ``path``.

    Raises:
        OSError: there is no such file, or no image.
    """
    if isinstance(value, (str, Path)):
        return Path(value).read_bytes()
    if not isinstance(value, Image.Image):
        return image_bytes(value)
    deep = value.mode.startswith(DEEP)  # the decoder knows what to take of it
    if value.mode == "P" and "transparency" in value.info:
        value = value.convert("RGBA")  # Pillow warns otherwise
    buffer = io.BytesIO()
    (value if deep else value.convert("RGB")).save(buffer, "TIFF" if deep else "PPM")
    return buffer.getvalue()
