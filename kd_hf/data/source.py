"""Where images come from: class folders, Parquet files, Hub data sets or the built-in digits, behind one interface."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kd_hf.config import DataConfig
from kd_hf.data.draws import generator
from kd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow

Split = Literal["train", "eval"]
EVAL_NAMES = ("validation", "val", "valid", "test")  # tried in this order when the configured one is among them
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LABEL_NAMES = ("label", "labels")
DIGITS_SEED, DIGITS_SIZE = 0, 32
UNLABELLED = -1


class Source(ABC):
    """Encoded images and labels by row. Instances travel to worker processes, so they pickle."""

    class_names: tuple[str, ...]
    group_sizes: tuple[int, ...]
    """Rows that are cheap to read together, in order; a set with random access is one group."""

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
    source = _open(cfg, split)
    if len(source) == 0:
        raise UserError(f"data.path: no images in {source.describe()}")
    if split == "eval" or (cfg.num_labels is None and cfg.unlabelled == "keep"):
        return source
    return LabelSubset(source, cfg.num_labels, cfg.unlabelled, seed)


def _open(cfg: DataConfig, split: Split) -> Source:
    if cfg.path.startswith("builtin:"):
        if cfg.path != "builtin:digits":
            raise UserError(f"data.path: unknown built-in data '{cfg.path}'.{nearest(cfg.path, ['builtin:digits'])}")
        return DigitsSource(split)
    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        parquet = cfg.data_files or any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet"))
        return _open_table(cfg, split) if parquet else FolderSource(folder, cfg, split)
    if folder.is_absolute() or cfg.path.startswith((".", "~")) or cfg.path.count("/") > 1:
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{near}")
    return _open_table(cfg, split)


def _choose_split(cfg: DataConfig, split: Split, present: Sequence[str]) -> str:
    """The name of the split that is there; the usual names of an evaluation split stand in for each other."""
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
        self._images = [self._encode(image) for image in digits.images[rows]]

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
        return self._images[row], int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"builtin:digits ({self.split}, {len(self)} images, {self.num_classes} classes)"


# --- class folders -----------------------------------------------------------------------------------------------


class FolderSource(Source):
    """Images in ``folder/split/class/…``; the sorted class names are the labels."""

    def __init__(self, folder: Path, cfg: DataConfig, split: Split) -> None:
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.folder = folder / _choose_split(cfg, split, present)
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
            folder = self.folder.parent / _choose_split(cfg, other, present)
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


# --- Parquet and the Hub -----------------------------------------------------------------------------------------


@contextmanager
def _library_errors(cfg: DataConfig) -> Iterator[None]:
    """Turn what `datasets` and the Hub client raise into one line that says what to do."""
    try:
        yield
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise UserError(f"data.path: '{cfg.path}': {reason}.{_advice(error, reason)}") from error


def _advice(error: Exception, reason: str) -> str:
    from datasets.exceptions import DatasetNotFoundError

    missing = isinstance(error, DatasetNotFoundError)
    silent = isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason
    cases = (
        ("gated" in reason.lower(), " Accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"),
        ("Invalid credentials" in reason, " Renew HF_TOKEN, or run `hf auth login`"),
        (missing and "Revision" in reason, " Check `data.revision`"),
        (missing, " Check the spelling; a private one needs `hf auth login` or HF_TOKEN"),
        ("BuilderConfig" in reason or "Config name is missing" in reason, " Set `data.name` to one of these"),
        (silent, " Check the network (and HF_HUB_OFFLINE), or give a local folder"),
        (isinstance(error, FileNotFoundError), " Check `data.path` and `data.data_files`"),
    )
    return next((advice for applies, advice in cases if applies), "")


def _open_table(cfg: DataConfig, split: Split) -> Source:
    import datasets

    files: dict[str, Any] | None = dict(cfg.data_files) if cfg.data_files else None
    folder = Path(cfg.path).expanduser()
    path = str(folder) if folder.is_dir() else cfg.path
    with _library_errors(cfg):
        builder = datasets.load_dataset_builder(path, cfg.name, data_files=files, revision=cfg.revision)
    data_files = {str(key): list(value) for key, value in (builder.config.data_files or {}).items()}
    name = _choose_split(cfg, split, list(data_files or builder.info.splits or {}))
    where = f"{cfg.path}, split {name}"
    if cfg.streaming:
        if not all(file.endswith(".parquet") for file in data_files.get(name, [""])):
            raise UserError(f"data.streaming: '{cfg.path}' is not stored as Parquet files; set data.streaming=false")
        return StreamedSource(data_files[name], builder.info.features, cfg, where)
    with _library_errors(cfg):
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=name)
    return TableSource(dataset, cfg, where)


@dataclass(frozen=True)
class Columns:
    """The two columns that are read, and the names of the classes (None: integers without names)."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None


def find_columns(features: Any, cfg: DataConfig) -> Columns:
    """Find image and label column by the types of `features` (``datasets.Features``), or as the recipe says.

    Raises:
        UserError: naming the columns there are, when the choice is not clear.
    """
    from datasets import ClassLabel, Image, Value

    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    images = [name for name, feature in features.items() if isinstance(feature, Image) or _holds_bytes(feature)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    plain = [name for name in LABEL_NAMES if isinstance(features.get(name), Value)]
    image = _pick("image", cfg.image_column, images, listed, features)
    label = _pick("label", cfg.label_column, classes or plain, listed, features)
    feature = features[label]
    if isinstance(feature, ClassLabel):
        return Columns(image, label, tuple(feature.names))
    if not (isinstance(feature, Value) and "int" in feature.dtype):
        raise UserError(f"data.label_column: '{label}' holds {_type_name(feature)}, expected class labels or integers")
    return Columns(image, label, None)


def _holds_bytes(feature: Any) -> bool:
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _type_name(feature: Any) -> str:
    return str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__


def _pick(kind: str, wanted: str | None, found: Sequence[str], listed: str, features: Any) -> str:
    if wanted is not None:
        if wanted not in features:
            raise UserError(f"data.{kind}_column: there is no column '{wanted}'.{nearest(wanted, features)}")
        return wanted
    if len(found) != 1:
        problem = "several columns could be" if found else "no column is clearly"
        raise UserError(f"data.{kind}_column: {problem} the {kind}; name one of {listed}")
    return found[0]


def _plain_names(labels: np.ndarray) -> tuple[str, ...]:
    return tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))


def _image_bytes(value: Any) -> bytes:
    """The bytes of an undecoded image cell: binary, or a struct of bytes and path."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"] or "").read_bytes()
    if value is None:
        raise OSError("the cell is empty")
    return bytes(value)


def _int_labels(column: pyarrow.ChunkedArray) -> np.ndarray:
    return column.fill_null(UNLABELLED).to_numpy().astype(np.int64)


class TableSource(Source):
    """A prepared ``datasets.Dataset``: memory-mapped, any row at any time."""

    def __init__(self, dataset: Any, cfg: DataConfig, where: str) -> None:
        from datasets import Image

        self.columns = find_columns(dataset.features, cfg)
        kept = [self.columns.image, self.columns.label]
        self._data = dataset.select_columns(kept).cast_column(self.columns.image, Image(decode=False))
        self._labels = _int_labels(dataset.data.column(self.columns.label))
        self.class_names = self.columns.class_names or _plain_names(self._labels)
        self.group_sizes = (len(dataset),)
        self._where = where

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        return _image_bytes(self._data[row][self.columns.image]), int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images, {self.num_classes} classes)"


class StreamedSource(Source):
    """Parquet files, local or on the Hub, of which a row group is read when one of its rows is needed.

    Files are opened anew for each row group, so that no handle is shared between processes.
    """

    def __init__(self, files: Sequence[str], features: Any, cfg: DataConfig, where: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from datasets import Features

        self._files = list(files)
        with ThreadPoolExecutor(16) as pool:
            self._footers = list(pool.map(_read_footer, self._files))
        schema = self._footers[0].schema.to_arrow_schema()
        self.columns = find_columns(features or Features.from_arrow_schema(schema), cfg)
        self._groups = [(f, g) for f, footer in enumerate(self._footers) for g in range(footer.num_row_groups)]
        self.group_sizes = tuple(self._footers[f].row_group(g).num_rows for f, g in self._groups)
        self._ends = np.cumsum(self.group_sizes)
        self._where = where
        self._groups_per_lane = cfg.shuffle_block + 2  # a block does not start at a row group
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self.class_names = self.columns.class_names or _plain_names(self.labels())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _table(self, group: int, columns: Sequence[str | None]) -> pyarrow.Table:
        file, index = self._groups[group]
        with _parquet(self._files[file], f"row group {index} of", self._footers[file]) as parquet:
            # no threads: the pool of a forked parent does not survive in a worker
            return parquet.read_row_group(index, columns=list(columns), use_threads=False)

    def _cached(self, group: int) -> pyarrow.Table:
        if group not in self._cache:
            while len(self._cache) >= self.lanes * self._groups_per_lane:
                self._cache.popitem(last=False)
            self._cache[group] = self._table(group, [self.columns.image, self.columns.label])
        self._cache.move_to_end(group)
        return self._cache[group]

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        inside = row - int(self._ends[group]) + self.group_sizes[group]
        table = self._cached(group)
        label = table.column(self.columns.label)[inside].as_py()
        data = _image_bytes(table.column(self.columns.image)[inside].as_py())
        return data, UNLABELLED if label is None else int(label)

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        parts = [self._table(g, [self.columns.label]).column(self.columns.label) for g in range(len(self._groups))]
        return np.concatenate([_int_labels(part) for part in parts])

    def describe(self) -> str:
        """Place, split and size."""
        rows = f"{len(self)} images in {len(self.group_sizes)} row groups"
        return f"{self._where}, streamed ({rows}, {self.num_classes} classes)"


def _read_footer(file: str) -> Any:
    with _parquet(file, "the Parquet file") as parquet:
        return parquet.metadata


@contextmanager
def _parquet(file: str, what: str, footer: Any = None) -> Iterator[Any]:
    """A Parquet file, local or remote, of which only the bytes that are asked for are fetched."""
    import pyarrow.parquet
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(file)
        # by default fsspec reads megabytes ahead, past the row group and the columns that are wanted
        with files.open(path, "rb", cache_type="none") as handle:
            yield pyarrow.parquet.ParquetFile(handle, metadata=footer, pre_buffer=True)
    except Exception as error:
        raise UserError(f"data.path: cannot read {what} {file}: {error}") from error


# --- few labels --------------------------------------------------------------------------------------------------


class LabelSubset(Source):
    """A source of which only some labels are kept, evenly over the classes; the other rows have none, or are left out.

    Args:
        source: all rows.
        num_labels: how many labels are kept in total; None keeps all.
        unlabelled: `keep` the rows without a label, or `drop` them.
        seed: of the choice.

    Raises:
        UserError: there are fewer labelled rows than `num_labels`.
    """

    def __init__(self, source: Source, num_labels: int | None, unlabelled: Literal["keep", "drop"], seed: int) -> None:
        self.source = source
        self.class_names = source.class_names
        labels = source.labels().copy()
        if num_labels is not None:
            kept = choose_labelled(labels, num_labels, seed)
            labels[~kept] = UNLABELLED
        used = labels >= 0 if unlabelled == "drop" else np.ones(len(labels), dtype=bool)
        groups = np.repeat(np.arange(len(source.group_sizes)), source.group_sizes)
        sizes = np.bincount(groups[used], minlength=len(source.group_sizes))
        self.group_sizes = tuple(int(size) for size in sizes if size)
        self._rows = np.flatnonzero(used)
        self._labels = labels[used]

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        return self.source.read(int(self._rows[row]))[0], int(self._labels[row])

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
