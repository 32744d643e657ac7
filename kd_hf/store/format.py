"""Stored teachers: what they say about every training image of every epoch, written once and read instead of run.

Which image stands at a position of an epoch, and how it is cropped, changed and mixed, are pure functions of the
recipe, so a row belongs to a position: row p of epoch e is what the teacher says about the image that training shows
there. ``data/*.parquet`` holds one row per image and epoch, in order, with the columns

- ``key`` uint32: the low bits of the key that names the image's random numbers, compared when the row is read;
- ``<teacher>_values`` binary: float16 log-probabilities at temperature 1; of the K most likely classes, falling, or
  of all of them in order (K = C);
- ``<teacher>_classes`` binary: the K classes as uint16 (uint32 where there are more); missing when K = C;
- ``<teacher>_<tap>`` binary: a tapped tensor as float16, where a method reads one.

``manifest.json`` says who spoke and what decided what was shown; it is written last, so that a store without one is
known to be unfinished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from kd_hf.data.parquet import ParquetFiles
from kd_hf.data.reading import plain_reason
from kd_hf.errors import LocalError, UserError
from kd_hf.hub_client import without_retries
from kd_hf.info import ModelInfo

FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
KEY, KEY_MASK = "key", 0xFFFFFFFF
ROUNDING = "float16: a stored log-probability v differs from the teacher's by at most |v| / 2**11 + 2**-25"
_LEAST_REST = 2.0**-24  # what float32 can tell of 1 − Σ p
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")
_INFO = TypeAdapter(ModelInfo)


# --- what one image's row says --------------------------------------------------------------------------------------


def class_type(num_classes: int) -> type[np.unsignedinteger[Any]]:
    """The integers that classes are stored as."""
    return np.uint16 if num_classes <= 1 << 16 else np.uint32


def rounding(values: Tensor) -> Tensor:
    """How far stored log-probabilities may lie from the teacher's, element by element."""
    return values.abs() * 2.0**-11 + 2.0**-25


def log_probabilities(logits: Tensor, kept: int) -> tuple[Tensor, Tensor | None]:
    """Float16 log-probabilities ``[B, K]`` of the `kept` most likely classes, falling, and these classes int64.

    With ``kept >= C`` all of them in the order of the classes, and None. Raises :class:`UserError` for NaN.
    """
    if logits.isnan().any():
        raise UserError("the teacher says NaN of a training image; check its weights and dtype")
    values, classes = torch.log_softmax(logits.float(), 1), None
    if kept < logits.shape[1]:
        values, classes = values.topk(kept, dim=1)
    return values.clamp(min=torch.finfo(torch.float16).min).half(), classes


def spread(values: Tensor, classes: Tensor | None, num_classes: int) -> Tensor:
    """Logits float32 ``[B, C]``: log-probabilities of all classes from those that were kept.

    With v the K kept ones, each of the other C − K classes has log(r / (C − K)), where r = 1 − Σ exp(v) is at least
    2⁻²⁴, and r / (C − K) at most the least kept probability. So softmax gives back the kept probabilities.

    Args:
        values: ``[B, K]``, falling, or ``[B, C]``.
        classes: int64 ``[B, K]``; None when all are there.
        num_classes: C.
    """
    values = values.float()
    if classes is None:
        return values
    rest = 1.0 - values.exp().sum(1, keepdim=True)
    share = rest.clamp(min=_LEAST_REST).log() - float(np.log(num_classes - values.shape[1]))
    return torch.minimum(share, values[:, -1:]).repeat(1, num_classes).scatter_(1, classes, values)


# --- the manifest ---------------------------------------------------------------------------------------------------


class StoredNetwork(BaseModel):
    """Who spoke, and what was shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: dict[str, Any]
    """What the recipe said about it; see :func:`asked_for`."""
    commit: str | None
    trained_by: str | None
    weights: str
    """A hash over its tensors."""
    library: str
    architecture: str
    num_classes: int
    parameters: int
    top_k: int
    taps: dict[str, tuple[int, ...]]
    shown: dict[str, Any]
    """See :func:`shown_images`."""
    shown_hash: str
    info: dict[str, Any]
    gate: dict[str, float] | None = None
    """What was measured before the first row was written: `top1`, `top1_as_fed` in percent, `samples`."""

    def columns(self, name: str) -> dict[str, tuple[type[np.generic], int]]:
        """Number type and count of a row's columns."""
        kept = {f"{name}_values": (np.float16, self.top_k)}
        classes = {f"{name}_classes": (class_type(self.num_classes), self.top_k)}
        taps = {f"{name}_{tap}": (np.float16, int(np.prod(shape))) for tap, shape in self.taps.items()}
        return {**kept, **(classes if self.top_k < self.num_classes else {}), **taps}


class Shard(BaseModel):
    """One file."""

    file: str
    rows: int


class Manifest(BaseModel):
    """What a store is; ``manifest.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    versions: dict[str, str]
    teachers: dict[str, StoredNetwork]
    data: dict[str, Any]
    """Where the images came from, for people."""
    rounding: str = ROUNDING
    epochs: int
    positions: int
    """Rows of an epoch."""
    group_rows: int
    """Rows of a Parquet row group; the last one of an epoch has what is left."""
    shard_rows: int
    """Rows of a file; a multiple of `group_rows`."""
    shards: list[Shard]

    def column_widths(self) -> dict[str, int]:
        """Bytes of each column's values in a row."""
        columns = {key: c for name, teacher in self.teachers.items() for key, c in teacher.columns(name).items()}
        return {key: np.dtype(kind).itemsize * count for key, (kind, count) in columns.items()}

    @property
    def row_bytes(self) -> int:
        """An upper bound for a row on the disk, before compression."""
        return 4 + sum(width + 4 for width in self.column_widths().values())


def describe_network(info: ModelInfo) -> dict[str, Any]:
    """The facts about a network as plain values."""
    return dict(_INFO.dump_python(replace(info, modules=()), mode="json"))


def read_info(values: Mapping[str, Any]) -> ModelInfo:
    """The facts that :func:`describe_network` wrote."""
    return _INFO.validate_python(values)


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, in the order of `here`, whose values differ, and both values."""
    return next(((key, there.get(key), value) for key, value in here.items() if there.get(key) != value), None)


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """An opened store. `root` is where its files lie: a folder, or an address that fsspec knows."""

    place: str
    root: str
    manifest: Manifest
    _opened: dict[str, ParquetFiles] = field(default_factory=dict, repr=False, compare=False)  # the file read last

    @property
    def groups_per_epoch(self) -> int:
        """Row groups of an epoch."""
        return -(-self.manifest.positions // self.manifest.group_rows)

    def group(self, number: int, columns: Sequence[str]) -> Any:
        """Columns of a row group, counted over all epochs, as a ``pyarrow.Table``."""
        manifest = self.manifest
        epoch, group = divmod(number, self.groups_per_epoch)
        part, row = divmod(group * manifest.group_rows, manifest.shard_rows)
        shards_per_epoch = -(-manifest.positions // manifest.shard_rows)
        file = f"{self.root}/{manifest.shards[epoch * shards_per_epoch + part].file}"
        try:
            if file not in self._opened:
                opened = ParquetFiles([file])
                self._opened.clear()
                self._opened[file] = opened
            return self._opened[file].read(row // manifest.group_rows, columns)
        except UserError as error:
            raise LocalError(f"teacher.store: {str(error).removeprefix('data.path: ')}") from error


def open_store(place: str) -> Store:
    """Open a finished store: a folder, or a data set on the Hub (``user/name`` or ``user/name@revision``).

    Raises:
        UserError: it is not there, unfinished, damaged, or of another version.
    """
    folder = Path(place).expanduser()
    if folder.is_dir() or not (found := _HUB_ID.fullmatch(place)):
        return _read_manifest(place, str(folder), folder / MANIFEST)
    from huggingface_hub import hf_hub_download

    try:
        with without_retries():
            path = Path(hf_hub_download(found["repo"], MANIFEST, repo_type="dataset", revision=found["revision"]))
    except Exception as error:  # the client lets through whatever its HTTP library raises
        reason = plain_reason(error)[:300]
        raise UserError(f"teacher.store: '{place}' is neither a folder nor a store on the Hub: {reason}") from error
    commit = path.parent.name  # of the Hub's cache; all files are read as they were then
    return _read_manifest(place, f"hf://datasets/{found['repo']}@{commit}", path)


def _read_manifest(place: str, root: str, path: Path) -> Store:
    write = "`python -m kd_hf.cache RECIPE -o FOLDER`"
    if not path.is_file():
        started = (path.parent / UNFINISHED).is_file()
        state = f"is unfinished; the command that began it ({write}) continues it" if started else (
            f"is no store: there is no {MANIFEST}; {write} writes one")  # fmt: skip
        raise UserError(f"teacher.store: '{place}' {state}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise UserError(f"teacher.store: '{place}' has format {values.get('format')}; this version reads {FORMAT}")
        return Store(place, root, Manifest.model_validate(values))
    except (ValueError, ValidationError, AttributeError) as error:
        raise UserError(f"teacher.store: {path} is damaged: {plain_reason(error)[:300]}") from error


def matrix(column: Any, kind: type[np.generic], width: int) -> np.ndarray:
    """A binary column of rows of equal length as ``[rows, width]``, without a copy."""
    array = column.combine_chunks()
    _, offsets, data = array.buffers()
    edges = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    if (np.diff(edges) != width * np.dtype(kind).itemsize).any():
        raise LocalError("teacher.store: a row has another length than the manifest says; the file is damaged")
    return np.frombuffer(data, kind, len(array) * width, offset=int(edges[0])).reshape(-1, width)
