"""Data sets that are lists of files, local or on the Hub: Parquet, streamed or prepared by `datasets`, and tar."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from kd_hf.data.classes import check_labels, number_column, plain_names
from kd_hf.data.columns import Columns, find_columns, image_bytes, int_labels
from kd_hf.data.parquet import ParquetFiles
from kd_hf.data.reading import library_errors
from kd_hf.data.rows import RowSource, undecoded
from kd_hf.data.source import UNLABELLED, Source, Split, choose_split
from kd_hf.data.tars import TarSource
from kd_hf.errors import UserError
from kd_hf.hub_client import hub_answers, hub_left_alone, without_retries
from kd_hf.recipe.config import DataConfig

if TYPE_CHECKING:
    import pyarrow

ROW_GROUPS = "kd_hf_row_groups.json"  # beside a prepared table, whose files may be out of reach next time
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """What `datasets` knows about a data set before it reads any of it."""

    cfg: DataConfig
    builder: Any
    files: Mapping[str, Sequence[str]]
    """Files by split; empty when there is only a copy prepared earlier."""

    @property
    def commit(self) -> str | None:
        """The commit of the Hub repository that this is, also of a copy prepared earlier; None for a folder."""
        return self.builder.hash if _COMMIT.fullmatch(self.builder.hash or "") else None

    def all_are(self, suffix: str, split: str) -> bool:
        """Whether a split is stored in files of one kind."""
        files = self.files.get(split, ())
        return bool(files) and all(file.endswith(suffix) for file in files)

    def declares_classes(self) -> bool:
        """Whether the names of the classes are given for all splits together."""
        features = self.builder.info.features
        return features is not None and find_columns(features, self.cfg).class_names is not None

    def where(self, split: str) -> str:
        """Place and split, for people."""
        return f"{self.cfg.path}, split {split}"


def open_files(cfg: DataConfig, split: Split) -> Source:
    """Open one split of a Hub data set, or of a folder of Parquet or tar files.

    Raises:
        UserError: it cannot be found or read, or its classes are not those of the training split.
    """
    with without_retries():
        listing = _list(cfg)
        name = choose_split(cfg, split, list(listing.files or listing.builder.info.splits or {}))
        train = None
        if split == "eval" and cfg.train_split != name and not listing.declares_classes():
            with suppress(UserError):  # the training split need not be in order until somebody opens it
                train = _open_train(listing)
        source = _open_split(listing, name, train)
    if train is not None:
        _adopt_classes(source, train)
    source.revision = listing.commit
    return source


def _list(cfg: DataConfig) -> Listing:
    import datasets

    files: dict[str, Any] | None = dict(cfg.data_files) if cfg.data_files else None
    folder = Path(cfg.path).expanduser()
    path = str(folder) if folder.is_dir() else cfg.path
    reached = folder.is_dir() or hub_answers()
    with library_errors(cfg), nullcontext() if reached else hub_left_alone():
        builder = datasets.load_dataset_builder(path, cfg.name, data_files=files, revision=cfg.revision)
    found = {str(split): list(value) for split, value in (builder.config.data_files or {}).items()}
    return Listing(cfg, builder, found)


def _open_split(listing: Listing, name: str, train: Source | None = None) -> Source:
    cfg, where, names = listing.cfg, listing.where(name), train.class_names if train else None
    if listing.all_are(".tar", name):
        return TarSource(_local_files(listing, name), cfg, where, names)
    if cfg.streaming:
        if not listing.all_are(".parquet", name):
            raise UserError(f"data.streaming: '{cfg.path}' is not stored as Parquet files; set data.streaming=false")
        parquet = ParquetFiles(listing.files[name])
        columns = find_columns(listing.builder.info.features or parquet.features, cfg)
        _check_files(listing, name, parquet, columns)
        return StreamedSource(parquet, columns, cfg, where, names)
    with library_errors(cfg):
        listing.builder.download_and_prepare()
        dataset = listing.builder.as_dataset(split=name)
        return TableSource(dataset, _row_groups(listing, name, dataset), cfg, where, names)


def _check_files(listing: Listing, split: str, parquet: ParquetFiles, columns: Columns) -> None:
    """Raise :class:`UserError` when files lack columns, or number the classes unlike those of the training split."""
    like = None
    if split != listing.cfg.train_split and listing.all_are(".parquet", listing.cfg.train_split):
        with suppress(UserError):  # see open_files
            like = ParquetFiles(listing.files[listing.cfg.train_split][:1])
    parquet.check([columns.image, columns.label], columns.label, like)


def _open_train(listing: Listing) -> Source | None:
    """The training split, unless that means to download it."""
    name = choose_split(listing.cfg, "train", list(listing.files))
    with library_errors(listing.cfg):
        if listing.all_are(".tar", name) and not all(map(_at_hand, listing.files[name])):
            return None
    return _open_split(listing, name)


def _at_hand(file: str) -> bool:
    """Whether a file lies on this machine, if only in the Hub's cache."""
    from huggingface_hub import HfFileSystem, try_to_load_from_cache

    if "://" not in file:
        return True
    place: Any = HfFileSystem().resolve_path(file)
    cached = try_to_load_from_cache(
        place.repo_id, place.path_in_repo, revision=place.revision, repo_type=place.repo_type
    )
    return isinstance(cached, str)


def _local_files(listing: Listing, split: str) -> list[str]:
    """Tar files on this machine, of which any sample can be read at any time."""
    import datasets

    files = list(listing.files[split])
    if not any("://" in file for file in files):
        return files
    if listing.cfg.streaming:
        raise UserError(
            f"data.streaming: the tar files of '{listing.cfg.path}' are downloaded before they are read; "
            "set data.streaming=false"
        )
    with library_errors(listing.cfg):
        found: list[str] = datasets.DownloadManager(dataset_name=listing.builder.dataset_name).download(files)
    return found


def _row_groups(listing: Listing, split: str, dataset: Any) -> tuple[int, ...]:
    """The row groups of the Parquet files that a table was prepared from, so that its order is that of a stream."""
    memory = Path(listing.builder.cache_dir) / ROW_GROUPS
    known: dict[str, list[int]] = json.loads(memory.read_text()) if memory.is_file() else {}
    if split not in known and listing.all_are(".parquet", split):
        parquet = ParquetFiles(listing.files[split])
        _check_files(listing, split, parquet, find_columns(dataset.features, listing.cfg))
        known[split] = list(parquet.group_sizes)
        with suppress(OSError):  # it can be read again
            temporary = memory.with_name(f".{uuid4().hex}")  # other processes do the same
            temporary.write_text(json.dumps(known))
            temporary.replace(memory)
    sizes = tuple(known.get(split, [len(dataset)]))
    if sum(sizes) != len(dataset):
        raise UserError(
            f"data.path: the copy of '{listing.cfg.path}' in {memory.parent} has {len(dataset)} rows, its files have "
            f"{sum(sizes)}; remove that folder to prepare it again"
        )
    return sizes


def _adopt_classes(source: Source, train: Source) -> None:
    """Let an evaluation split have the classes of the training split; numbers without names may stop earlier."""
    own, names = source.class_names, train.class_names
    numbers = plain_names(len(own) - 1) == own and plain_names(len(names) - 1) == names
    if own != names and not (numbers and len(own) < len(names)):
        odd = sorted(set(own) ^ set(names))
        listed = ", ".join(f"'{name}'" for name in odd[:5]) + (", …" if len(odd) > 5 else "")
        difference = f"only one of them has {listed}" if odd else "the same names in another order"
        raise UserError(f"data.path: {train.describe()} and {source.describe()} have different classes; {difference}")
    source.class_names = names


class TableSource(RowSource):
    """A prepared ``datasets.Dataset``: memory-mapped, any row at any time.

    Args:
        dataset: one split.
        group_sizes: rows of each row group of the files it was made from.
        cfg: the recipe's `data` block.
        where: place and split, for people.
        names: classes of the training split, when this is another one; of labels that are names.
    """

    def __init__(
        self,
        dataset: Any,
        group_sizes: Sequence[int],
        cfg: DataConfig,
        where: str,
        names: Sequence[str] | None = None,
    ) -> None:
        self.columns = find_columns(dataset.features, cfg)
        image, column = self.columns.image, dataset.data.column(self.columns.label)
        numbered = number_column(column, self.columns.class_names or (None if self.columns.plain else names), where)
        super().__init__(undecoded(dataset, image), image, numbered, where, group_sizes)


class StreamedSource(Source):
    """Parquet files, local or on the Hub, of which a row group is read when one of its rows is needed.

    Args:
        parquet: the files of one split.
        columns: of the images and the labels.
        cfg: the recipe's `data` block.
        where: place and split, for people.
        names: classes of the training split, when this is another one; of labels that are names.
    """

    def __init__(
        self,
        parquet: ParquetFiles,
        columns: Columns,
        cfg: DataConfig,
        where: str,
        names: Sequence[str] | None = None,
    ) -> None:
        self._parquet = parquet
        self.columns = columns
        self.group_sizes = parquet.group_sizes
        self._ends = np.cumsum(self.group_sizes)
        self._where = where
        self._groups_per_lane = cfg.shuffle_block + 2  # a block does not start at a row group
        self._cache: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._labels: np.ndarray | None = None
        if columns.plain:
            smallest, largest = self._label_range()
            check_labels(smallest, largest, columns.class_names, where)
            if columns.class_names is None and largest == UNLABELLED:
                raise UserError(f"data.label_column: no row of {where} has a label")
            self.class_names = columns.class_names or plain_names(largest)
        else:
            numbered = number_column(self._parquet.read_column(columns.label), names, where)
            self._labels, self.class_names, self.note = numbered.numbers, numbered.names, numbered.note

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _label_range(self) -> tuple[int, int]:
        found = self._parquet.label_range(self.columns.label)
        if found is None:
            labels = self.labels()
            found = int(labels.min(initial=UNLABELLED)), int(labels.max(initial=UNLABELLED))
        return found

    def _cached(self, group: int) -> pyarrow.Table:
        if group not in self._cache:
            while len(self._cache) >= self.lanes * self._groups_per_lane:
                self._cache.popitem(last=False)
            self._cache[group] = self._parquet.read(group, [self.columns.image, self.columns.label])
        self._cache.move_to_end(group)
        return self._cache[group]

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        inside = row - int(self._ends[group]) + self.group_sizes[group]
        table = self._cached(group)
        data = image_bytes(table.column(self.columns.image)[inside].as_py())
        if self._labels is not None:
            return data, int(self._labels[row])
        label = table.column(self.columns.label)[inside].as_py()
        return data, UNLABELLED if label is None else int(label)

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        if self._labels is not None:
            return self._labels
        return int_labels(self._parquet.read_column(self.columns.label), self._where)

    def describe(self) -> str:
        """Place, split and size."""
        rows = f"{len(self)} images in {len(self.group_sizes)} row groups"
        return f"{self._where}, streamed ({rows}, {self.num_classes} classes)"
