"""One file per family of methods: what their recorded files call things, and how they are run.

A file in this folder is found by itself. It has ``LAYOUTS``, method → names of files that give input tensors (also
``method/kind`` where the hyper-parameter `kind` decides), and where such a table is not enough ``CASES``,
method → what opens a file.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType

from tests.goldens.case import Case, KeyedCase
from tests.goldens.layout import Layout
from tests.goldens.record import Golden


@cache
def _modules() -> tuple[ModuleType, ...]:
    return tuple(import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))


def layouts() -> Mapping[str, Layout]:
    """The tables of all families."""
    return {name: layout for module in _modules() for name, layout in getattr(module, "LAYOUTS", {}).items()}


def openers() -> Mapping[str, Callable[[Golden], Case | KeyedCase]]:
    """What opens the files of methods for which a table is not enough."""
    return {name: opener for module in _modules() for name, opener in getattr(module, "CASES", {}).items()}
