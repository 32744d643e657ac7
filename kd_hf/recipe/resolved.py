"""The resolved form of a recipe: everything written out, hashed, as YAML and as a schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_hf.errors import UserError
from kd_hf.layout import RESOLVED
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe

HASH_LINE = "# recipe hash: "

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


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with its hash in the first line; loading it gives the same recipe."""
    values = resolved(recipe)
    return f"{HASH_LINE}{recipe_hash(recipe)}\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, methods' defaults written out (a recipe made in Python may leave them open)."""
    from kd_hf.methods import get_method

    values = recipe.model_dump(mode="json")
    for name, block in recipe.methods.items():
        config = get_method(recipe.method_of(name), recipe.task).Config
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
        return first.removeprefix(HASH_LINE) if first.startswith(HASH_LINE) else None


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Everything of a resolved recipe that decides the result (not output folder, workers, logging)."""
    values = resolved(recipe)
    values["train"] = {key: value for key, value in values["train"].items() if key not in _NOT_HASHED}
    for teacher in (values["teacher"], *values["teachers"].values()):
        if teacher is not None:
            del teacher["shard"]  # how a teacher is held in memory changes nothing it says
            teacher["store"] = teacher["store"] is not None  # wherever it lies, it must fit the recipe
    del values["data"]["hold"]
    del values["cell"], values["published"]
    del values["baseline"], values["hub"], values["eval"]["report"], values["eval"]["report_samples"]
    return values


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits over :func:`decisive`."""
    return hashlib.sha256(json.dumps(decisive(recipe), sort_keys=True).encode()).hexdigest()[:12]


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
    changed = {key: value for key, value in schema["properties"].items() if key not in ("cell", "base")}
    schema["properties"]["cells"] = {
        "type": "object",
        "description": "A table of runs: changes to this recipe, by name.",
        "additionalProperties": {"type": "object", "properties": changed, "additionalProperties": False},
    }
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
