"""The door to detectors: ViDT, and what transformers detects objects with, by Hub id, folder or architecture name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_hf.detection.networks.auto import register_auto_classes
from kd_hf.detection.networks.families import FAMILIES, family_of
from kd_hf.detection.networks.info import DetectorInfo
from kd_hf.detection.networks.vidt_body_weights import fit_body
from kd_hf.errors import UserError, nearest
from kd_hf.info import Preprocessing
from kd_hf.models.handle import ModelHandle
from kd_hf.models.live import config_label_names, processor_preprocessing
from kd_hf.models.load import (
    Request,
    Source,
    building,
    configuration,
    load_model,
    locate,
    origin_of,
    overridden,
    processor_values,
    refuse_weights,
    with_weights_at_hand,
)
from kd_hf.models.quiet import quiet_transformers
from kd_hf.models.students import LIBRARY
from kd_hf.recipe.config import PreprocessingConfig

# name behind kd_hf/ → body of ViDT
VIDT = {f"vidt_{size}": f"swin_{size}" for size in ("nano", "tiny", "small", "base")}
_MODEL_TYPE = "kd_hf_vidt"
# model type → what makes weights of the body out of a classifier's, given the detector's own and the classifier's name
BODY_WEIGHTS: Mapping[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor], str], dict[str, Tensor]]] = {
    _MODEL_TYPE: fit_body
}


def load_detector(
    model: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    revision: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    body: str | None = None,
    drop_path: float | None = None,
    preprocessing: PreprocessingConfig | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str | torch.device | None = None,
) -> ModelHandle:
    """Load or build an object detector, in eval mode and float32.

    Args:
        model: ``kd_hf/vidt_nano`` (also ``_tiny``, ``_small``, ``_base``), a folder or run folder, a Hub id
            (``org/name``), or, random, ``transformers/`` and one of :mod:`kd_hf.detection.networks.families`.
        pretrained: read the weights; else they are random, also those of the backbone.
        num_classes: K, without "no object"; where it differs from the weights', the class heads are new and the rest
            is kept.
        revision: branch, tag or commit of the Hub repository that the weights are read from.
        kwargs: configuration values.
        body: the classifier whose weights the body begins with (``student.body`` of a recipe), where no weights of the
            whole detector are read: a name, folder or Hub id that :func:`kd_hf.models.load.load_model` knows.
        drop_path: stochastic depth rate.
        preprocessing: overrides of the model's own mean and std.
        trust_remote_code: allow code of the repository to run; ViDT needs no such leave.
        allow_pickle: where there are no safetensors, read the tensors of a pickled state dict (and nothing else of it).
        device: where the network goes. On ``meta`` neither weights are downloaded nor memory is used.

    Raises:
        UserError: unknown name, no detector, unreachable or gated repository, no safetensors, weights or arguments that
            do not fit.
    """
    register_auto_classes()
    request = Request(
        model=model,
        pretrained=pretrained,
        num_classes=num_classes,
        image_size=None,
        revision=revision,
        kwargs=dict(kwargs or {}),
        drop_path=drop_path,
        preprocessing=preprocessing,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        device=None if device is None else torch.device(device),
    )
    request, source = _locate(request, body)
    with tempfile.TemporaryDirectory() as scratch, building(request):
        source = with_weights_at_hand(request, source, Path(scratch))
        handle = _load(request, source)
    if body is not None and not request.pretrained:
        handle = _begin_with_body(request, handle, body)
    handle.network.eval()
    if request.device is not None and not request.on_meta:
        handle.network.to(request.device)
    return handle


def _locate(request: Request, body: str | None) -> tuple[Request, Source]:
    """What the name means. A mere name has no weights, which is no mistake where its body is given some."""
    named = {LIBRARY: _from_name, "": _no_detector, "timm": _no_detector}
    if body is not None:
        untrained = replace(request, pretrained=False)
        if locate(untrained, named).folder is None:
            request = untrained
    source = locate(request, named)
    if source.library != "transformers":
        raise UserError(f"model '{request.model}' is a classifier of {source.library}, not a detector")
    family_of(source.architecture, request.model)
    return request, source


def _from_name(request: Request, name: str) -> Source:
    if name not in VIDT:
        raise UserError(f"model '{request.model}': kd_hf has no detector '{name}'.{nearest(name, VIDT)}")
    refuse_weights(request)
    return Source("transformers", _MODEL_TYPE, config={"body": VIDT[name]})


def _no_detector(request: Request, name: str) -> Source:
    known = [f"{LIBRARY}/{known}" for known in VIDT] + [f"transformers/{kind}" for kind in FAMILIES]
    raise UserError(
        f"model '{request.model}' is no detector: give a folder, a Hub id (org/name) or a name."
        f"{nearest(request.model, known)}"
    )


def _load(request: Request, source: Source) -> ModelHandle:
    from transformers import AutoModelForObjectDetection

    request = _with_sizes(request, source)
    values, config = configuration(request, source)
    if request.weights and source.folder is not None:
        network = _with_weights(request, source.folder, config)
    else:
        with torch.device("meta" if request.on_meta else "cpu"):
            network = AutoModelForObjectDetection.from_config(config, trust_remote_code=request.trust_remote_code)
        if request.on_meta:
            network.to("meta")  # some parameters are made where no device is asked for
    native = processor_preprocessing(processor_values(source.folder), None)
    info = describe_detector(network, request.model, overridden(native, request))
    return ModelHandle(
        network, replace(info, native=native), origin_of(request, source, values), config_label_names(config)
    )


def _begin_with_body(request: Request, handle: ModelHandle, body: str) -> ModelHandle:
    """Lay a classifier's weights into a random detector, in which all else stays; on ``meta`` they are only named."""
    kind = str(handle.origin.architecture)
    if kind not in BODY_WEIGHTS:
        known = ", ".join(f"{LIBRARY}/{name}" for name in VIDT)
        raise UserError(f"student.body: '{request.model}' takes no weights for its body alone; {known} do")
    info = replace(handle.info, name=f"{request.model} with the body of {body}")
    if request.on_meta:
        return replace(handle, info=info)
    try:
        classifier = load_model(
            body,
            pretrained=True,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
            allow_pickle=request.allow_pickle,
        )
        weights = BODY_WEIGHTS[kind](classifier.network.state_dict(), handle.network.state_dict(), body)
    except UserError as error:
        raise UserError(f"student.body: {error}") from error
    handle.network.load_state_dict(weights, strict=False)
    origin = replace(handle.origin, source=body, revision=classifier.origin.revision, pretrained=True)
    return replace(handle, info=info, origin=origin)


def _with_sizes(request: Request, source: Source) -> Request:
    """The sizes of a named ViDT as configuration values, which the request's own go before."""
    from kd_hf.detection.networks.vidt_config import body_sizes

    if source.folder is not None or "body" not in source.config:
        return request
    return replace(request, kwargs={**body_sizes(source.config["body"]), **request.kwargs})


def describe_detector(network: nn.Module, name: str, preprocessing: Preprocessing | None = None) -> DetectorInfo:
    """Read the facts of a detector of transformers.

    Args:
        network: in any mode and on any device; nothing is run.
        name: how the user calls it; error messages repeat it.
        preprocessing: how it expects its images, of which mean and std count; ImageNet's by default.

    Raises:
        UserError: an architecture that is not in :data:`kd_hf.detection.networks.families.FAMILIES`.
    """
    config: Any = network.config
    family = family_of(config.model_type, name)
    return DetectorInfo(
        name=name,
        library="transformers",
        num_classes=config.num_labels,
        preprocessing=preprocessing or Preprocessing(),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        modules=tuple(path for path, _ in network.named_modules() if path),
        model_type=config.model_type,
        levels=family.levels(config),
        states=family.states(config),
        queries=family.queries(config),
        body=family.reader.body,
        softmax=family.softmax,
        masks=family.masks(config),
    )


def _with_weights(request: Request, folder: Path, config: Any) -> nn.Module:
    """Read the weights of a folder; only class heads of another number of classes may be new."""
    from transformers import AutoConfig, AutoModelForObjectDetection

    with quiet_transformers():
        network, report = AutoModelForObjectDetection.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
        )
    written = AutoConfig.from_pretrained(folder, trust_remote_code=request.trust_remote_code).num_labels
    for key, found, wanted in sorted(report["mismatched_keys"]):
        # rows of a class head, or of RT-DETR's embedding of noisy classes; there may be one more for "no object"
        heads = found[1:] == wanted[1:] and found[0] - wanted[0] == written - config.num_labels != 0
        if not heads:
            raise UserError(
                f"model '{request.model}': {key} is {_by(found)} in the weights and {_by(wanted)} in this network; "
                "leave out the kwargs that change it, or set pretrained: false"
            )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"model '{request.model}': the weights lack {missing[0]} ({len(missing)} missing in all)")
    return network


def _by(shape: Any) -> str:
    return "×".join(map(str, shape))
