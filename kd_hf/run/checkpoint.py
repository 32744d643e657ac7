"""Checkpoints as folders that either exist whole or not at all, and what is kept of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.files import FileSum, atomic_folder, digest, remove, tidy
from kd_hf.run.state import CheckpointState, state_of

PREFIX = "checkpoint-"
STATE = "state.json"
_DIGITS = "[0-9]{1,18}"


def save_checkpoint(
    folder: Path,
    state: CheckpointState,
    tensors: Mapping[str, Mapping[str, Tensor]],
    objects: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write one checkpoint folder atomically.

    Args:
        folder: e.g. ``runs/x/checkpoints/checkpoint-300``.
        state: written as ``state.json``, with the size and the checksum of each other file.
        tensors: file stem → flat state dict, written as safetensors.
        objects: file stem → state dict of tensors and plain numbers (optimiser), written by torch.

    Raises:
        UserError: the disk is full or may not be written to, or something else has the folder's name.
    """
    if folder.exists() and not (folder / STATE).is_file():
        raise UserError(f"{folder} is in the way: it is no checkpoint of kd_hf; move it elsewhere")
    with atomic_folder(folder) as temporary:
        for name, values in tensors.items():
            # contiguous copies: safetensors refuses views and tensors that share memory
            flat = {key: value.detach().cpu().contiguous().clone() for key, value in values.items()}
            save_file(flat, temporary / f"{name}.safetensors", metadata={"format": "pt"})
        for name, values in objects.items():
            with (temporary / f"{name}.pt").open("wb") as file:  # torch's own file hides why writing failed
                torch.save(dict(values), file)
        files = {path.name: asdict(FileSum.of(path)) for path in sorted(temporary.iterdir())}
        content = json.loads(json.dumps({**state.plain(), "files": files}))  # as it will be read
        text = json.dumps({**content, "sum": _sum_of(content)}, indent=1)
        (temporary / STATE).write_text(text, encoding="utf-8")


def _sum_of(content: Mapping[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def read_state(folder: Path) -> CheckpointState:
    """The state of a checkpoint; its other files are left to :func:`check_files`.

    Raises:
        UserError: it is not there, damaged, or of another version.
    """
    return state_of(_content(folder), folder)


def _content(folder: Path) -> dict[str, Any]:
    """``state.json``, whose own sum is compared."""
    try:
        content: Any = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{folder} is not a kd_hf checkpoint: it has no readable {STATE}") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder} is damaged: {STATE} lacks what belongs in it")
    expected = content.pop("sum", None)
    if content.get("format") != 1 and expected != _sum_of(content):
        raise UserError(f"{folder} is damaged: {STATE} is not as it was written")
    return content


def files_of(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint beside ``state.json``, and what each must be; before checksums were taken, the size."""
    files = _content(folder)["files"]
    try:
        return {name: FileSum(value) if isinstance(value, int) else FileSum(**value) for name, value in files.items()}
    except TypeError:
        raise UserError(f"{folder} is damaged: {STATE} lacks what belongs in it") from None


def check_files(folder: Path) -> None:
    """Raise :class:`UserError` unless every file of a checkpoint is as it was written."""
    for name, expected in files_of(folder).items():
        if fault := expected.fault(folder / name):
            raise UserError(f"{folder} is damaged: {name} {fault}")


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
    named = (path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(_DIGITS, path.name.removeprefix(PREFIX)))
    return sorted((path for path in named if (path / STATE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint folder's name; -1 for another name."""
    digits = checkpoint.name.removeprefix(PREFIX)
    return int(digits) if re.fullmatch(_DIGITS, digits) else -1


def prune(folder: Path, keep: int | None, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`. None keeps all."""
    if keep is None:
        return
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best:
            remove(path)


def tidy_checkpoints(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or pruned."""
    if folder.is_dir():
        names = {path.name.partition(PREFIX)[2] for path in folder.glob(f".*-{PREFIX}*")}
        tidy(folder, [f"{PREFIX}{name}" for name in names])
