"""The architectures of detectors that are known, and what is told apart about them: all in one table.

A detector that is not in :data:`FAMILIES` is refused by :func:`family_of`; everything else in this package asks the
row of its architecture.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_hf.detection.networks.predictions import Predictions, of_d_fine, of_detr, of_rt_detr, of_vidt
from kd_hf.errors import UserError, nearest


@dataclass
class Pass:
    """What one forward pass left: the network's output, and the watched modules' arguments and outputs by path."""

    output: Any
    calls: Mapping[str, tuple[Mapping[str, Any], Any]]
    size: tuple[int, int]
    """(height, width) of the images with their padding."""
    network: Any

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.network.config


@dataclass(frozen=True)
class DecoderReader:
    """Tokens of a network with a decoder, read off the decoder's call: what it attends to, and its layers' outputs."""

    stages_axis: int = 1
    """Of the layers' outputs: 0 for ``[S, B, Q, D]``, 1 for ``[B, S, Q, D]``."""
    grid: str | None = None
    """Module whose output has the height and width of the only map, where the decoder is not told them."""
    decoder: str = "model.decoder"
    body: bool = False

    def watched(self, config: Any) -> tuple[str, ...]:
        """Modules whose calls are kept."""
        return (self.decoder, self.grid) if self.grid else (self.decoder,)

    def maps(self, seen: Pass) -> list[Tensor]:
        """The decoder's memory, ``[B, D, H, W]`` of each level."""
        arguments, _ = seen.calls[self.decoder]
        memory = arguments["encoder_hidden_states"]  # [B, ΣHW, D]
        sizes = [seen.calls[self.grid][1].shape[-2:]] if self.grid else arguments["spatial_shapes_list"]
        levels = memory.split([height * width for height, width in sizes], 1)
        return [level.transpose(1, 2).unflatten(2, tuple(size)) for level, size in zip(levels, sizes, strict=True)]

    def states(self, seen: Pass) -> Tensor:
        """What each decoder layer makes of the queries, ``[B, S, Q, D]``."""
        states: Tensor = seen.calls[self.decoder][1].intermediate_hidden_states
        return states.movedim(self.stages_axis, 1)


@dataclass(frozen=True)
class LayerReader(DecoderReader):
    """DETR, whose decoder keeps the states of its layers for the loss only: they are read off the layers themselves."""

    def watched(self, config: Any) -> tuple[str, ...]:
        """Modules whose calls are kept."""
        return (*super().watched(config), *self._layers(config))

    def _layers(self, config: Any) -> list[str]:
        return [f"{self.decoder}.layers.{layer}" for layer in range(config.decoder_layers - 1)]

    def states(self, seen: Pass) -> Tensor:
        """The normalised output of every layer, ``[B, S, Q, D]``."""
        decoder = seen.network.get_submodule(self.decoder)
        outputs = [seen.calls[path][1] for path in self._layers(seen.config)]
        states = [decoder.layernorm(output[0] if isinstance(output, tuple) else output) for output in outputs]
        return torch.stack([*states, seen.calls[self.decoder][1].last_hidden_state], 1)


@dataclass(frozen=True)
class TokenReader:
    """YOLOS: one sequence of a class token, patches and [DET] tokens, and no decoder."""

    body: bool = True

    def watched(self, config: Any) -> tuple[str, ...]:
        """Nothing: the output has all."""
        return ()

    def maps(self, seen: Pass) -> list[Tensor]:
        """The patch tokens, ``[[B, D, H, W]]``."""
        patch = seen.config.patch_size
        tokens = seen.output.last_hidden_state[:, 1 : -seen.config.num_detection_tokens]
        return [tokens.transpose(1, 2).unflatten(2, (seen.size[0] // patch, seen.size[1] // patch))]

    def states(self, seen: Pass) -> Tensor:
        """The [DET] tokens, ``[B, 1, Q, D]``."""
        tokens: Tensor = seen.output.last_hidden_state[:, None, -seen.config.num_detection_tokens :]
        return tokens


@dataclass(frozen=True)
class ViDTReader:
    """ViDT, whose output has all tokens by name; its first state are the body's [DET] tokens."""

    body: bool = True

    def watched(self, config: Any) -> tuple[str, ...]:
        """Nothing: the output has all."""
        return ()

    def maps(self, seen: Pass) -> list[Tensor]:
        """The decoder's memory, ``[B, D, H, W]`` of each level."""
        return list(seen.output.patch_tokens)

    def states(self, seen: Pass) -> Tensor:
        """The tokens that enter the decoder and what each layer makes of them, ``[B, S, Q, D]``."""
        states: Tensor = seen.output.neck_tokens
        return states


Reader = DecoderReader | TokenReader | ViDTReader
_count = operator.attrgetter


@dataclass(frozen=True)
class Family:
    """One architecture."""

    criterion: str
    """A key of :data:`kd_hf.detection.networks.criterion.CRITERIA`."""
    reader: Reader
    predictions: Callable[[Any], Predictions] = of_detr
    """From what the network hands its loss; with `listens` false from its output."""
    listens: bool = True
    softmax: bool = False
    """The last output of the class head is "no object"."""
    masked: bool = True
    """It is told where there is padding, and its boxes are relative to the image without it. The others know one frame
    only, that of all pixels, and so do their boxes."""
    own_first: bool = False
    """In training there are further queries behind its own (groups of LW-DETR), not before them (denoising)."""
    levels: Callable[[Any], int] = lambda config: 1
    """How many maps, from the configuration."""
    states: Callable[[Any], int] = field(default=_count("decoder_layers"))
    """How many stages its queries pass."""
    queries: Callable[[Any], int] = field(default=_count("num_queries"))
    denoises: Callable[[Any], bool] = lambda config: False
    """Whether objects with noise are further queries in training."""
    masks: Callable[[Any], bool] = lambda config: False
    """Whether its loss needs the objects' masks."""

    def own(self, config: Any, tensor: Tensor, axis: int) -> Tensor:
        """A tensor's rows of the network's own queries along an axis."""
        count = self.queries(config)
        start = 0 if self.own_first else tensor.shape[axis] - count
        return tensor.narrow(axis, start, count)


def _rt_detr(
    criterion: str = "rt_detr", predictions: Callable[[Any], Predictions] = of_rt_detr, stages_axis: int = 1
) -> Family:
    return Family(
        criterion,
        DecoderReader(stages_axis),
        predictions,
        masked=False,
        levels=_count("num_feature_levels"),
        denoises=lambda config: config.num_denoising > 0,
    )


def _detr(criterion: str, reader: type[DecoderReader] = LayerReader, softmax: bool = False) -> Family:
    return Family(criterion, reader(stages_axis=0, grid="model.input_projection"), softmax=softmax)


FAMILIES: Mapping[str, Family] = {
    "detr": _detr("detr", softmax=True),
    "table-transformer": _detr("detr", softmax=True),
    "conditional_detr": _detr("deformable_detr"),
    "dab-detr": _detr("deformable_detr", DecoderReader),
    "deformable_detr": Family(
        "deformable_detr",
        DecoderReader(),
        levels=_count("num_feature_levels"),
        queries=lambda config: config.two_stage_num_proposals if config.two_stage else config.num_queries,
    ),
    "rt_detr": _rt_detr(),
    "rt_detr_v2": _rt_detr(),
    "d_fine": _rt_detr("d_fine", of_d_fine, stages_axis=0),
    "lw_detr": Family(
        "lw_detr",
        DecoderReader(stages_axis=0),
        own_first=True,
        levels=lambda config: len(config.projector_scale_factors),
    ),
    "rf_detr": Family("lw_detr", DecoderReader(stages_axis=0), own_first=True),
    "yolos": Family(
        "detr",
        TokenReader(),
        softmax=True,
        masked=False,
        states=lambda config: 1,
        queries=_count("num_detection_tokens"),
    ),
    "kd_hf_vidt": Family(
        "vidt",
        ViDTReader(),
        of_vidt,
        listens=False,
        levels=lambda config: len(config.level_widths),
        states=lambda config: config.decoder_layers + 1,
        masks=lambda config: bool(config.token_label or config.mask_vector),
    ),
}
"""By transformers' ``model_type``."""


def family_of(model_type: str, name: str) -> Family:
    """The row of an architecture; `name` is what the user wrote.

    Raises:
        UserError: there is none, naming the nearest.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model '{name}': detectors of type '{model_type}' are not known here.{nearest(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]
