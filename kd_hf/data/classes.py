"""From labels as they are written, numbers or names of any type, to class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kd_hf.data.notes import Notes
from kd_hf.data.source import UNLABELLED
from kd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    import pyarrow

LARGEST = 99_999  # a class number without a name: beyond, they are ids, and a network would have an output for each
Written = str | int | float | bool | None


@dataclass(frozen=True)
class Numbered:
    """Labels as class numbers."""

    numbers: np.ndarray
    """int64 ``[N]``, -1 where there is none."""
    names: tuple[str, ...]
    """Of the classes."""
    note: str
    """What was changed, for people."""


def number_labels(values: Sequence[Written], names: Sequence[str] | None, where: str) -> Numbered:
    """Number labels of any type.

    Whole numbers are class numbers, in floating point and as text too; other text is the name of a class, which are
    numbered in sorted order. None, NaN and empty text are no label.

    Args:
        values: as they are written.
        names: the classes, where they are known.
        where: place and split, for people.

    Raises:
        UserError: a value that is no label, or no class; or no label at all, where the classes are not known either.
    """
    notes = Notes()
    plain = [_plain(value, where, notes) for value in values]
    texts = {value for value in plain if isinstance(value, str)}
    if texts and not texts <= set(names or ()) and all(_is_number(text) for text in texts):
        plain, texts = [value if value is None else int(value) for value in plain], set()
        notes.add("label values that are numbers written as text", sorted(values, key=str)[0], len(values))
    if texts:
        return _by_name(plain, texts, names, where, notes)
    numbers = [UNLABELLED if value is None else int(value) for value in plain]
    largest = max(numbers, default=UNLABELLED)
    check_labels(min(numbers, default=UNLABELLED), largest, names, where)
    if names is None and len(values) and largest == UNLABELLED:
        raise UserError(f"data.label_column: no row of {where} has a label")
    if names is None and any(isinstance(value, bool) for value in values):
        names = ("False", "True")
    return Numbered(np.asarray(numbers, np.int64), plain_names(largest) if names is None else tuple(names), str(notes))


def number_column(column: pyarrow.ChunkedArray, names: Sequence[str] | None, where: str) -> Numbered:
    """The same for a column of a table; see :func:`number_labels`."""
    encoded = column.combine_chunks().dictionary_encode()
    distinct = number_labels([*encoded.dictionary.to_pylist(), *([None] if column.null_count else [])], names, where)
    places = encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)
    return Numbered(distinct.numbers[places], distinct.names, distinct.note)


def _plain(value: Written, where: str, notes: Notes) -> int | str | None:
    """A label as number or text; None where there is none."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(f"data.label_column: {where} has the label {value:g}; expected a class number or a name")
        notes.add("label values that are whole numbers in floating point", value)
        return int(value)
    if not isinstance(value, (str, int)):
        kind = type(value).__name__
        raise UserError(f"data.label_column: {where} has a {kind} as label; expected a class number or a name")
    return value if isinstance(value, str) else int(value)


def _is_number(text: str) -> bool:
    """Whether text is a number as one would write it: `7`, and not `007`, which is a name."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and str(int(text)) == text


def _by_name(
    plain: Sequence[int | str | None], texts: set[str], names: Sequence[str] | None, where: str, notes: Notes
) -> Numbered:
    mixed = next((value for value in plain if isinstance(value, int)), None)
    if mixed is not None:
        raise UserError(
            f"data.label_column: {where} has numbers and names for labels, such as {mixed} and '{min(texts)}'"
        )
    classes = tuple(sorted(texts)) if names is None else tuple(names)
    places = {name: number for number, name in enumerate(classes)}
    unknown = min(texts - places.keys(), default=None)
    if unknown is not None:
        raise UserError(
            f"data.label_column: {where} has the label '{unknown}', and there is no such class."
            f"{nearest(unknown, classes)}"
        )
    numbers = [UNLABELLED if value is None else places[str(value)] for value in plain]
    return Numbered(np.asarray(numbers, np.int64), classes, str(notes))


def check_labels(smallest: int, largest: int, names: Sequence[str] | None, where: str) -> None:
    """Raise :class:`UserError` for labels that are no class numbers: below -1 (none), or beyond the `names`."""
    if smallest < UNLABELLED:
        raise UserError(f"data.label_column: {where} has the label {smallest}; expected 0, 1, 2, … (-1: no label)")
    if names is not None and largest >= len(names):
        raise UserError(f"data.label_column: {where} has the label {largest}, but only {len(names)} classes, from 0 on")
    if names is None and largest > LARGEST:
        raise UserError(
            f"data.label_column: {where} has the label {largest}; numbers without names are classes from 0 on, at most "
            f"{LARGEST}. Cast the column to text, and each value is a class of its own"
        )


def plain_names(largest: int) -> tuple[str, ...]:
    """Names of classes that are only numbers, up to the largest label."""
    return tuple(str(i) for i in range(largest + 1))
