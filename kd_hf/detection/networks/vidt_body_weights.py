"""Weights of ViDT's body out of a Swin classifier's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.text.words import enumerate_names

_ADDED = re.compile(r"backbone\.(det_|layers\.\d+\.blocks\.\d+\.det_)")  # what Swin lacks, beside the last merging
STAGE = r"backbone\.layers\.(\d+)\."


def count_numbers(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many parts are numbered in the names, by the group of `pattern`; raises KeyError where there is none."""
    found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if not found:
        raise KeyError(pattern.replace("\\", ""))
    return max(found) + 1


def body_from_swin(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an ImageNet classifier for the body of a ViDT, to start training from.

    Microsoft's and ViDT's own files have a merging at the end of its stage, timm's at the start of the next.

    Args:
        tensors: the classifier's; its last norm, its head and buffers are left out.

    Returns:
        Weights by the names of ``ViDTForObjectDetection``; what ViDT adds is not among them: [DET] tokens and their
        positions, and the last merging.
    """
    merged = [match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.downsample\.", name))]
    late = 1 if "0" not in merged else 0
    found = {}
    for name, tensor in tensors.items():
        match = re.match(r"layers\.(\d+)\.downsample\.(norm\.weight|norm\.bias|reduction\.weight)$", name)
        if match:
            found[f"backbone.layers.{int(match[1]) - late}.downsample.{match[2]}"] = tensor
        elif re.match(r"patch_embed\.|layers\.\d+\.blocks\.", name) and not name.endswith(("_index", "attn_mask")):
            found[f"backbone.{name}"] = tensor
    return found


def fit_body(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor], swin: str) -> dict[str, Tensor]:
    """All weights of a ViDT's body that an ImageNet classifier has to give.

    Args:
        tensors: the classifier's, as :func:`body_from_swin` takes them.
        network: the ViDT's own, by name.
        swin: the classifier's name, for messages.

    Raises:
        UserError: it is no Swin, or one of other sizes; the message has the first names and shapes of each kind.
    """
    found = body_from_swin(tensors)
    if not any(name.startswith("backbone.layers.") for name in found):
        raise UserError(
            f"'{swin}' is no Swin of timm, and ViDT's body is one; give e.g. timm/swin_tiny_patch4_window7_224.ms_in1k"
        )
    last = f"backbone.layers.{count_numbers(network, STAGE) - 1}.downsample."
    body = [name for name in network if name.startswith("backbone.") and not _ADDED.match(name)]
    other = [name for name in body if name in found and found[name].shape != network[name].shape]
    complaints = {
        "of another shape": [f"{name} {_by(found[name])} instead of {_by(network[name])}" for name in other],
        "not known to the body": [name for name in found if name not in network],
        "missing": [name for name in body if name not in found and not name.startswith(last)],
    }
    said = [f"{len(names)} {what}: {enumerate_names(names)}" for what, names in complaints.items() if names]
    if said:
        raise UserError(f"'{swin}' does not fit this ViDT's body: {'; '.join(said)}")
    return found


def _by(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))
