"""Weights of ViDT by the names of :mod:`kd_hf.detection.networks.vidt`: naver-ai's ViDT and ViDT+, VkD's students.

The sizes of the network are read off the shapes, so a checkpoint needs no ``--arch``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kd_hf.detection.networks.vidt_body_weights import STAGE, count_numbers
from kd_hf.errors import UserError, nearest
from kd_hf.text.words import enumerate_names

if TYPE_CHECKING:
    from kd_hf.detection.networks.vidt_config import ViDTConfig

Named = list[tuple[str, str, Tensor]]  # name in the file, name in the network, weights
UNSEEN: Mapping[str, Any] = {"decoder_attention_heads": 8, "cross_stages": (3,)}  # no shape shows them; every release's
_SIGN = ("backbone.det_token", "transformer.reference_points.weight")
_DROPPED = (
    r"backbone\.norm\d\.",  # never used, for the sake of loading a classifier's weights
    r"backbone\.layers\.\d+\.downsample\.(expansion|norm2)\.",
    r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index$",  # follows from the window
    r"transformer\.level_embed$",
    r"transformer\.decoder\.bbox_embed\.",  # the box heads once more
    r"(patch_projector_\d|body_det_projector|neck_det_projector)\.",  # VkD's, which serve training only
)
_RENAMED = (
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"decoder.\1.self_attn.o_proj."),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"decoder.\1.encoder_attn."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.\1.encoder_attn_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.", r"decoder.\1.self_attn_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"decoder.\1.final_layer_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.linear(\d)\.", r"decoder.\1.mlp.fc\2."),
    (r"transformer\.(enc_output|enc_output_norm|token_embed)\.", r"token_head.\1."),
    (r"transformer\.reference_points\.", "reference_points."),
    (r"fusion\.multi_scaler\.layer_(\d)_rn\.", r"fusion.proj.\1.0."),
    (r"fusion\.multi_scaler\.p_norm_(\d)\.", r"fusion.proj.\1.1."),
    (r"fusion\.multi_scaler\.refinenet_(\d)\.resConfUnit1\.", r"fusion.merge.\1.side."),
    (r"fusion\.multi_scaler\.refinenet_(\d)\.resConfUnit2\.", r"fusion.merge.\1.out."),
    (r"fusion\.multi_scaler\.refinenet_(\d)\.smoothing\.", r"fusion.merge.\1.smoothing."),
    (r"vector_embed\.\d+\.", "vector_embed."),  # one head under a name for each prediction
)
_IN_PROJ = re.compile(r"transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)$")
_SHARED = re.compile(r"(class_embed|bbox_embed|iou_embed)\.(\d+)\.")


def is_vidt(names: frozenset[str]) -> bool:
    """True when weights are named as ViDT's authors name them."""
    return names.issuperset(_SIGN)


def config_of(tensors: Mapping[str, Tensor], unseen: Mapping[str, Any] = UNSEEN) -> ViDTConfig:
    """The network that a checkpoint's weights are for.

    Args:
        tensors: the authors', by name.
        unseen: arguments that no weight shows, instead of those of every release: the decoder's
            `decoder_attention_heads`, and `cross_stages`, in which tokens look at the image.

    Raises:
        UserError: a weight that shows a size is missing, the sizes contradict each other, or an argument is not one
            that the weights leave open.
    """
    from kd_hf.detection.networks.vidt_config import BODIES, ViDTConfig

    if unknown := next(iter(unseen.keys() - UNSEEN.keys()), None):
        raise UserError(f"--kwargs: the weights tell ViDT's '{unknown}', or it is none.{nearest(unknown, UNSEEN)}")
    try:
        sizes = _sizes(tensors, {**UNSEEN, **unseen})
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"the checkpoint is no whole ViDT: it has no usable weight {error}") from None
    drop_path = {body[:3]: body[3] for body in BODIES.values()}
    body = (sizes["embed_dim"], sizes["depths"], sizes["num_heads"])
    return ViDTConfig(drop_path_rate=drop_path.get(body, 0.0), **sizes)


def _sizes(tensors: Mapping[str, Tensor], unseen: Mapping[str, Any]) -> dict[str, Any]:
    stages = count_numbers(tensors, STAGE)
    blocks = [f"backbone.layers.{stage}.blocks." for stage in range(stages)]
    tables = [tensors[f"{block}0.attn.relative_position_bias_table"] for block in blocks]
    width, inputs = tensors["tgt_proj.0.weight"].shape[:2]
    embed_dim = tensors["backbone.det_token"].shape[2]
    if embed_dim * 2 ** (stages - 1) != inputs:
        raise ValueError("tgt_proj.0.weight that fits backbone.det_token")
    layer = "transformer.decoder.layers.0."
    levels = stages
    name = f"{layer}cross_attn.attention_weights.weight"
    samples, rest = divmod(tensors[name].shape[0], unseen["decoder_attention_heads"] * levels)
    if rest or not samples:
        raise ValueError(f"{name} for {unseen['decoder_attention_heads']} heads (--kwargs decoder_attention_heads=…)")
    fc1 = tensors[f"{blocks[0]}0.mlp.fc1.weight"]
    vector = tensors.get("vector_embed.0.layers.2.weight")
    return {
        "embed_dim": embed_dim,
        "depths": tuple(count_numbers(tensors, re.escape(block) + r"(\d+)\.") for block in blocks),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (round(tables[0].shape[0] ** 0.5) + 1) // 2,
        "patch_size": tensors["backbone.patch_embed.proj.weight"].shape[-1],
        "mlp_ratio": fc1.shape[0] / fc1.shape[1],
        "num_queries": tensors["backbone.det_token"].shape[1],
        "d_model": width,
        "decoder_layers": count_numbers(tensors, r"transformer\.decoder\.layers\.(\d+)\."),
        **unseen,
        "decoder_ffn_dim": tensors[f"{layer}linear1.weight"].shape[0],
        "decoder_n_points": samples,
        "with_box_refine": "transformer.decoder.bbox_embed.0.layers.0.weight" in tensors,
        "fusion": "fusion.multi_scaler.layer_0_rn.weight" in tensors,
        "iou_aware": "iou_embed.0.layers.0.weight" in tensors,
        "token_label": "transformer.token_embed.weight" in tensors,
        "mask_vector": 0 if vector is None else vector.shape[0],
        "num_labels": tensors["class_embed.0.weight"].shape[0],
    }


def to_vidt(tensors: Mapping[str, Tensor], config: ViDTConfig) -> Named:
    """Rename weights; what the network has no use for is left out.

    Args:
        tensors: the authors', by name.
        config: the network's, from :func:`config_of`.

    Returns:
        (their name, the network's name, tensor). A name that the tables do not know keeps its name.
    """
    coarsest = len(config.depths) - 1
    dropped = [re.compile(pattern) for pattern in _DROPPED]
    # the coarsest level has nothing to merge with
    dropped.append(re.compile(rf"fusion\.multi_scaler\.refinenet_{coarsest}\.(resConfUnit1|smoothing)\."))
    named: Named = []
    taken: set[str] = set()
    for name, tensor in tensors.items():
        if any(pattern.match(name) for pattern in dropped):
            continue
        if match := _IN_PROJ.match(name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                named.append((name, f"decoder.{match[1]}.self_attn.{part}_proj.{match[2]}", rows))
            continue
        ours = _renamed(name, config)
        if ours not in taken:
            named.append((name, ours, tensor))
        taken.add(ours)
    return named


def _renamed(name: str, config: ViDTConfig) -> str:
    if not config.with_box_refine and (match := _SHARED.match(name)):
        return f"{match[1]}.0.{name[match.end() :]}"
    for pattern, ours in _RENAMED:
        renamed, count = re.subn("^" + pattern, ours, name)
        if count:
            return renamed
    return name


def fit_vidt(
    tensors: Mapping[str, Tensor], checkpoint: str = "the checkpoint", unseen: Mapping[str, Any] = UNSEEN
) -> tuple[ViDTConfig, dict[str, Tensor]]:
    """The network's configuration and all its weights by name; `unseen` as :func:`config_of`.

    Raises:
        UserError: names on one side only, or another shape; the message has the first of each kind and their number.
    """
    import torch

    from kd_hf.detection.networks.vidt import ViDTForObjectDetection

    config = config_of(tensors, unseen)
    with torch.device("meta"):
        wanted = ViDTForObjectDetection(config).state_dict()
    named = to_vidt(tensors, config)
    found = {ours: tensor.clone() for _, ours, tensor in named}
    shapes = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    complaints = {
        "not known to the network": [theirs for theirs, ours, _ in named if ours not in wanted],
        "missing": [name for name in wanted if name not in found],
        "of another shape": shapes,
    }
    said = [f"{len(names)} {what}: {enumerate_names(names)}" for what, names in complaints.items() if names]
    if said:
        raise UserError(f"'{checkpoint}' does not fit ViDT: {'; '.join(said)}")
    return config, found


def convert_vidt(
    tensors: Mapping[str, Tensor],
    folder: Path,
    checkpoint: str = "the checkpoint",
    unseen: Mapping[str, Any] = UNSEEN,
) -> list[str]:
    """Write a model folder with code, weights and image processor that transformers loads.

    Args:
        tensors: the authors', as :func:`kd_hf.convert.layouts.find_student` takes them out of a file.
        folder: where the model goes.
        checkpoint: the file's name, for messages.
        unseen: as :func:`config_of`.

    Returns:
        What was done, in lines for a person.

    Raises:
        UserError: as :func:`fit_vidt`.
    """
    from safetensors.torch import load_file

    from kd_hf.detection.networks.vidt import ViDTForObjectDetection
    from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor
    from kd_hf.files import atomic_folder
    from kd_hf.models.safetensors import write_safetensors

    config, weights = fit_vidt(tensors, checkpoint, unseen)
    network = ViDTForObjectDetection(config)
    network.load_state_dict(weights)
    with atomic_folder(folder.absolute()) as temporary:
        network.save_pretrained(temporary)
        for path in temporary.glob("*.safetensors"):
            aligned = path.with_suffix(".aligned")
            write_safetensors(aligned, load_file(path))
            aligned.replace(path)
        ViDTImageProcessor().save_pretrained(temporary)
    unused = len(tensors) - len({theirs for theirs, _, _ in to_vidt(tensors, config)})
    return [
        f"{folder}: ViDT, {config.num_queries} boxes, {config.num_labels} classes, "
        f"{sum(value.numel() for value in weights.values()) / 1e6:.1f} M parameters",
        f"left out: {unused} weights that the network does not use",
        "no weight shows, so check: " + ", ".join(f"{name}={getattr(config, name)}" for name in UNSEEN),
    ]
