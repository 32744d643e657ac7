"""Bring a student's weights into a network, with nothing missing and nothing left over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_hf.convert.layouts import StudentWeights
from kd_hf.convert.openmmlab import is_openmmlab, to_timm
from kd_hf.convert.repdistiller import is_repdistiller, our_name
from kd_hf.errors import UserError
from kd_hf.models.handle import ModelHandle
from kd_hf.text.words import enumerate_names

Named = list[tuple[str, str, Tensor]]  # name in the file, name in the network, weights


def name_weights(student: StudentWeights, handle: ModelHandle) -> Named:
    """Find the network's names for a student's weights; what has no use here is added to `student.left_out`."""
    if is_repdistiller(student.tensors, handle):
        return [(name, our_name(name, handle), tensor) for name, tensor in student.tensors.items()]
    if not is_openmmlab(frozenset(student.tensors)):
        return [(name, name, tensor) for name, tensor in student.tensors.items()]
    named = to_timm(student.tensors, handle.network, handle.info)
    student.left_out.update(student.tensors.keys() - {theirs for theirs, _, _ in named})
    return named


def count_classes(named: Named, handle: ModelHandle) -> int | None:
    """How many classes the checkpoint's classifier tells apart; None when it has none."""
    classifier = f"{handle.info.head}.weight"
    return next((tensor.shape[0] for _, ours, tensor in named if ours == classifier and tensor.ndim), None)


def fit_weights(named: Named, student: StudentWeights, handle: ModelHandle, checkpoint: str) -> dict[str, Tensor]:
    """The weights by the network's names, exactly one for each.

    Args:
        named: from :func:`name_weights`.
        student: where they are from; its strays count as unknown.
        handle: the network, with as many classes as the checkpoint.
        checkpoint: its name, for the message.

    Raises:
        UserError: names on one side only, or another shape; the message has the first of each kind and their number.
    """
    wanted: dict[str, Tensor] = handle.network.state_dict()
    found: dict[str, Tensor] = {}
    unknown, shapes = list(student.strays), []
    for theirs, ours, tensor in named:
        if ours not in wanted or ours in found:
            unknown.append(theirs)
        elif tensor.shape != wanted[ours].shape:
            shapes.append(f"{theirs} {_by(tensor)} instead of {_by(wanted[ours])}")
        found[ours] = tensor
    missing = [name for name in wanted if name not in found]
    complaints = {"not known to the network": unknown, "missing": missing, "of another shape": shapes}
    said = [f"{len(names)} {what}: {enumerate_names(names)}" for what, names in complaints.items() if names]
    if said:
        raise UserError(f"checkpoint '{checkpoint}' does not fit --arch {handle.info.name}: {'; '.join(said)}")
    return found


def _by(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def turn_to_rgb(network: nn.Module) -> None:
    """Let the first convolution see the same image with its channels in the opposite order.

    Raises:
        UserError: it does not begin with a convolution of three channels.
    """
    first = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first.in_channels != 3:
        raise UserError("--bgr: the network does not begin with a convolution of three colours")
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))
