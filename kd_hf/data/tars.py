"""Tar files in WebDataset's layout: the files of a sample have one name up to the first dot."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kd_hf.data.classes import number_labels
from kd_hf.data.columns import LABEL_NAMES
from kd_hf.data.pixels import IMAGE_SUFFIXES
from kd_hf.data.reading import CONTINUE
from kd_hf.data.source import UNLABELLED, Source
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import DataConfig

BLOCK = 512  # bytes; headers and contents of a tar file start at multiples of it
RUN = 100  # consecutive samples that are read near each other
CLASS_SUFFIX, JSON_SUFFIX = "cls", "json"
JSON_KEYS = (*LABEL_NAMES, CLASS_SUFFIX)
REGULAR = (b"0", b"\0", b"7")  # kinds of entries, of which some only tell more about the next one
LONG_NAME, EXTENDED = b"L", b"x"


@dataclass(frozen=True)
class Member:
    """A file inside a tar file: its name and where its bytes are."""

    name: str
    offset: int
    size: int


# --- the tar format ----------------------------------------------------------------------------------------------


def members(path: str) -> Iterator[Member]:
    """Yield the regular files in a tar file, of which only the headers are read.

    Raises:
        UserError: it is no tar file, damaged, or ends too early.
    """
    total, offset = os.path.getsize(path), 0
    extended: dict[str, str] = {}  # what entries of their own say about the next one
    with open(path, "rb", buffering=0) as file:
        while header := _header(path, file.fileno(), offset):
            start, kind = offset + BLOCK, header[156:157]
            try:
                size = int(extended.pop("size", 0)) or _size(header)
                if start + size > total:
                    raise _truncated(path, offset)
                if kind == LONG_NAME:
                    extended["path"] = _text(os.pread(file.fileno(), size, start))
                elif kind == EXTENDED:
                    extended = _records(os.pread(file.fileno(), size, start))
            except ValueError:
                raise UserError(f"data.path: {path} is not a tar file, or damaged at byte {offset}") from None
            if kind in REGULAR:
                yield Member(extended.get("path") or _name(header), start, size)
            if kind not in (LONG_NAME, EXTENDED):
                extended = {}
            offset = start + -(-size // BLOCK) * BLOCK


def _header(path: str, descriptor: int, offset: int) -> bytes:
    """The header at `offset`, empty at the mark that ends the tar file."""
    header = os.pread(descriptor, BLOCK, offset)
    if len(header) < BLOCK:
        raise _truncated(path, offset)
    return header.rstrip(b"\0") and header


def _truncated(path: str, offset: int) -> UserError:
    return UserError(f"data.path: the tar file {path} is truncated: it lacks what should be at byte {offset}")


def _size(header: bytes) -> int:
    """Bytes of an entry: octal digits, or binary for what these cannot hold. Raises ValueError for no header."""
    # the mark of POSIX is cheap to see; only older files need the sum
    if header[257:262] != b"ustar" and sum(header) - sum(header[148:156]) + 8 * 32 != _octal(header[148:156]):
        raise ValueError("checksum")
    field = header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else _octal(field)
    if size < 0:
        raise ValueError("size")
    return size


def _octal(field: bytes) -> int:
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""  # GNU keeps other things there
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _records(block: bytes) -> dict[str, str]:
    """The records ``length key=value`` of a POSIX extended header."""
    found = {}
    while block:
        length = int(block.split(b" ", 1)[0])
        if length < 1:
            raise ValueError("record")
        key, _, value = block[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        found[_text(key)] = _text(value)
        block = block[length:]
    return {key: found[key] for key in ("path", "size") if key in found}


# --- samples -----------------------------------------------------------------------------------------------------


def _samples(path: str) -> Mapping[str, dict[str, Member]]:
    """Members by sample and suffix, in the order of the first member of each sample."""
    found: dict[str, dict[str, Member]] = {}
    for member in members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem:
            continue  # hidden files, such as macOS leaves behind
        sample = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if sample.setdefault(suffix.lower(), member) is not member:
            raise UserError(f"data.path: {path} has two files '{member.name}'")
    return found


def _image(sample: Mapping[str, Member], wanted: str | None, place: str) -> Member:
    """The image among the files of a sample, by its suffix."""
    if wanted is not None:
        found = [suffix for suffix in sample if suffix == wanted.lower().removeprefix(".")]
    else:
        found = [suffix for suffix in sample if f".{suffix}".endswith(IMAGE_SUFFIXES)]
    if len(found) == 1:
        return sample[found[0]]
    problem = "several files that could be the image" if found else "no image file"
    listed = ", ".join(f".{suffix}" for suffix in sample)
    raise UserError(f"data.image_column: {place} has {problem} (there is {listed}); give the suffix of the image")


def _label(sample: Mapping[str, Member], wanted: str | None, place: str, descriptor: int) -> str:
    """The label as it is written: the text of a file, or a value in a JSON file."""
    suffix = (wanted or CLASS_SUFFIX).lower().removeprefix(".")
    if suffix in sample and suffix != JSON_SUFFIX:
        label: object = _content(descriptor, sample[suffix]).decode("utf-8-sig", "replace").strip()
    else:
        keys = JSON_KEYS if wanted is None or suffix == JSON_SUFFIX else (wanted,)
        label = _json_value(sample, keys, place, descriptor)
    if label is None:
        return str(UNLABELLED)
    if isinstance(label, (int, str)) and str(label):
        return str(label)
    raise UserError(f"data.label_column: {place} has the label {label!r}, expected a number or a name")


def _json_value(sample: Mapping[str, Member], keys: Sequence[str], place: str, descriptor: int) -> object:
    listed = ", ".join(f".{suffix}" for suffix in sample)
    if JSON_SUFFIX not in sample:
        raise UserError(
            f"data.label_column: {place} has no label (there is {listed}); expected a file .{CLASS_SUFFIX} or "
            f".{JSON_SUFFIX}, or give the suffix of the file that holds it"
        )
    try:
        values = json.loads(_content(descriptor, sample[JSON_SUFFIX]))
    except ValueError as error:
        raise UserError(f"data.path: the .{JSON_SUFFIX} file of {place} is not valid: {error}") from None
    present = [key for key in keys if isinstance(values, dict) and key in values]
    if not present:
        raise UserError(
            f"data.label_column: the .{JSON_SUFFIX} file of {place} has no '{keys[0]}'."
            f"{nearest(keys[0], values if isinstance(values, dict) else ())}"
        )
    return values[present[0]]


def _content(descriptor: int, member: Member) -> bytes:
    return os.pread(descriptor, member.size, member.offset)


class TarSource(Source):
    """Tar files on a disk: their headers and labels are read once, an image when it is needed.

    Labels are numbers, or names, which are numbered in their sorted order.

    Args:
        files: of one split, in order.
        cfg: the recipe's `data` block; `image_column` and `label_column` are suffixes, the latter also a key of the
            JSON files.
        where: place and split, for people.
        names: classes of the training split, when this is another one.

    Raises:
        UserError: naming the file, and the sample that has no image or no label.
    """

    def __init__(self, files: Sequence[str], cfg: DataConfig, where: str, names: Sequence[str] | None = None) -> None:
        self._files = tuple(files)
        self._where = where
        places: list[np.ndarray] = []
        labels: list[str] = []
        for file in self._files:
            found, written = _index(file, cfg)
            places.append(found)
            labels += written
        self._places = np.concatenate(places)
        self._ends = np.cumsum([len(found) for found in places])
        self.group_sizes = tuple(size for found in places for size in _runs(len(found)))
        distinct = sorted(set(labels))
        numbered = number_labels(distinct, names, where)
        by_label = dict(zip(distinct, numbered.numbers.tolist(), strict=True))
        self._labels = np.array([by_label[label] for label in labels], np.int64)
        self.class_names, self.note = numbered.names, numbered.note

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        path = self._files[int(np.searchsorted(self._ends, row, side="right"))]
        offset, size = self._places[row].tolist()
        try:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"data.path: cannot read the tar file {path}: {error.strerror}; {CONTINUE}") from error
        if len(data) < size:
            raise UserError(f"data.path: the tar file {path} has become shorter; {CONTINUE}")
        return data, int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"{self._where} ({len(self)} images in {len(self._files)} tar files, {self.num_classes} classes)"


def _index(path: str, cfg: DataConfig) -> tuple[np.ndarray, list[str]]:
    """Offset and size of each sample's image, int64 ``[N, 2]``, and the labels as they are written."""
    try:
        samples = _samples(path)
        images, labels = [], []
        with open(path, "rb", buffering=0) as file:
            for key, sample in samples.items():
                place = f"sample '{key}' of {path}"
                image = _image(sample, cfg.image_column, place)
                images.append((image.offset, image.size))
                labels.append(sys.intern(_label(sample, cfg.label_column, place, file.fileno())))
    except OSError as error:
        raise UserError(f"data.path: cannot read the tar file {path}: {error.strerror}") from error
    return np.array(images, np.int64).reshape(-1, 2), labels


def _runs(count: int) -> list[int]:
    """Cut `count` samples into runs of about equal length."""
    runs = -(-count // RUN)
    return [count * (i + 1) // runs - count * i // runs for i in range(runs)]
