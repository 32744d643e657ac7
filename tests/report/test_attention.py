"""Attention maps against softmax(q kᵀ) by hand, and what stands in where there is no class token."""

from __future__ import annotations

import pytest
import torch

from kd_hf.models.load import load_model
from kd_hf.report.attention import class_attention, feature_energy, gaze
from tests.models.families import tiny_timm, tiny_transformers


def images(size, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(network, pixels):
    with torch.no_grad():
        output = network(pixels)
    return output if isinstance(output, torch.Tensor) else output.logits


def by_hand(network, pixels, prefix):
    """Row of the class token from the input of the last block's attention."""
    caught, attention = [], network.blocks[-1].attn
    handle = attention.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    logits(network, pixels)
    handle.remove()
    batch, count, _ = caught[0].shape
    q, k, _ = attention.qkv(caught[0]).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights[:, :, 0, prefix:].mean(1).detach()


@pytest.mark.parametrize(
    ("name", "prefix"), [("deit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2), ("test_vit", 1)]
)
def test_timm_attention_is_softmax_of_qk(name, prefix):
    handle, size = tiny_timm(name)
    assert handle.network.blocks[-1].attn.fused_attn  # else there would be nothing to show
    pixels = images(size)
    before = logits(handle.network, pixels)
    found = class_attention(handle, pixels)
    torch.testing.assert_close(found.maps.flatten(1), by_hand(handle.network, pixels, prefix), rtol=1e-5, atol=1e-6)
    assert logits(handle.network, pixels).equal(before)
    assert all(block.attn.fused_attn for block in handle.network.blocks)
    assert not handle.network.blocks[-1].attn.attn_drop._forward_hooks


@pytest.mark.parametrize("key", ["vit", "deit", "beit", "dinov2", "dinov2-registers"])
def test_transformers_attention_is_that_of_an_eager_model(key):
    handle = tiny_transformers(key)
    pixels = images(32)
    before, way = logits(handle.network, pixels), handle.network.config._attn_implementation
    found = class_attention(handle, pixels)
    assert handle.network.config._attn_implementation == way == "sdpa"
    assert logits(handle.network, pixels).equal(before)
    handle.network.set_attn_implementation("eager")
    with torch.no_grad():
        whole = handle.network(pixels, output_attentions=True).attentions[-1]
    expected = whole[:, :, 0, len(handle.info.prefix) :].mean(1)
    torch.testing.assert_close(found.maps.flatten(1), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "xcit_nano_12_p16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"]
)
def test_other_transformers_with_a_class_token(name):
    handle, size = tiny_timm(name)
    found = class_attention(handle, images(size))
    assert found.maps.shape[0] == 3 and (found.maps >= 0).all()
    # a row of a softmax, less what the class token gives itself
    assert (found.maps.sum((1, 2)) < 1).all() and (found.maps.sum((1, 2)) > 0.2).all()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "convnext_atto", "test_vit2"])
def test_without_a_class_token_it_is_the_energy_of_features(name):
    handle, size = tiny_timm(name)
    assert class_attention(handle, images(size)) is None
    assert gaze(handle, images(size)).kind.startswith("feature energy of stage")


def test_energy_is_the_mean_square_of_the_deepest_map_that_is_not_too_coarse():
    handle = load_model("resnet18", num_classes=3, image_size=64)
    pixels = images(64)
    found, caught = feature_energy(handle, pixels), []
    hook = handle.network.layer3.register_forward_hook(lambda module, args, output: caught.append(output))
    logits(handle.network, pixels)
    hook.remove()
    assert found.kind == "feature energy of stage 3" and found.maps.shape == (3, 4, 4)
    torch.testing.assert_close(found.maps, caught[0].square().mean(1))


def test_networks_without_anything_to_show():
    assert gaze(load_model("levit_128s", num_classes=3), images(224, 1)) is None


def test_maps_of_a_single_point_show_nothing():
    handle = load_model("test_convnext", num_classes=3, image_size=32)
    deepest = handle.info.stages[-1:]
    handle.info = type(handle.info)(**{**vars(handle.info), "stages": deepest})
    assert feature_energy(handle, images(32)) is None
