"""Where a network looks: attention of its class token, or the energy of its last feature map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import TappedModel
from kd_hf.report.probe import shadow

SMALLEST_MAP = 4  # cells per side; what is coarser shows nothing


@dataclass(frozen=True)
class Gaze:
    """Non-negative maps ``[B, h, w]`` over images, and in words what they are."""

    kind: str
    maps: Tensor


def gaze(handle: ModelHandle, pixels: Tensor) -> Gaze | None:
    """Where a network looks: its class token's attention, else its feature energy; None when it has neither.

    Args:
        handle: the network; it is left as it is.
        pixels: normalised images ``[B, 3, S, S]``.
    """
    return class_attention(handle, pixels) or feature_energy(handle, pixels)


def class_attention(handle: ModelHandle, pixels: Tensor) -> Gaze | None:
    r"""How the class token of the last block weighs the patches, mean over heads.

    Row ``cls`` of :math:`\mathrm{softmax}(q k^\top / \sqrt d)`, without the columns of prefix tokens. Fused kernels
    never hold this matrix, so a copy of the network that shares its weights is run with plain attention.
    None when the network has no class token, or does not show its attention.
    """
    info = handle.info
    if "cls" not in info.prefix:
        return None
    copied = shadow(handle).network
    read = _READERS.get(info.library, _unfused)
    with torch.no_grad():
        weights = read(copied, _fitting(pixels, copied))  # [B, heads, Q, N]
    if weights is None or weights.ndim != 4:
        return None
    # where the class token comes late it is the only query
    query = info.prefix.index("cls") if weights.shape[2] == weights.shape[3] else 0
    patches = weights[:, :, query, len(info.prefix) :].float().mean(1)  # [B, N - P]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        return None
    return Gaze("class-token attention of the last block", patches.unflatten(1, (side, side)).cpu())


def _fitting(pixels: Tensor, network: nn.Module) -> Tensor:
    reference = next(network.parameters())
    return pixels.to(reference.device, reference.dtype)


def _unfused(network: nn.Module, pixels: Tensor) -> Tensor | None:
    """timm's blocks pass the matrix through `attn_drop` when they do not use a fused kernel."""
    found: Any = next((m for m in reversed(list(network.modules())) if hasattr(m, "attn_drop")), None)
    caught: list[Tensor] = []
    if found is None or not isinstance(found.attn_drop, nn.Module):
        return None
    if hasattr(found, "fused_attn"):
        found.fused_attn = False
    found.attn_drop.register_forward_hook(lambda module, args, output: caught.append(output))
    network(pixels)
    return caught[-1] if caught else None


def _eager(network: Any, pixels: Tensor) -> Tensor | None:
    """transformers returns the matrices of its eager attention."""
    network.set_attn_implementation("eager")
    attentions = network(pixels, output_attentions=True).attentions
    return attentions[-1] if attentions else None


_READERS: Mapping[str, Callable[[Any, Tensor], Tensor | None]] = {"transformers": _eager}


def feature_energy(handle: ModelHandle, pixels: Tensor) -> Gaze | None:
    """Mean of squares over the channels of a late feature map: where the features are strong.

    It is the last stage whose map has at least 4 × 4 cells, or the finest where all are coarser. None for a network
    without stages, or when all its maps are single points.
    """
    taps = [f"stage:{index + 1}" for index in range(len(handle.info.stages))]
    copied = shadow(handle)
    with torch.no_grad():
        maps = TappedModel(copied, copied.info, taps)(_fitting(pixels, copied.network)).taps if taps else {}
    fine = [tap for tap in taps if min(maps[tap].shape[2:]) >= SMALLEST_MAP]
    chosen = fine[-1] if fine else max(taps, key=lambda tap: maps[tap].shape[-1], default=None)
    if chosen is None or maps[chosen].shape[-1] == 1:
        return None
    energy = maps[chosen].float().square().mean(1).cpu()  # [B, h, w]
    return Gaze(f"feature energy of stage {chosen.removeprefix('stage:')}", energy)
