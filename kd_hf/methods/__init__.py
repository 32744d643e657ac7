"""Distillation methods, one file each; the file's name is the method's name. No torch until one is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from kd_hf.methods.base import Method

ENTRY_POINTS = "kd_hf.methods"
_NOT_METHODS = ("base", "cross_attention", "features", "losses", "orthogonal", "projectors")


@cache
def method_names() -> tuple[str, ...]:
    """Names of all methods: this folder's and those other packages register under `ENTRY_POINTS`."""
    own = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_METHODS]
    return tuple(sorted({*own, *(entry.name for entry in entry_points(group=ENTRY_POINTS))}))


def get_method(name: str) -> type[Method]:
    """Return the method class called `name`. Raises :class:`UserError` with the nearest name."""
    from kd_hf.methods.base import Method

    if name not in method_names():
        raise UserError(f"unknown method '{name}'.{nearest(name, method_names())}")
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            found = entry.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"the entry point '{name}' of group {ENTRY_POINTS} ({entry.value}) does not load: {error}"
            ) from error
        if isinstance(found, type) and issubclass(found, Method):
            return found
        raise UserError(f"the entry point '{name}' of group {ENTRY_POINTS} is not a Method class: {found!r}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method))
    return next(value for value in classes if getattr(value, "name", None) == name)
