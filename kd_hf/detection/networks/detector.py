"""A detector of any known architecture that gives its predictions and the requested taps in one forward pass.

===============  ======================================================================  ==========
tap              meaning                                                                 shape
===============  ======================================================================  ==========
``map:i``        what the decoder reads, level i from fine to coarse; -1 is the last     [B,D,H,W]
``valid:i``      bool: whether a token of ``map:i`` is of the image and not padding      [B,H,W]
``body``         [DET] tokens as they leave a body that has them (ViDT, YOLOS)           [B,Q,D]
``queries:i``    the state of the queries from which stage i predicts; -1 is the last    [B,Q,D]
``neck``         all of those                                                            [B,S,Q,D]
``module:PATH``  what that module returns (the first item of a tuple)                    as it is
===============  ======================================================================  ==========

YOLOS has one map, its patch tokens, and one stage. ViDT's first stage predicts from the body. (ViDT+ merges its levels
from coarse to fine and gives them in that order.) Queries are the network's own: those that are added in training, of
objects with noise or of further groups, are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_hf.detection.data.stage import BoxTarget, Images
from kd_hf.detection.networks.criterion import Judge
from kd_hf.detection.networks.families import FAMILIES, Family, Pass
from kd_hf.detection.networks.info import (
    BODY,
    MAP,
    MODULE,
    NECK,
    QUERIES,
    VALID,
    BoxOutputs,
    DetectorInfo,
    check_tap,
    parse_tap,
)
from kd_hf.detection.networks.predictions import Prediction, Predictions, listening
from kd_hf.detection.networks.vidt_body import resize_mask
from kd_hf.errors import UserError
from kd_hf.methods.losses import full_precision
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import Tapped


class _Recorder:
    """Arguments and results of watched modules during one forward pass; it only writes while it is armed."""

    def __init__(self) -> None:
        self.armed = False
        self.calls: dict[str, tuple[Mapping[str, Any], Any]] = {}


class _Hook:
    """A forward hook. An object, not a closure, so that deepcopy and pickle take its recorder along."""

    def __init__(self, recorder: _Recorder, path: str) -> None:
        self.recorder, self.path = recorder, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self.recorder.armed:
            self.recorder.calls[self.path] = (kwargs, output)


class TappedDetector(Tapped):
    """A detector whose forward pass gives predictions and the requested taps.

    Args:
        model: the network, or its handle. It is held as ``network``, so state_dict keys read ``network.…``.
        info: the facts about it.
        taps: tap names; only these are kept.

    Raises:
        UserError: at construction for a tap that the network does not have; in the forward pass for a tap whose
            module was not called.
    """

    def __init__(self, model: ModelHandle | nn.Module, info: DetectorInfo, taps: Sequence[str] = ()) -> None:
        super().__init__()
        for tap in taps:
            check_tap(info, tap)
        self.network = model.network if isinstance(model, ModelHandle) else model
        self.name = info.name
        self.taps = {tap: parse_tap(info, tap) for tap in taps}
        self.model_type = info.model_type
        self._recorder = _Recorder()
        modules = [str(index) for kind, index in self.taps.values() if kind == MODULE]
        config: Any = self.network.config
        tokens = self.family.reader.watched(config) if len(modules) < len(self.taps) else ()
        for path in dict.fromkeys((*tokens, *modules)):
            hook = _Hook(self._recorder, path)
            self.network.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    @property
    def family(self) -> Family:
        """How its architecture is read."""
        return FAMILIES[self.model_type]

    def forward(self, images: Images, target: BoxTarget | None = None, whole: bool = True) -> BoxOutputs:
        """Run the network once; `taps` of the result are keyed by tap name.

        Args:
            images: ``[B, 3, H, W]`` with their padding.
            target: the objects, from which some architectures make queries in training (denoising); others do
                without.
            whole: whether predictions are read; a detector is run to its end in any case.
        """
        ratios = _valid_ratios(images.mask)
        # what knows one frame only has its boxes there
        ratios = torch.ones_like(ratios) if self.family.masked else ratios
        output, heard, calls = self._run(images, target, ratios)
        found = self.family.predictions(heard if self.family.listens else output)
        seen = Pass(output, calls, (images.shape[-2], images.shape[-1]), self.network)
        logits, boxes = self._own(found.last, ratios)
        return BoxOutputs(
            logits=logits,
            boxes=boxes,
            softmax=self.family.softmax,
            auxiliary=tuple(self._own(stage, ratios) for stage in found.earlier),
            taps=self._taps(seen, images),
            criterion=self._judge(found, ratios),
        )

    def _run(
        self, images: Images, target: BoxTarget | None, ratios: Tensor
    ) -> tuple[Any, dict[str, Any], Mapping[str, tuple[Mapping[str, Any], Any]]]:
        """The network's output, what it handed its loss, and the watched calls."""
        heard: dict[str, Any] = {}
        arguments: dict[str, Any] = {"pixel_mask": (~images.mask).long()} if self.family.masked else {}
        if self.family.listens:
            arguments["labels"] = _labels(target, images, ratios)
        self._recorder.calls, self._recorder.armed = {}, True
        try:
            with listening(self.network, heard) if self.family.listens else nullcontext():
                output = self.network(pixel_values=images.pixels, **arguments)
        finally:
            self._recorder.armed = False
            calls, self._recorder.calls = self._recorder.calls, {}
        return output, heard, calls

    def _judge(self, found: Predictions, ratios: Tensor) -> Judge:
        family, config = self.family, self.network.config
        denoising = self.training and family.denoises(config)
        return Judge(family.criterion, config, found, family.queries(config), ratios, denoising)

    def _own(self, prediction: Prediction, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and boxes of the network's own queries, boxes relative to the image without padding."""
        own = self.family.own
        logits, boxes = (own(self.network.config, prediction[name], 1) for name in ("logits", "pred_boxes"))
        boxes = full_precision(boxes)
        return logits, boxes / ratios[:, None].to(boxes.dtype)

    def _taps(self, seen: Pass, images: Images) -> dict[str, Tensor]:
        kinds = {kind for kind, _ in self.taps.values()}
        reader = self.family.reader
        maps = reader.maps(seen) if kinds & {MAP, VALID} else []
        states = None
        if kinds & {BODY, QUERIES, NECK}:
            states = self.family.own(seen.config, reader.states(seen), 2)  # [B, S, Q, D]
        return {tap: self._read(tap, seen, images, maps, states) for tap in self.taps}

    def _read(self, tap: str, seen: Pass, images: Images, maps: Sequence[Tensor], states: Tensor | None) -> Tensor:
        kind, index = self.taps[tap]
        if kind == MODULE:
            return self._module(tap, str(index), seen)
        if kind == MAP:
            return maps[int(index or 0)]
        if kind == VALID:
            return ~resize_mask(images.mask, maps[int(index or 0)].shape[-2:])
        assert states is not None
        return states if kind == NECK else states[:, int(index or 0)]

    def _module(self, tap: str, path: str, seen: Pass) -> Tensor:
        if path not in seen.calls:
            raise UserError(
                f"tap '{tap}' did not fire in the forward pass: {self.name} never called its module '{path}'"
            )
        value = seen.calls[path][1]
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise UserError(f"tap '{tap}': module '{path}' of {self.name} gives {type(value).__name__}, no tensor")
        return value


def _valid_ratios(mask: Tensor) -> Tensor:
    """Width and height of each image over those of the batch, twice, float32: bool ``[B, H, W] → [B, 4]``."""
    valid = ~mask
    width = valid.any(1).float().mean(1)
    height = valid.any(2).float().mean(1)
    return torch.stack([width, height, width, height], 1)


def _labels(target: BoxTarget | None, images: Images, ratios: Tensor) -> list[dict[str, Tensor]]:
    """The objects as transformers takes them, in the network's frame; none without a target."""
    if target is None:
        pixels = images.pixels
        none = {"class_labels": pixels.new_zeros(0, dtype=torch.int64), "boxes": pixels.new_zeros(0, 4)}
        return [none] * len(images)
    scaled = zip(target.classes, target.boxes, ratios, strict=True)
    return [{"class_labels": classes, "boxes": boxes * ratio} for classes, boxes, ratio in scaled]


def tap_shapes(model: TappedDetector, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the taps without the batch dimension for an image of (height, width); nothing is computed."""
    with torch.no_grad():
        outputs = pretend(model, size)
    return {tap: tuple(value.shape[1:]) for tap, value in outputs.taps.items()}


def pretend(model: TappedDetector, size: tuple[int, int], count: int = 1, training: bool = False) -> BoxOutputs:
    """Run a detector, on whatever device it is, on ``meta`` tensors, which have shapes and no values.

    Args:
        model: the detector; it is left as it is.
        size: (height, width) of the images, which have no padding.
        count: how many.
        training: in train mode, else in eval mode.
    """
    weights = [*model.parameters(), *model.buffers()]
    floating = next(weight.dtype for weight in weights if weight.is_floating_point())
    with torch.device("meta"), _Yes():
        twin = copy.deepcopy(model, {id(weight): _without_values(weight) for weight in weights}).train(training)
        images = Images(torch.zeros(count, 3, *size, dtype=floating), torch.zeros(count, *size, dtype=torch.bool))
        outputs: BoxOutputs = twin(images)
    return outputs


class _Yes(TorchDispatchMode):
    """Answers the questions that detectors ask their tensors on the way, whether all is valid or finite, with yes."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


def _without_values(weight: Tensor) -> Tensor:
    empty = torch.empty_like(weight, device="meta")
    learned = weight.requires_grad and torch.is_grad_enabled()
    return nn.Parameter(empty, learned) if isinstance(weight, nn.Parameter) else empty
