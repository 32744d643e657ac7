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
# methods for detectors, by the file of kd_hf/detection that holds them
FOR_BOXES = {
    "detection": "criterion",
    "vidt_tokens": "token_matching",
    "vkd_tokens": "token_matching",
    "detr_tokens": "detr_tokens",
    "detr_kd": "detr_kd",
}
_NOT_METHODS = ("base", "cross_attention", "features", "losses", "orthogonal", "projectors")


@cache
def method_names(boxes: bool = False) -> tuple[str, ...]:
    """Names of all methods for classifiers, or for detectors: ours, and those other packages register.

    Args:
        boxes: for detectors.
    """
    own = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_METHODS]
    others = (entry.name for entry in entry_points(group=ENTRY_POINTS))
    return tuple(sorted({*(FOR_BOXES if boxes else own), *others}))


def get_method(name: str) -> type[Method]:
    """Return the method class called `name`. Raises :class:`UserError` with the nearest name."""
    from kd_hf.methods.base import Method

    known = {*method_names(), *method_names(boxes=True)}
    if name not in known:
        raise UserError(f"unknown method '{name}'.{nearest(name, known)}")
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
    place = f"kd_hf.detection.{FOR_BOXES[name]}" if name in FOR_BOXES else f"{__name__}.{name}"
    module = importlib.import_module(place)
    classes = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Method))
    return next(value for value in classes if getattr(value, "name", None) == name)
