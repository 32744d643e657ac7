from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.methods.features import as_map, as_tokens, map_shape, patch_role, pooled, width
from kd_hf.testing import tiny_stages, tiny_vit

VIT = tiny_vit("vit", prefix=("cls", "dist"))


def test_a_role_carries_the_prefix_tokens_of_its_tap():
    roles = {tap: patch_role("x", tap, VIT) for tap in ("block:1", "tokens", "tokens:patch", "tokens:cls", "stage:1")}
    assert roles == {
        "block:1": "x_after_2",
        "tokens": "x_after_2",
        "tokens:patch": "x",
        "tokens:cls": "x",
        "stage:1": "x",
    }
    late = replace(VIT, block_prefix=())
    assert patch_role("x", "block:1", late) == "x"
    assert patch_role("x", "stage:-1", tiny_stages("cnn")) == "x"


def test_maps_tokens_and_vectors_mean_the_same_patches():
    feature = torch.randn(2, 5, 3, 3)
    patches = feature.flatten(2).transpose(1, 2)
    sequence = torch.cat([torch.randn(2, 2, 5), patches], 1)
    for role, value in (("x", feature), ("x", patches), ("x_after_2", sequence)):
        torch.testing.assert_close(as_map(role, value), feature)
        torch.testing.assert_close(as_tokens(role, value), patches)
        torch.testing.assert_close(pooled(role, value), feature.mean((2, 3)))
        assert width(tuple(value.shape[1:])) == 5
        assert map_shape("here", role, tuple(value.shape[1:])) == (5, 3, 3)
    vector = torch.randn(2, 5)
    assert pooled("x", vector) is vector
    assert width((5,)) == 5


@pytest.mark.parametrize("shape", [(5,), (10, 5), (1, 5), (2, 3, 4, 5)])
def test_what_is_no_map_is_refused(shape):
    with pytest.raises(UserError, match=r"methods\.m\.tap gives shape .*expected a map"):
        map_shape("methods.m.tap", "x_after_1" if shape == (1, 5) else "x", shape)
