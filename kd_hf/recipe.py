"""Reading a recipe: YAML with `base:` fragments and `key=value` overrides → a validated, hashed :class:`Recipe`.

Every message about a recipe names the file and the line (or the override) it came from. No torch here except
to check a method's own options.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kd_hf.config import TASK, MethodBlock, Recipe
from kd_hf.errors import UserError, nearest

Keys = tuple[str, ...]

RESOLVED = "recipe.resolved.yaml"
_UNION_TAGS = ("float", "int", "bool", "str", "Ramp")
_LONGEST_VALUE = 80  # characters of a wrong value that a message shows
_HASH_LINE = "# recipe hash: "

# what may change between a run and its resumption, or from machine to machine, without changing the result
_NOT_HASHED = (
    "output_dir",
    "per_device_train_batch_size",  # with the next two: their product is checked instead
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "logging_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "disable_tqdm",
    "cpu_threads",
    "use_cpu",
)


_BOOL, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, `no` and `2026-01-31` are words (YAML 1.1 differs in all three)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in (_BOOL, _TIMESTAMP)]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class _Tree:
    """Nested values, and for each key path the place it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Sequence[Any]) -> str:
        """The place of `keys` or of the nearest enclosing block."""
        path = tuple(str(key) for key in keys)
        while path not in self.places and path:
            path = path[:-1]
        return self.places.get(path, "recipe")

    def merge(self, other: _Tree) -> None:
        """Lay `other` over this tree: blocks are merged, everything else is replaced."""
        _merge(self.values, other.values)
        self.places.update(other.places)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``block.key=value`` strings; values are read as YAML.

    Raises:
        UserError: on anything wrong, naming file and line (or the override) and the nearest valid name.
    """
    tree = _read_with_bases(Path(path), (), "")
    for override in overrides:
        tree.merge(_read_override(override))
    return _validated(tree)


def make_recipe(values: Mapping[str, Any], place: str) -> Recipe:
    """Validate a recipe given as nested values; messages about it start with `place`.

    Raises:
        UserError: on anything wrong, with the nearest valid name.
    """
    return _validated(_Tree(copy.deepcopy(dict(values)), {(): place}))


def _validated(tree: _Tree) -> Recipe:
    methods = tree.values.get("methods")
    if isinstance(methods, dict):
        _check_method_names(methods, tree)
        kept = {name: {} if block is None else block for name, block in methods.items() if block is not False}
        tree.values["methods"] = kept
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise UserError(_explain(error, tree, Recipe, ())) from None
    return recipe.model_copy(update={"methods": _with_all_options(recipe, tree)})


def _check_method_names(methods: Mapping[str, Any], tree: _Tree) -> None:
    from kd_hf.methods import method_names

    data = tree.values.get("data")
    boxes = isinstance(data, dict) and data.get("boxes") is not None
    known = {TASK, *method_names(boxes)}
    for name, block in methods.items():
        method = (block.get("method") if isinstance(block, dict) else None) or name
        if method not in known:
            place = tree.place(("methods", name))
            raise UserError(f"{place}: unknown method '{method}'.{nearest(str(method), known)}")


def _with_all_options(recipe: Recipe, tree: _Tree) -> dict[str, MethodBlock]:
    """Check the methods' own options and write out their defaults, so that the resolved recipe says everything."""
    from kd_hf.methods import get_method

    teachers = recipe.all_teachers()
    blocks = {}
    for name, block in recipe.methods.items():
        where, config = ("methods", name), get_method(recipe.method_of(name)).Config
        try:
            options = config.model_validate(block.options).model_dump(mode="json")
        except ValidationError as error:
            raise UserError(_explain(error, tree, config, where)) from None
        if block.teacher is not None and block.teacher not in teachers:
            place = tree.place((*where, "teacher"))
            hint = nearest(block.teacher, teachers)
            raise UserError(f"{place}: methods.{name}.teacher: no teacher '{block.teacher}'.{hint}")
        own = {key: getattr(block, key) for key in block.model_fields_set & MethodBlock.model_fields.keys()}
        blocks[name] = MethodBlock.model_validate({**own, **options})
    return blocks


# ---------------------------------------------------------------------------------------------- reading


def _read_with_bases(path: Path, above: tuple[Path, ...], named_at: str) -> _Tree:
    """Read a file over its fragments; `above` are the files that led here, `named_at` is where this one was named."""
    if path.resolve() in above:
        chain = " → ".join(p.name for p in (*above, path))
        raise UserError(f"{named_at}: `base:` fragments include each other: {chain}")
    own = _read_file(path, named_at)
    place = own.place(("base",))
    bases = own.values.pop("base", None) or []
    if isinstance(bases, str):
        bases = [bases]
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise UserError(f"{place}: `base` is a list of YAML files")
    merged = _Tree()
    for base in bases:
        merged.merge(_read_with_bases(path.parent / base, (*above, path.resolve()), place))
    merged.merge(own)
    return merged


def _read_file(path: Path, named_at: str) -> _Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        folder = path.parent if path.parent.is_dir() else Path()
        hint = nearest(path.name, [p.name for p in folder.glob("*.yaml")])
        missing = f"{named_at}: base: no file '{path}'" if named_at else f"no recipe '{path}'"
        raise UserError(f"{missing}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe '{path}': {error}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {_reason(error)}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a mapping of blocks such as `student:`, `data:`, `train:`")
    tree = _Tree(places={(): str(path)})
    try:
        tree.values = _construct(node, (), tree.places, str(path))
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: an alias contains itself") from None
    named = tree.values.get("teachers")
    for block in [tree.values.get("teacher"), *(named.values() if isinstance(named, dict) else ())]:
        if isinstance(block, dict) and isinstance(block.get("recipe"), str):  # files named in a file are relative to it
            block["recipe"] = os.path.normpath(path.parent / block["recipe"])
    return tree


def _construct(node: yaml.Node, keys: Keys, places: dict[Keys, str], file: str) -> Any:
    """The value of a YAML node; records the line of every mapping key."""
    if not isinstance(node, yaml.MappingNode):
        try:
            return _Loader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:  # a foreign tag; a value that its tag does not fit
            raise UserError(f"{file}:{node.start_mark.line + 1}: not valid YAML: {_reason(error)}") from None
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{place}: a key must be a single word")
        key = str(key_node.value)
        if key in values:
            raise UserError(f"{place}: '{'.'.join((*keys, key))}' is written twice")
        places[(*keys, key)] = place
        values[key] = _construct(value_node, (*keys, key), places, file)
    return values


def _reason(error: Exception) -> str:
    """What YAML says is wrong, on one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _read_override(text: str) -> _Tree:
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().lstrip("-").split("."))
    if not equals or not all(keys):
        raise UserError(f"'{text}' is not an override; write block.key=value, e.g. train.learning_rate=1e-3")
    try:
        leaf: Any = yaml.load(value, Loader=_Loader)  # a SafeLoader subclass
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override '{text}': the value is not valid YAML: {_reason(error)}") from None
    tree = _Tree(places={keys[: i + 1]: f"override '{text}'" for i in range(len(keys))})
    for key in reversed(keys):
        leaf = {key: leaf}
    tree.values = leaf
    return tree


# --------------------------------------------------------------------------------------------- messages


def _explain(error: ValidationError, tree: _Tree, model: type[BaseModel], prefix: Keys) -> str:
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


# ----------------------------------------------------------------------------------------- resolved form


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with its hash in the first line; loading it gives the same recipe."""
    values = _resolved(recipe)
    return f"{_HASH_LINE}{recipe_hash(recipe)}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, methods' defaults written out (a recipe made in Python may leave them open)."""
    from kd_hf.methods import get_method

    values = recipe.model_dump(mode="json")
    for name, block in recipe.methods.items():
        config = get_method(recipe.method_of(name)).Config
        values["methods"][name] |= config.model_validate(block.options).model_dump(mode="json")
    return values


def trained_hash(artefact: Path) -> str | None:
    """Hash of the recipe that made an artefact or run folder; None when it is missing or says nothing.

    It is taken anew from the resolved recipe, so that a key added by a newer version does not make it another one.
    """
    path = artefact / RESOLVED
    if not path.is_file():
        return None
    try:
        return recipe_hash(load_recipe(path))
    except UserError:  # of a version whose keys are gone
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        return first.removeprefix(_HASH_LINE) if first.startswith(_HASH_LINE) else None


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits over everything that decides the result (not output folder, workers, logging)."""
    values = _resolved(recipe)
    values["train"] = {key: value for key, value in values["train"].items() if key not in _NOT_HASHED}
    for teacher in (values["teacher"], *values["teachers"].values()):
        if teacher is not None:
            del teacher["shard"]  # how a teacher is held in memory changes nothing it says
            teacher["store"] = teacher["store"] is not None  # wherever it lies, it must fit the recipe
    del values["data"]["hold"]
    del values["baseline"], values["hub"], values["eval"]["report"], values["eval"]["report_samples"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, methods' options included, so that editors complete it."""
    from kd_hf.methods import get_method, method_names

    schema = Recipe.model_json_schema()
    block = schema["$defs"].pop("MethodBlock")
    properties = {}
    for name in method_names():
        own = get_method(name).Config.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"].update(own.pop("$defs", {}))
        merged = {**own.get("properties", {}), **block["properties"]}
        properties[name] = {
            "anyOf": [{"type": "object", "properties": merged, "additionalProperties": False}, {"type": "null"},
                      {"const": False}],
            "description": (get_method(name).__doc__ or "").strip().splitlines()[0],
        }  # fmt: skip
    schema["properties"]["methods"] = {
        "type": "object",
        "description": schema["properties"]["methods"].get("description", ""),
        "properties": properties,
        # a block of another name says which method it is
        "additionalProperties": {"type": "object", "required": ["method"]},
    }
    schema["properties"]["base"] = {"type": ["array", "string"], "items": {"type": "string"},
                                    "description": "Fragments that this recipe is laid over."}  # fmt: skip
    schema["title"] = "kd_hf recipe"
    return schema


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | int | bool]:
    """Nested recipe values under dotted names; trackers take scalars only."""
    result: dict[str, str | float | int | bool] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{name}.")
        elif value is not None:
            result[name] = value if isinstance(value, (str, float, int, bool)) else str(value)
    return result
