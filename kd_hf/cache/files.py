"""The files of a store: which rows each holds, and how they are written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kd_hf.files import sync, writing
from kd_hf.store.format import KEY, Manifest

DATA = "data"  # the folder of the files


@dataclass(frozen=True)
class Part:
    """A file: positions of an epoch."""

    file: str
    epoch: int
    rows: range

    def is_whole(self, folder: Path, columns: Sequence[str]) -> bool:
        """Whether it has been written."""
        import pyarrow.parquet

        with suppress(OSError, ValueError):  # not there, or no Parquet file
            footer = pyarrow.parquet.read_metadata(folder / self.file)
            return footer.num_rows == len(self.rows) and footer.schema.to_arrow_schema().names == list(columns)
        return False

    def starts(self, size: int, positions: int) -> list[tuple[int, int]]:
        """Pieces of `size` that cover it; the last one of an epoch overlaps the one before."""
        return [(self.epoch, min(start, positions - size)) for start in self.rows[::size]]


def parts_of(manifest: Manifest) -> list[Part]:
    """The files of a store, in order."""
    starts = range(0, manifest.positions, manifest.shard_rows)
    return [
        Part(f"{DATA}/epoch{epoch:04d}-{index:04d}.parquet", epoch,
             range(start, min(start + manifest.shard_rows, manifest.positions)))
        for epoch in range(manifest.epochs)
        for index, start in enumerate(starts)
    ]  # fmt: skip


class PartFile:
    """Writes the rows of one file; it gets its name when it is whole, and nothing stays of it otherwise."""

    def __init__(self, path: Path, group_rows: int) -> None:
        self.path, self.group_rows = path, group_rows
        self.temporary = path.with_name(f".tmp-{path.name}")
        self._rows: list[dict[str, np.ndarray]] = []
        self._writer: Any = None

    def __enter__(self) -> PartFile:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.temporary.open("wb")
        return self

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows; whole row groups go to the disk."""
        self._rows.append(columns)
        if sum(len(rows[KEY]) for rows in self._rows) >= self.group_rows:
            joined = {key: np.concatenate([rows[key] for rows in self._rows]) for key in columns}
            whole = len(joined[KEY]) // self.group_rows * self.group_rows
            self._write({key: values[:whole] for key, values in joined.items()})
            self._rows = [{key: values[whole:] for key, values in joined.items()}]

    def _write(self, columns: Mapping[str, np.ndarray]) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({key: _column(values) for key, values in columns.items()})
        with writing(self.path):
            if self._writer is None:
                options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
                self._writer = pyarrow.parquet.ParquetWriter(self._file, table.schema, **options)
            self._writer.write_table(table, row_group_size=self.group_rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                rest = {key: np.concatenate([rows[key] for rows in self._rows]) for key in self._rows[0]}
                if len(rest[KEY]):
                    self._write(rest)
                with writing(self.path):
                    self._writer.close()
                    self._file.close()
                    sync(self.temporary)
                    self.temporary.replace(self.path)
        finally:
            with suppress(OSError, ValueError):  # what was said above counts
                if kind is not None and self._writer is not None:
                    self._writer.close()
                self._file.close()
            self.temporary.unlink(missing_ok=True)


def _column(values: np.ndarray) -> Any:
    """Numbers as they are, rows of them as binary."""
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    edges = np.arange(len(values) + 1, dtype=np.int32) * values[0].nbytes
    buffers = [None, pyarrow.py_buffer(edges), pyarrow.py_buffer(np.ascontiguousarray(values))]
    return pyarrow.BinaryArray.from_buffers(pyarrow.binary(), len(values), buffers)


def free_bytes(folder: Path) -> int:
    """Space left on the disk that a folder lies on, or would lie on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
