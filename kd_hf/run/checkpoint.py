"""Checkpoints as folders that either exist whole or not at all, and what is kept of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.files import atomic_folder

PREFIX = "checkpoint-"
STATE = "state.json"
FORMAT = 1


def save_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    objects: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write one checkpoint folder atomically.

    Args:
        folder: e.g. ``runs/x/checkpoints/checkpoint-300``.
        state: JSON values (step, recipe hash, …), written as ``state.json``.
        tensors: file stem → flat state dict, written as safetensors.
        objects: file stem → state dict of tensors and plain numbers (optimiser), written by torch.
    """
    with atomic_folder(folder) as temporary:
        for name, values in tensors.items():
            # contiguous copies: safetensors refuses views and tensors that share memory
            flat = {key: value.detach().cpu().contiguous().clone() for key, value in values.items()}
            save_file(flat, temporary / f"{name}.safetensors", metadata={"format": "pt"})
        for name, values in objects.items():
            with (temporary / f"{name}.pt").open("wb") as file:  # torch's own file hides why writing failed
                torch.save(dict(values), file)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        text = json.dumps({**state, "format": FORMAT, "files": sizes}, indent=1)
        (temporary / STATE).write_text(text, encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, after checking that every file is there and whole."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is not a kd_hf checkpoint: it has no readable {STATE}") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{folder} was written by another version of kd_hf (format {state.get('format')})")
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{folder} is damaged: {name} is missing or has another size; use an earlier checkpoint")
    return state


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """A state dict written by :func:`save_checkpoint` under `tensors`, on the CPU."""
    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: cannot read {name}.safetensors ({error})") from None


def load_objects(folder: Path, name: str) -> dict[str, Any]:
    """A state dict written under `objects`; only tensors and plain values are unpickled."""
    try:
        return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{folder} is damaged: cannot read {name}.pt ({error})") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / STATE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint folder's name."""
    digits = checkpoint.name.removeprefix(PREFIX)
    return int(digits) if digits.isdigit() else -1


def prune(folder: Path, keep: int | None, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`. None keeps all."""
    if keep is None:
        return
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best:
            shutil.rmtree(path)
