"""Live parts of a teacher: modules that a method runs itself, on tensors that carry the student's gradient.

=============  ==============================================================  ======================
part           meaning                                                         in → out
=============  ==============================================================  ======================
``head``       the classifier                                                  [B,C] → [B,K]
``after:TAP``  everything behind ``stage:i`` or ``block:i`` up to the final    [B,C,H,W] → [B,C',H',W']
               features (the tap that :func:`final_tap` names)
``norm:TAP``   the BatchNorm that scales and shifts ``preact:i`` last          not run
=============  ==============================================================  ======================

Prefix tokens take no part in ``after:block:i``: the blocks see patches only. The parts share the teacher's modules, so
its weights, mode, dtype and device are theirs too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import resolve_tap

HEAD, AFTER, NORM = "head", "after:", "norm:"

# Networks whose features are one stage (or block) after the other and nothing else: by class for timm, by model_type
# for transformers. Position biases over the class token (BEiT) or rotary positions handed to each block (EVA-02) make
# a family unfit.
_CHAINS = frozenset(
    {"ConvNeXt", "PyramidVisionTransformerV2", "RegNet", "ResNet", "SwinTransformer", "SwinTransformerV2"}
    | {"MlpMixer", "VisionTransformer", "VisionTransformerDistilled"}
    | {"convnext", "convnextv2", "deit", "dinov2", "regnet", "resnet", "swin", "swinv2", "vit"}
)
# transformers' window transformers merge patches at the end of the stage before, and pass the grid beside the tokens
_MERGE_AT_THE_END = frozenset({"swin", "swinv2"})


def final_tap(info: ModelInfo) -> str:
    """The tap of a network's final features: its normalised patch tokens, else the map of its last stage.

    Raises:
        UserError: when the network has neither.
    """
    if info.norm is not None:
        return "tokens:patch"
    if info.stages:
        return "stage:-1"
    raise UserError(f"{info.name} has no named stages or tokens; give a tap such as module:PATH")


def last_stage_entry(info: ModelInfo) -> str:
    """The tap before a network's last stage, or before the last two blocks of a plain transformer.

    Raises:
        UserError: when the network has no part that could be called its last stage.
    """
    if len(info.stages) >= 2:
        return "stage:-2"
    if info.depth >= 3:
        return "block:-3"
    raise UserError(
        f"{info.name} has no last stage that could run apart; "
        "a Swin, ConvNeXt, ResNet, ViT or another network with named stages or blocks has one"
    )


def live_part(handle: ModelHandle, part: str) -> nn.Module:
    """Return a part of a network by reference; see the table at the top of this file.

    Raises:
        UserError: for an unknown part, a tap that does not exist, or a network that cannot be cut there.
    """
    if part == HEAD:
        if handle.info.head is None:
            raise UserError(f"{handle.info.name} has no classifier that could be used apart")
        return handle.network.get_submodule(handle.info.head)
    if part.startswith(NORM):
        return _norm(handle, part.removeprefix(NORM))
    if not part.startswith(AFTER):
        raise UserError(
            f"part '{part}' does not exist; known: {HEAD}, {AFTER}TAP such as {AFTER}stage:-2, {NORM}preact:-1"
        )
    return _tail(handle, part.removeprefix(AFTER))


def _norm(handle: ModelHandle, tap: str) -> nn.Module:
    point = resolve_tap(handle.info, tap)
    caught = (stage.preact for stage in handle.info.stages if stage.preact is not None)
    norm = next((preact.norm for preact in caught if (preact.path, preact.side) == (point.path, point.side)), None)
    if norm is None:
        raise UserError(f"part '{NORM}{tap}': {handle.info.name} has no BatchNorm there; preact:i names one")
    return handle.network.get_submodule(norm)


def _tail(handle: ModelHandle, tap: str) -> Tail:
    info, network = handle.info, handle.network
    point = resolve_tap(info, tap)
    kind = tap.partition(":")[0]
    levels = {"stage": tuple(stage.path for stage in info.stages), "block": info.blocks}.get(kind, ())
    if point.path not in levels[:-1]:
        raise UserError(f"part '{AFTER}{tap}' of {info.name}: expected a stage or block before the last one")
    family = _family(handle)
    if family not in _CHAINS:
        raise UserError(
            f"part '{AFTER}{tap}': {info.name} ({family}) cannot run from the middle; a teacher of one of these "
            f"families can: {', '.join(sorted(_CHAINS))}"
        )
    layout = "NLC" if kind == "block" else info.stages[0].layout
    if family in _MERGE_AT_THE_END:
        steps = _merging_steps(network, levels[levels.index(point.path) :])
        layout = "NHWC"
    else:
        steps = list(_between(network, point.path, levels[-1]))
    if info.norm is not None:
        steps.append(network.get_submodule(info.norm))
    return Tail(steps, layout)


def _family(handle: ModelHandle) -> str:
    if handle.info.library == "transformers":
        return str(getattr(handle.network.config, "model_type", ""))
    return type(handle.network).__name__


def _between(network: nn.Module, first: str, last: str) -> Iterator[nn.Module]:
    """The siblings behind the module `first` up to and with `last`, in order."""
    parent, _, name = first.rpartition(".")
    children = dict(network.get_submodule(parent).named_children())
    names = list(children)
    for step in names[names.index(name) + 1 : names.index(last.rpartition(".")[2]) + 1]:
        yield children[step]


def _merging_steps(network: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """One step per stage behind the first of `paths`, which are the last blocks of stages."""
    stages = [network.get_submodule(path.rpartition(".blocks.")[0]) for path in paths]
    return [_MergeThenStage(before, after) for before, after in pairwise(stages)]


class Tail(nn.Module):
    """Consecutive modules of a network, run on a map.

    Args:
        steps: modules that take and return one tensor (of a tuple, the first item counts).
        layout: how they want it: "NCHW", "NHWC" or "NLC".
    """

    def __init__(self, steps: Sequence[nn.Module], layout: str) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.layout = layout

    def forward(self, feature: Tensor) -> Tensor:
        """``[B, C, H, W] → [B, C', H', W']``, in the dtype of the modules and outside any autocast."""
        grid = feature.shape[2:]
        value = feature.to(next(self.parameters()).dtype)
        if self.layout == "NHWC":
            value = value.permute(0, 2, 3, 1)
        elif self.layout == "NLC":
            value = value.flatten(2).transpose(1, 2)
        with torch.autocast(feature.device.type, enabled=False):
            for step in self.steps:
                value = step(value)
                value = value[0] if isinstance(value, tuple) else value
        if self.layout == "NHWC":
            return value.permute(0, 3, 1, 2)
        return value.transpose(1, 2).unflatten(2, grid) if self.layout == "NLC" else value


class _MergeThenStage(nn.Module):
    """Patch merging of one stage and the blocks of the next, on maps with channels last."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.merge = before.get_submodule("downsample")
        self.blocks = after.get_submodule("blocks")

    def forward(self, value: Tensor) -> Tensor:
        """``[B, H, W, C] → [B, H/2, W/2, 2C]``, sizes rounded up."""
        height, width = value.shape[1:3]
        tokens = self.merge(value.flatten(1, 2), (height, width))
        grid = ((height + 1) // 2, (width + 1) // 2)
        for block in self.blocks.children():
            tokens = block(tokens, grid)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return tokens.unflatten(1, grid)
