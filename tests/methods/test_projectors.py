from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.methods.projectors import Connector, Generator, TokenProjector, align_tokens, kernel_macs


def test_generator_keeps_the_shape_and_runs_a_relu_between_its_convolutions():
    generator = Generator(3)
    feature = torch.randn(2, 3, 5, 4)
    assert generator(feature).shape == feature.shape
    assert list(generator.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    nn.init.constant_(generator[0].bias, -1e3)
    torch.testing.assert_close(generator(feature), generator[2].bias.view(1, 3, 1, 1).expand(2, 3, 5, 4))


def test_connector_starts_at_the_published_deviation_and_normalises_the_batch():
    torch.manual_seed(0)
    connector = Connector(64, 128)
    assert connector[0].bias is None
    assert connector[0].weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.03)
    mapped = connector[1](connector[0](torch.randn(8, 64, 6, 6) * 5 + 3))
    torch.testing.assert_close(mapped.mean((0, 2, 3)), torch.zeros(128), atol=1e-4, rtol=0)
    assert (connector(torch.randn(8, 64, 6, 6)) >= 0).all()


# the sizes of the published pairs DeiT-B → DeiT-T and DeiT-B → DeiT-S
@pytest.mark.parametrize(("width", "parameters"), [(192, 462_048), (384, 664_896)])
def test_token_projector_has_the_published_size(width, parameters):
    assert sum(p.numel() for p in TokenProjector(width, 768).parameters()) == parameters


def test_token_projector_starts_near_zero_and_gives_full_precision():
    torch.manual_seed(0)
    projector = TokenProjector(65, 30)
    assert projector.fc1.out_features == 47
    assert projector.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not projector.fc1.bias.any()
    tokens = torch.randn(4, 65)
    rough = projector.bfloat16()(tokens)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, projector.float()(tokens), rtol=0.1, atol=0.02)


def test_tokens_are_aligned_only_between_different_widths():
    assert not list(align_tokens(6, 6).parameters())
    assert align_tokens(6, 8).weight.shape == (8, 6)


def test_kernel_macs_are_those_of_one_position():
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1, bias=False))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(1, 3, 4, 4))
    assert counter.get_total_flops() == 2 * 16 * kernel_macs(module.modules())
