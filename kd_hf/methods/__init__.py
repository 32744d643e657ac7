"""Distillation methods, one file each; the file's name is the method's name. No torch until one is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, nearest
from kd_hf.task_table import BUILT_IN, DEFAULT, task_entry

if TYPE_CHECKING:
    from kd_hf.methods.base import Method

ENTRY_POINTS = "kd_hf.methods"
_NOT_METHODS = ("base", "cross_attention", "features", "losses", "orthogonal", "projectors", "ranks", "stages")


@cache
def method_names(task: str = DEFAULT) -> tuple[str, ...]:
    """Names of all methods for a task: ours, and those other packages register."""
    others = (entry.name for entry in entry_points(group=ENTRY_POINTS))
    return tuple(sorted({*(task_entry(task).methods or _shared()), *others}))


@cache
def _shared() -> Mapping[str, str]:
    """The methods in this folder, which read logits, maps and tokens of any network: name → module."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return {name: f"{__name__}.{name}" for name in names if name not in _NOT_METHODS}


@cache
def _modules() -> Mapping[str, str]:
    """All methods of this package: name → module."""
    tasks = (entry.methods for entry in BUILT_IN.values())
    return {name: module for methods in (_shared(), *tasks) for name, module in methods.items()}


@cache
def get_method(name: str, task: str = DEFAULT) -> type[Method]:
    """Return the method class called `name`, one of ours or that of a task.

    Raises:
        UserError: there is none, with the nearest name; another package's does not load or is no method; or another
            package takes the name of a method that is there without it.
    """
    from kd_hf.methods.base import Method

    modules = {**task_entry(task).methods, **_modules()}
    if name not in modules and name not in method_names(task):
        raise UserError(f"unknown method '{name}'.{nearest(name, {*modules, *method_names(task)})}")
    registered = _registered(name)
    if registered is not None:
        return _load(registered)
    module = importlib.import_module(modules[name])
    classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method))
    return next(value for value in classes if getattr(value, "name", None) == name)


def _registered(name: str) -> EntryPoint | None:
    """Another package's method of that name; raises :class:`UserError` where the name is not its own."""
    found = sorted(entry_points(group=ENTRY_POINTS, name=name), key=_package)
    if found and name in _modules():
        raise UserError(
            f"the method '{name}' is kd_hf's own, but the package {_package(found[0])} registers another one "
            f"({found[0].value}) in the entry points {ENTRY_POINTS}; rename it there, or uninstall the package"
        )
    if len(found) > 1:
        places = " and ".join(f"{_package(entry)} ({entry.value})" for entry in found[:2])
        raise UserError(
            f"two packages register a method '{name}': {places}, in the entry points {ENTRY_POINTS}; rename one, or "
            "uninstall its package"
        )
    return found[0] if found else None


def _package(entry: EntryPoint) -> str:
    return f"'{entry.dist.name if entry.dist else entry.module}'"


def _load(entry: EntryPoint) -> type[Method]:
    from kd_hf.methods.base import Method

    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the entry point '{entry.name}' of group {ENTRY_POINTS} ({entry.value}) does not load: {error}"
        ) from error
    if isinstance(found, type) and issubclass(found, Method):
        return found
    raise UserError(f"the entry point '{entry.name}' of group {ENTRY_POINTS} is not a Method class: {found!r}")
