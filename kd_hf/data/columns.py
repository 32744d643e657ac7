"""Which columns of a table hold the images and the labels, and what their cells mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_hf.data.source import UNLABELLED
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import DataConfig

if TYPE_CHECKING:
    import pyarrow

LABEL_NAMES = ("label", "labels")
LABEL_TYPES = ("int", "uint", "bool", "float", "string", "large_string")


@dataclass(frozen=True)
class Columns:
    """The two columns that are read, and the names of the classes (None: integers without names)."""

    image: str
    label: str
    class_names: tuple[str, ...] | None
    plain: bool = True
    """Whether labels are class numbers as they are, and not something that has to be numbered."""


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
    if not (isinstance(feature, Value) and feature.dtype.startswith(LABEL_TYPES)):
        raise UserError(f"data.label_column: '{label}' holds {_type_name(feature)}, expected class numbers or names")
    return Columns(image, label, None, plain="int" in feature.dtype)


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


def image_bytes(value: Any) -> bytes:
    """The bytes of an undecoded image cell: binary, or a struct of bytes and path. Raises OSError for an empty one."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"] or "").read_bytes()
    if value is None:
        raise OSError("the cell is empty")
    return bytes(value)


def int_labels(column: pyarrow.ChunkedArray, where: str) -> np.ndarray:
    """Class numbers of any integer type as int64 ``[N]``, -1 where the cell is empty."""
    import pyarrow

    try:
        wide = column.cast(pyarrow.int64())
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data.label_column: {where} has a label that is no class number: {error}") from None
    return wide.fill_null(UNLABELLED).to_numpy()
