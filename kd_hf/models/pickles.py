"""Weights that exist as pickles only: read as tensors and nothing else, where a user allows it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import torch
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.models.safetensors import write_safetensors

PICKLES = "pytorch_model*.bin"


def with_safetensors(folder: Path, target: Path) -> Path:
    """Write the model folder anew with its pickled state dict as safetensors; returns `target`.

    Raises:
        UserError: there is no pickle, or one holds more than tensors in a dictionary (nothing else is ever unpickled).
    """
    files = sorted(folder.glob(PICKLES))
    if not files:
        raise UserError(f"{folder} holds neither safetensors nor {PICKLES}")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
            raise UserError(f"{file.name} is no plain state dict of tensors: {str(error).splitlines()[0]}") from None
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    # clones, because tensors that share memory are written twice
    write_safetensors(target / "model.safetensors", {name: value.clone() for name, value in state.items()})
    return target
