"""Named points of a network, read in the same forward pass as the logits.

===============  =============================================================  ==========
tap              meaning                                                        shape
===============  =============================================================  ==========
``stage:i``      output of resolution level i, from 1; -1 is the last           [B,C,H,W]
``preact:i``     the same before its last ReLU, where it ends in one            [B,C,H,W]
``block:i``      residual stream after transformer block i, from 0; -1 is last  [B,N,C]
``tokens``       final token sequence, prefix tokens first                      [B,N,C]
``tokens:cls``   one prefix token of it (also ``tokens:dist``, ``tokens:reg0``) [B,C]
``tokens:patch`` its patch tokens                                               [B,N-P,C]
``pre_logits``   what the classifier receives                                   [B,C]
``module:PATH``  what that module returns (the first item of a tuple)           as it is
===============  =============================================================  ==========

A plain ViT has one stage: its final patch tokens as a map. Where a network normalises after pooling, its token
sequence is the one it pools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_hf.errors import UserError, nearest
from kd_hf.info import ModelInfo
from kd_hf.models.handle import ModelHandle
from kd_hf.outputs import Outputs, Target


@dataclass(frozen=True)
class Point:
    """Where a tap is caught, and how the caught tensor is brought to the documented shape."""

    path: str
    form: str  # a key of _FORMS
    side: str = "output"  # or "input"
    layout: str = "NLC"
    index: int = 0  # of a token; or how many prefix tokens to drop
    copied: bool = False  # because a later layer may work in place (BatchNorm, then ReLU)

    @property
    def key(self) -> tuple[str, str, bool]:
        """Points with the same key share one hook."""
        return self.path, self.side, self.copied


def available_taps(info: ModelInfo) -> tuple[str, ...]:
    """All named taps of a network, without ``module:`` ones and negative indices."""
    tokens = ("tokens", *(f"tokens:{name}" for name in info.prefix), "tokens:patch") if info.norm else ()
    return (
        *(f"stage:{index + 1}" for index in range(len(info.stages))),
        *(f"preact:{index + 1}" for index, stage in enumerate(info.stages) if stage.preact),
        *(f"block:{index}" for index in range(len(info.blocks))),
        *tokens,
        *(("pre_logits",) if info.head else ()),
    )


def check_tap(info: ModelInfo, tap: str) -> None:
    """Raise :class:`UserError`, naming what exists instead, when the network has no such tap. Runs nothing."""
    resolve_tap(info, tap)


def resolve_tap(info: ModelInfo, tap: str) -> Point:
    """Find the module and the shape of a tap. Raises :class:`UserError` as :func:`check_tap`."""
    kind, _, argument = tap.partition(":")
    resolver = _RESOLVERS.get(kind)
    point = resolver(info, argument) if resolver else None
    if point is None:
        raise UserError(_no_such_tap(info, tap))
    return point


def _no_such_tap(info: ModelInfo, tap: str) -> str:
    names = available_taps(info)
    path = tap.removeprefix("module:")
    if path != tap:
        return f"tap '{tap}': {info.name} has no module '{path}'.{nearest(path, info.modules)}"
    guess = nearest(tap, names)
    guess = guess if guess.startswith(" Did you mean") else ""
    kinds = (("stage", 1, len(info.stages)), ("preact", 1, len(info.stages)), ("block", 0, len(info.blocks)))
    whole = {kind: (first, count) for kind, first, count in kinds if f"{kind}:{first + count - 1}" in names}
    ranges = [f"{kind}:{first} … {kind}:{first + count - 1}" for kind, (first, count) in whole.items()]
    single = [name for name in names if name.partition(":")[0] not in whole]
    return f"tap '{tap}' does not exist in {info.name}.{guess} It has: {', '.join([*ranges, *single])}, module:PATH."


def _stage(info: ModelInfo, argument: str) -> Point | None:
    position = _position(argument, len(info.stages), first=1)
    if position is None:
        return None
    stage = info.stages[position]
    return Point(stage.path, "map", layout=stage.layout, index=len(info.prefix))


def _preact(info: ModelInfo, argument: str) -> Point | None:
    position = _position(argument, len(info.stages), first=1)
    found = None if position is None else info.stages[position].preact
    return Point(found.path, "map", found.side, "NCHW", copied=True) if found else None


def _block(info: ModelInfo, argument: str) -> Point | None:
    position = _position(argument, len(info.blocks), first=0)
    return None if position is None else Point(info.blocks[position], "sequence")


def _tokens(info: ModelInfo, argument: str) -> Point | None:
    if info.norm is None:
        return None
    if argument in info.prefix:
        return Point(info.norm, "token", index=info.prefix.index(argument))
    forms = {"": "sequence", "patch": "patches"}
    return Point(info.norm, forms[argument], index=len(info.prefix)) if argument in forms else None


def _pre_logits(info: ModelInfo, argument: str) -> Point | None:
    return Point(info.head, "vector", side="input") if info.head and not argument else None


def _module(info: ModelInfo, argument: str) -> Point | None:
    return Point(argument, "raw", copied=True) if argument in info.modules else None


def _position(text: str, count: int, first: int) -> int | None:
    """The index a tap's number means: counted from `first`, or from the end when negative."""
    try:
        number = int(text)
    except ValueError:
        return None
    position = number + count if number < 0 else number - first
    return position if 0 <= position < count else None


_RESOLVERS: Mapping[str, Callable[[ModelInfo, str], Point | None]] = {
    "stage": _stage,
    "preact": _preact,
    "block": _block,
    "tokens": _tokens,
    "pre_logits": _pre_logits,
    "module": _module,
}


def _as_sequence(value: Tensor) -> Tensor:
    """[B,N,C], also from a map with channels last (Swin)."""
    return value.flatten(1, 2) if value.ndim == 4 else value


def _as_map(value: Tensor, point: Point, size: tuple[int, int]) -> Tensor:
    if point.layout == "NCHW":
        return value
    if point.layout == "NHWC":
        return value.permute(0, 3, 1, 2)
    patches = value[:, point.index :]  # [B, N-P, C]
    height = round((patches.shape[1] * size[0] / size[1]) ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (height, -1))


_FORMS: Mapping[str, Callable[[Tensor, Point, tuple[int, int]], Tensor]] = {
    "map": _as_map,
    "sequence": lambda value, point, size: _as_sequence(value),
    "token": lambda value, point, size: value[:, point.index],
    "patches": lambda value, point, size: _as_sequence(value)[:, point.index :],
    "vector": lambda value, point, size: value.flatten(1),
    "raw": lambda value, point, size: value,
}


class _AllCaught(Exception):
    """Ends a pass of which nothing but taps is read."""


class _Recorder:
    """What the hooks of one model catch during one forward pass.

    Hooks only write while it is armed: the second run of a checkpointed block, or a direct call of the network,
    leaves nothing behind.
    """

    def __init__(self) -> None:
        self.armed = False
        self.caught: dict[tuple[str, str, bool], Any] = {}
        self.calls = 0  # of hooks in this pass; a module may be called more than once
        self.last: int | None = None  # the call that ends the pass

    def catch(self, key: tuple[str, str, bool], value: Any) -> None:
        """Keep a value; raise :class:`_AllCaught` when it is the last one and nothing else of the pass is read."""
        self.caught[key] = value
        self.calls += 1
        if self.calls == self.last:
            raise _AllCaught


class _Hook:
    """A forward hook or pre-hook. An object, not a closure, so that deepcopy and pickle take its recorder along."""

    def __init__(self, recorder: _Recorder, point: Point) -> None:
        self.recorder = recorder
        self.key = point.key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Any) -> None:
        if self.recorder.armed:
            value = output[0] if output else args[0]
            copied = self.key[2] and isinstance(value, Tensor)
            self.recorder.catch(self.key, value.clone() if copied else value)


class Tapped(nn.Module):
    """A network that gives outputs with taps: what training needs to know of it."""

    network: nn.Module


class TappedModel(Tapped):
    """A network whose forward pass gives logits and the requested taps.

    Args:
        model: the network, or its handle. It is held as ``network``, so state_dict keys read ``network.…``.
        info: the facts about it.
        taps: tap names; only these are caught.
        dist_head: in train mode give the logits of the class head and of the distillation head apart. In eval
            mode, and without this, `logits` is what the network gives: the mean of both heads.

    Raises:
        UserError: at construction for a tap, or a distillation head, that the network does not have; in the
            forward pass for a tap whose module was not called.
    """

    def __init__(
        self, model: ModelHandle | nn.Module, info: ModelInfo, taps: Sequence[str], dist_head: bool = False
    ) -> None:
        super().__init__()
        if dist_head and info.dist_head is None:
            raise UserError(f"{info.name} has no distillation head; use a distilled DeiT, or a method without one")
        self.network = model.network if isinstance(model, ModelHandle) else model
        self.name = info.name
        self.dist_head = dist_head
        self.points = {tap: resolve_tap(info, tap) for tap in taps}
        self._recorder = _Recorder()
        self._calls = 0  # of hooks in a whole pass
        switch = getattr(self.network, "set_distilled_training", None)
        if callable(switch):
            switch(dist_head)
        for point in {point.key: point for point in self.points.values()}.values():
            hook = _Hook(self._recorder, point)
            module = self.network.get_submodule(point.path)
            if point.side == "input":
                module.register_forward_pre_hook(hook)
            else:
                _last_step(module).register_forward_hook(hook)

    def forward(self, pixels: Tensor, target: Target | None = None, whole: bool = True) -> Outputs:
        """Run the network once on ``[B, 3, H, W]``; `taps` of the result are keyed by tap name.

        The target is for networks that are shown it in training; classifiers are not. Where the `whole` pass is not
        needed the network stops after its last tap, from its second pass on, and the logits are ``[B, 0]``.
        """
        output, caught = self._run(pixels, whole)
        size = (pixels.shape[-2], pixels.shape[-1])
        taps = {tap: self._read(tap, point, caught, size) for tap, point in self.points.items()}
        if not whole:
            return Outputs(pixels.new_empty(len(pixels), 0), None, taps)
        if self.dist_head and self.training:
            logits, dist_logits = _both_logits(output)
            return Outputs(logits, dist_logits, taps)
        return Outputs(_logits(output), None, taps)

    def _run(self, pixels: Tensor, whole: bool) -> tuple[Any, Mapping[Any, Any]]:
        """What the network gives, or None where it stopped, and what the hooks caught."""
        recorder = self._recorder
        # a compiled graph leaves out by itself what nobody reads
        recorder.last = None if whole or torch.compiler.is_compiling() else self._calls or None
        recorder.caught, recorder.calls, recorder.armed = {}, 0, True
        output = None
        try:
            output = self.network(pixels)
            self._calls = recorder.calls
        except _AllCaught:
            pass
        finally:
            recorder.armed = False
            caught, recorder.caught = recorder.caught, {}
        return output, caught

    def _read(self, tap: str, point: Point, caught: Mapping[Any, Any], size: tuple[int, int]) -> Tensor:
        if point.key not in caught:
            raise UserError(
                f"tap '{tap}' did not fire in the forward pass: {self.name} never called its module '{point.path}'"
            )
        value = caught[point.key]
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise UserError(
                f"tap '{tap}': module '{point.path}' of {self.name} gives {type(value).__name__}, no tensor"
            )
        return _FORMS[point.form](value, point, size)


def _last_step(module: nn.Module) -> nn.Module:
    """The module whose output is a Sequential's output: gradient checkpointing runs its children without it."""
    while type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module


def _logits(output: Any) -> Tensor:
    """Logits ``[B, K]`` from a tensor, a transformers output, a mapping or a tuple."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return output["logits"] if isinstance(output, Mapping) else output[0]


def _both_logits(output: Any) -> tuple[Tensor, Tensor]:
    """Logits of the class head and of the distillation head (timm: a pair; transformers: two fields)."""
    if isinstance(output, tuple):
        return output[0], output[1]
    return output.cls_logits, output.distillation_logits


def tap_shapes(model: TappedModel, image_size: int | tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the taps without the batch dimension, by one forward pass of a zero image in eval mode.

    The size is that of both sides, or height and width.

    Runs on the model's own device, ``meta`` included. Modes of all submodules are as before afterwards, and no
    BatchNorm statistic moves.
    """
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = torch.zeros(1, 3, height, width, device=reference.device, dtype=reference.dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            outputs = model(pixels)
    finally:
        for module, training in modes.items():
            module.training = training
    return {tap: tuple(value.shape[1:]) for tap, value in outputs.taps.items()}
