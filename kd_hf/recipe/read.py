"""Reading a recipe: YAML with `base:` fragments and `key=value` overrides → a validated :class:`Recipe`.

Every message about a recipe names the file and the line (or the override) it came from. No torch here except
to check a method's own options.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from kd_hf.errors import UserError, nearest
from kd_hf.recipe.cells import CELLS, with_cell
from kd_hf.recipe.config import TASK, MethodBlock, Recipe, task_named
from kd_hf.recipe.messages import explain
from kd_hf.recipe.tree import Tree

if TYPE_CHECKING:
    from kd_hf.recipe.tree import Keys


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


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``block.key=value`` strings; values are read as YAML.

    Raises:
        UserError: on anything wrong, naming file and line (or the override) and the nearest valid name.
    """
    above = Tree()
    for override in overrides:
        above.merge(_read_override(override))
    return _validated(with_cell(_read_with_bases(Path(path), (), ""), above))


def make_recipe(values: Mapping[str, Any], place: str) -> Recipe:
    """Validate a recipe given as nested values; messages about it start with `place`.

    Raises:
        UserError: on anything wrong, with the nearest valid name.
    """
    return _validated(with_cell(Tree(copy.deepcopy(dict(values)), {(): place}), Tree()))


def _validated(tree: Tree) -> Recipe:
    methods = tree.values.get("methods")
    if isinstance(methods, dict):
        _check_method_names(methods, tree)
        kept = {name: {} if block is None else block for name, block in methods.items() if block is not False}
        tree.values["methods"] = kept
    try:
        recipe = Recipe.model_validate(tree.values)
    except ValidationError as error:
        raise UserError(explain(error, tree, Recipe, ())) from None
    return recipe.model_copy(update={"methods": _with_all_options(recipe, tree)})


def _check_method_names(methods: Mapping[str, Any], tree: Tree) -> None:
    from kd_hf.methods import method_names

    known = {TASK, *method_names(task_named(tree.values))}
    for name, block in methods.items():
        method = (block.get("method") if isinstance(block, dict) else None) or name
        if method not in known:
            place = tree.place(("methods", name))
            raise UserError(f"{place}: unknown method '{method}'.{nearest(str(method), known)}")


def _with_all_options(recipe: Recipe, tree: Tree) -> dict[str, MethodBlock]:
    """Check the methods' own options and write out their defaults, so that the resolved recipe says everything."""
    from kd_hf.methods import get_method

    teachers = recipe.all_teachers()
    blocks = {}
    for name, block in recipe.methods.items():
        where, config = ("methods", name), get_method(recipe.method_of(name), recipe.task).Config
        try:
            options = config.model_validate(block.options).model_dump(mode="json")
        except ValidationError as error:
            raise UserError(explain(error, tree, config, where)) from None
        if block.teacher is not None and block.teacher not in teachers:
            place = tree.place((*where, "teacher"))
            hint = nearest(block.teacher, teachers)
            raise UserError(f"{place}: methods.{name}.teacher: no teacher '{block.teacher}'.{hint}")
        own = {key: getattr(block, key) for key in block.model_fields_set & MethodBlock.model_fields.keys()}
        blocks[name] = MethodBlock.model_validate({**own, **options})
    return blocks


def _read_with_bases(path: Path, above: tuple[Path, ...], named_at: str) -> Tree:
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
    merged = Tree()
    for base in bases:
        merged.merge(_read_with_bases(path.parent / base, (*above, path.resolve()), place))
    merged.merge(own)
    return merged


def _read_file(path: Path, named_at: str) -> Tree:
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
    tree = Tree(places={(): str(path)})
    try:
        tree.values = _construct(node, (), tree.places, str(path))
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: an alias contains itself") from None
    cells = tree.values.get(CELLS)
    for values in [tree.values, *(cells.values() if isinstance(cells, dict) else ())]:
        if isinstance(values, dict):
            _resolve_files(values, path.parent)
    return tree


def _resolve_files(values: dict[str, Any], folder: Path) -> None:
    """Recipes named in a file are relative to it."""
    named = values.get("teachers")
    for block in [values.get("teacher"), *(named.values() if isinstance(named, dict) else ())]:
        if isinstance(block, dict) and isinstance(block.get("recipe"), str):
            block["recipe"] = os.path.normpath(folder / block["recipe"])


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


def _read_override(text: str) -> Tree:
    name, equals, value = text.partition("=")
    keys = tuple(name.strip().lstrip("-").split("."))
    if not equals or not all(keys):
        raise UserError(f"'{text}' is not an override; write block.key=value, e.g. train.learning_rate=1e-3")
    try:
        leaf: Any = yaml.load(value, Loader=_Loader)  # a SafeLoader subclass
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"override '{text}': the value is not valid YAML: {_reason(error)}") from None
    tree = Tree(places={keys[: i + 1]: f"override '{text}'" for i in range(len(keys))})
    for key in reversed(keys):
        leaf = {key: leaf}
    tree.values = leaf
    return tree
