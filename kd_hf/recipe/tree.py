"""Nested values of a recipe, and the place each was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Keys = tuple[str, ...]


@dataclass
class Tree:
    """Nested values, and for each key path the place it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Sequence[Any]) -> str:
        """The place of `keys` or of the nearest enclosing block."""
        path = tuple(str(key) for key in keys)
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def merge(self, other: Tree) -> None:
        """Lay `other` over this tree: blocks are merged, everything else is replaced."""
        _merge(self.values, other.values)
        self.places.update(other.places)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value
