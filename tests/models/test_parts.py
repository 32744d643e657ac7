from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing, Stage
from kd_hf.models.handle import ModelHandle, Origin
from kd_hf.models.load import load_model
from kd_hf.models.parts import final_tap, last_stage_entry, live_part
from kd_hf.models.taps import TappedModel

VIT = {"depth": 4, "embed_dim": 32, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
HF_LEVELS = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
HF_SWIN = {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 2], "window_size": 2, "patch_size": 2}
HF_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
HF_DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}

PYRAMIDS = {
    "swin_tiny_patch4_window7_224": (SWIN, 64),
    "swinv2_tiny_window8_256": (SWIN, 64),
    "resnet18": ({}, 64),
    "regnety_002": ({}, 64),
    "test_convnext": ({}, 64),
    "pvt_v2_b0": ({}, 64),
    "transformers/resnet": ({**HF_LEVELS, "embedding_size": 8}, 64),
    "transformers/regnet": ({**HF_LEVELS, "embedding_size": 8, "groups_width": 8}, 64),
    "transformers/convnext": (HF_LEVELS, 64),
    "transformers/convnextv2": (HF_LEVELS, 64),
    "transformers/swin": (HF_SWIN, 34),
    "transformers/swinv2": (HF_SWIN, 32),
}
PLAIN = {
    "vit_tiny_patch16_224": ({**VIT, "class_token": False, "global_pool": "avg"}, 32),
    "mixer_s32_224": ({}, 64),
}


def load(name, kwargs, size):
    torch.manual_seed(0)
    handle = load_model(name, pretrained=False, num_classes=7, image_size=size, kwargs=kwargs)
    handle.network.requires_grad_(False).eval()
    return handle


def as_map(value):
    if value.ndim == 4:
        return value
    side = int(value.shape[1] ** 0.5)
    return value.transpose(1, 2).unflatten(2, (side, side))


def run(handle, size):
    """The map before the last stage, the part behind it, and the final features of one pass."""
    taps = (last_stage_entry(handle.info), final_tap(handle.info))
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    seen = TappedModel(handle, handle.info, taps)(pixels).taps
    return as_map(seen[taps[0]]), live_part(handle, f"after:{taps[0]}"), as_map(seen[taps[1]])


@pytest.mark.parametrize("name", [*PYRAMIDS, *PLAIN])
def test_the_rest_of_a_network_continues_what_the_tap_gave(name):
    kwargs, size = {**PYRAMIDS, **PLAIN}[name]
    entry, part, final = run(load(name, kwargs, size), size)
    torch.testing.assert_close(part(entry), final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("deit_tiny_patch16_224", VIT), ("transformers/vit", HF_VIT), ("transformers/dinov2", HF_DINO)]
)
def test_blocks_run_without_prefix_tokens(name, kwargs):
    handle = load(name, kwargs, 32)
    part = live_part(handle, "after:block:-2")
    feature = torch.randn(2, 32, 3, 5)
    tokens = feature.flatten(2).transpose(1, 2)
    for path in (handle.info.blocks[-1], handle.info.norm):
        tokens = handle.network.get_submodule(path)(tokens)
    torch.testing.assert_close(part(feature), tokens.transpose(1, 2).reshape(2, 32, 3, 5))


def test_parts_are_the_teachers_own_modules():
    handle = load("swin_tiny_patch4_window7_224", SWIN, 64)
    part = live_part(handle, "after:stage:3")
    owned = {id(parameter) for parameter in handle.network.parameters()}
    assert {id(parameter) for parameter in part.parameters()} <= owned
    assert live_part(handle, "head") is handle.network.get_submodule(handle.info.head)
    handle.network.to(torch.bfloat16)
    feature = torch.randn(1, 64, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        final = part(feature)
    assert final.dtype == torch.bfloat16
    final.float().square().sum().backward()
    assert feature.grad.any()
    assert all(parameter.grad is None for parameter in part.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "part", "message"),
    [
        ("resnet18", {}, "tail", r"part 'tail' does not exist; known: head, after:TAP"),
        ("resnet18", {}, "norm:stage:1", r"part 'norm:stage:1': resnet18 has no BatchNorm there"),
        ("convnext_atto", {}, "norm:preact:1", r"tap 'preact:1' does not exist in convnext_atto"),
        ("resnet18", {}, "after:stage:9", r"tap 'stage:9' does not exist in resnet18"),
        ("resnet18", {}, "after:stage:-1", r"'after:stage:-1' of resnet18: expected a stage or block before"),
        ("resnet18", {}, "after:module:layer3", r"'after:module:layer3' of resnet18: expected a stage"),
        ("beit_base_patch16_224", VIT, "after:block:1", r"\(Beit\) cannot run from the middle.*VisionTransformer"),
        ("eva02_tiny_patch14_224", VIT, "after:block:1", r"\(Eva\) cannot run from the middle"),
        ("mobilenetv3_small_050", {}, "after:stage:-2", r"\(MobileNetV3\) cannot run from the middle"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(name, kwargs, part, message):
    with pytest.raises(UserError, match=message):
        live_part(load(name, kwargs, 28), part)


def test_networks_without_named_levels_are_refused():
    bare = ModelInfo("bare", "torch", 3, Preprocessing())
    with pytest.raises(UserError, match="bare has no named stages or tokens"):
        final_tap(bare)
    with pytest.raises(UserError, match="bare has no last stage that could run apart"):
        last_stage_entry(bare)
    one = replace(bare, stages=(Stage("body", 8),))
    assert final_tap(one) == "stage:-1"
    with pytest.raises(UserError, match="bare has no classifier"):
        live_part(ModelHandle(torch.nn.Identity(), one, Origin("torch", "bare")), "head")
