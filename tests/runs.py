"""Tiny runs for tests: recipes over scikit-learn's digits, and what they leave behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from kd_hf.methods import get_method
from kd_hf.recipe.config import Recipe
from kd_hf.run.checkpoint import list_checkpoints

ROOT = Path(__file__).parents[1]
RECIPE: dict[str, Any] = {
    "student": {"model": "test_vit"},
    "data": {"path": "builtin:digits", "image_size": 32, "augment": {"crop": {"kind": "pad"}}},
    "train": {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 128,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "use_cpu": True,
        "cpu_threads": 1,
    },
    "eval": {"max_samples": 64, "report": False},
}
TEACHER = {"model": "test_resnet", "pretrained": False, "num_classes": 10, "gate": {"enabled": False}}


def chosen(recipe: Recipe, name: str, named: Collection[str]) -> dict[str, Any]:
    """Options of a block of `methods` that are named, or that are not the method's defaults."""
    method = get_method(recipe.method_of(name))
    options = method.Config.model_validate(recipe.methods[name].options).model_dump(mode="json")
    defaults = method.Config().model_dump(mode="json")
    return {key: value for key, value in options.items() if key in named or value != defaults[key]}


def merged(*blocks: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other."""
    result: dict[str, Any] = {}
    for block in blocks:
        for key, value in block.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def recipe(folder: Path, *blocks: dict[str, Any]) -> Recipe:
    """A tiny recipe writing to `folder`, with `blocks` laid over it."""
    return Recipe.model_validate(merged(RECIPE, {"train": {"output_dir": str(folder)}}, *blocks))


def recipe_file(path: Path, folder: Path, *blocks: dict[str, Any]) -> Path:
    """The same, as a YAML file."""
    path.write_text(yaml.safe_dump(merged(RECIPE, {"train": {"output_dir": str(folder)}}, *blocks)))
    return path


def command(*args: str) -> list[str]:
    """``python -m …`` with this interpreter."""
    return [sys.executable, "-m", *args]


def environment() -> dict[str, str]:
    """The environment of a subprocess: one thread, no network, this checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "RANK", "WORLD"))}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(*args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python -m …`` to its end."""
    return subprocess.run(
        command(*args), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def final_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a run's last checkpoint, by ``file/key``."""
    last = list_checkpoints(folder / "checkpoints")[-1]
    return {
        f"{path.stem}/{key}": value for path in last.glob("*.safetensors") for key, value in load_file(path).items()
    }


def assert_same_tensors(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Equal keys, and values equal to the bit."""
    assert left.keys() == right.keys()
    different = [key for key in left if not left[key].equal(right[key])]
    assert not different, different
