"""Parquet files, local or remote, by their footers and row groups."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kd_hf.data.reading import CONTINUE, plain_reason
from kd_hf.errors import UserError

if TYPE_CHECKING:
    import pyarrow

THREADS = 16  # requests under way at once


class ParquetFiles:
    """The files of one split, in order. Only the footers are read at first.

    Files are opened anew for each row group, so that no handle is shared between processes.

    Args:
        files: local paths or addresses that fsspec knows, such as ``hf://datasets/…``.

    Raises:
        UserError: naming the file that cannot be read.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = tuple(files)
        with ThreadPoolExecutor(THREADS) as pool:
            self.footers = list(pool.map(_read_footer, self.files))
        self.groups = [(f, g) for f, footer in enumerate(self.footers) for g in range(footer.num_row_groups)]

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Rows of each row group."""
        return tuple(self.footers[f].row_group(g).num_rows for f, g in self.groups)

    @cached_property
    def features(self) -> Any:
        """``datasets.Features`` as the first file tells them."""
        from datasets import Features

        return Features.from_arrow_schema(self.footers[0].schema.to_arrow_schema())

    def class_names(self, label: str) -> list[str] | None:
        """The classes of a column as the first file tells them, if it does."""
        return _class_names(self.footers[0].schema.to_arrow_schema(), label)

    def check(self, columns: Sequence[str], label: str, like: ParquetFiles | None = None) -> None:
        """Raise :class:`UserError` for a file without one of the `columns`, or with other class names for `label`.

        The names must be those of the first file, or of `like`, the files of another split.
        """
        files = (like or self).files
        first = (like or self).class_names(label)
        for file, footer in zip(self.files, self.footers, strict=True):
            schema = footer.schema.to_arrow_schema()
            missing = [name for name in columns if name not in schema.names]
            if missing:
                raise UserError(f"data.path: {file} has no column '{missing[0]}', unlike other files of the data set")
            names = _class_names(schema, label)
            if names and first and names != first:
                raise UserError(f"data.path: {file} has other classes for '{label}' than {files[0]}")

    def label_range(self, label: str) -> tuple[int, int] | None:
        """Smallest and largest value of an integer column by the footers' statistics; None when they are not there."""
        found: list[int] = []
        for file, index in self.groups:
            group = self.footers[file].row_group(index)
            column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == label)
            statistics = column.statistics
            if statistics is None or not statistics.has_min_max:
                return None
            found += (int(statistics.min), int(statistics.max))
        return (min(found), max(found)) if found else None

    def read(self, group: int, columns: Sequence[str]) -> pyarrow.Table:
        """The `columns` of a row group; raises :class:`UserError` when that fails, also late in a run."""
        file, index = self.groups[group]
        try:
            with _opened(self.files[file], self.footers[file]) as parquet:
                # no threads: the pool of a forked parent does not survive in a worker
                return parquet.read_row_group(index, columns=list(columns), use_threads=False)
        except Exception as error:
            place = f"row group {index} of {self.files[file]}"
            raise UserError(f"data.path: cannot read {place}: {plain_reason(error)}; {CONTINUE}") from error

    def read_column(self, name: str) -> pyarrow.ChunkedArray:
        """One column whole."""
        import pyarrow

        with ThreadPoolExecutor(THREADS) as pool:
            parts = list(pool.map(lambda group: self.read(group, [name]).column(name), range(len(self.groups))))
        kind = self.footers[0].schema.to_arrow_schema().field(name).type
        return pyarrow.chunked_array([chunk for part in parts for chunk in part.cast(kind).chunks], kind)


def _class_names(schema: pyarrow.Schema, label: str) -> list[str] | None:
    """The classes that `datasets` wrote into the file for a column, if it did."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names: list[str] | None = written.get("info", {}).get("features", {}).get(label, {}).get("names")
    return names


def _read_footer(file: str) -> Any:
    try:
        with _opened(file) as parquet:
            return parquet.metadata
    except Exception as error:
        raise UserError(f"data.path: cannot read the Parquet file {file}: {plain_reason(error)}") from error


@contextmanager
def _opened(file: str, footer: Any = None) -> Iterator[Any]:
    """A Parquet file of which only the bytes that are asked for are fetched."""
    import pyarrow.parquet
    from fsspec.core import url_to_fs

    files, path = url_to_fs(file)
    # by default fsspec reads megabytes ahead, past the row group and the columns that are wanted
    with files.open(path, "rb", cache_type="none") as handle:
        yield pyarrow.parquet.ParquetFile(handle, metadata=footer, pre_buffer=True)
