"""What is wrong with a recipe, in one line: place, key, what was expected, nearest name."""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from kd_hf.errors import nearest
from kd_hf.recipe.config import MethodBlock

if TYPE_CHECKING:
    from kd_hf.recipe.tree import Keys, Tree

_UNION_TAGS = ("float", "int", "bool", "str", "Ramp")
_LONGEST_VALUE = 80  # characters of a wrong value that a message shows


def explain(error: ValidationError, tree: Tree, model: type[BaseModel], prefix: Keys) -> str:
    """One line for one problem of a validation: place, key, what was expected, nearest name."""
    problem = _most_telling(error.errors(include_url=False))
    unknown, loc = problem["type"] == "extra_forbidden", problem["loc"]
    # an unknown key may look like a union's member, so the last part of its location stays
    steps = tuple(key for i, key in enumerate(loc) if not _is_union_tag(key) or (unknown and i == len(loc) - 1))
    keys = (*prefix, *steps)
    dotted = ".".join(str(key) for key in keys)
    place = tree.place(keys)
    if unknown:
        known = _fields_at(model, steps[:-1])
        if prefix:  # a method's block holds its own options beside the recipe's
            known = [*known, *MethodBlock.model_fields]
        return f"{place}: unknown key '{dotted}'.{nearest(str(keys[-1]), known)}"
    if problem["type"] == "missing":
        if isinstance(keys[-1], int):
            return f"{place}: '{dotted.rpartition('.')[0]}' needs more than {keys[-1]} values"
        return f"{place}: '{dotted}' is missing"
    return f"{place}: {dotted + ': ' if dotted else ''}{_expected(problem)}"


def _most_telling(problems: Sequence[Any]) -> Any:
    """The problem to speak of: a misspelt key before what is missing for it, else the first.

    Where a value fits no member of a union, the member counts in which validation got furthest.
    """
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return problem
    first = problems[0]
    if not (first["loc"] and _is_union_tag(first["loc"][-1])):
        return first
    stem = first["loc"][:-1]
    tried = [problem for problem in problems if problem["loc"][: len(stem)] == stem]
    return max(tried, key=lambda p: (len(p["loc"]), not p["type"].endswith(("_type", "_parsing"))))


def _expected(problem: Any) -> str:
    """What was expected and what was given instead."""
    given = repr(problem["input"])
    given = given if len(given) <= _LONGEST_VALUE else given[:_LONGEST_VALUE] + "…"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "dict_type"):
        return f"expected a block of `key: value` pairs (got {given})"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if problem["type"] == "literal_error":
        message += "." + nearest(str(problem["input"]), re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    return f"{message} (got {given})"


def _is_union_tag(key: Any) -> bool:
    """pydantic puts the tried member of a union into the location (`float`, `Ramp`); recipes have no such key."""
    return isinstance(key, str) and (key in _UNION_TAGS or "[" in key)


def _fields_at(model: type[BaseModel], keys: Sequence[Any]) -> list[str]:
    """Names a user could have written inside the block at `keys`."""
    current: Any = model
    for key in keys:
        fields = getattr(current, "model_fields", {})
        annotation = fields[key].annotation if key in fields else current
        current = next(
            (part for part in _flatten(annotation) if isinstance(part, type) and issubclass(part, BaseModel)), None
        )
    return list(getattr(current, "model_fields", {}))


def _flatten(annotation: Any) -> list[Any]:
    parts = typing.get_args(annotation)
    return [annotation] if not parts else [leaf for part in parts for leaf in _flatten(part)]
