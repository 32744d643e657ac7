"""Tensors written as safetensors, aligned so that every reader computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LINE = 64  # bytes: what torch's own allocations are aligned to
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write CPU tensors as safetensors, each on the widest boundary of the file, up to 64 bytes, that its size allows.

    Readers map the file into memory, and matrix kernels round differently on weights that start off a boundary.
    The format allows padding after the header only, so the tensors are ordered by the power of two in their size:
    each then starts on a multiple of it.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_alignment(item[1].nbytes), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _LINE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _alignment(size: int) -> int:
    """The largest power of two that divides a number of bytes, 64 at most."""
    return min(size & -size, _LINE) if size else _LINE
