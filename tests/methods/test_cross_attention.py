from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.errors import UserError
from kd_hf.methods.cross_attention import (
    ChannelNorm,
    CrossAttentionProjector,
    PointwiseProjector,
    mimicking,
    without_mean,
)


def cap(own_queries=True, norm="batch", scale=5.0, heads=3):
    torch.manual_seed(0)
    return CrossAttentionProjector((10, 4, 6), 12, (3, 5), heads, scale, norm, own_queries).double()


def feature(batch=2, seed=1):
    return torch.randn(batch, 10, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(module, x, queries):
    """The docstring's equations, one head at a time."""
    k = F.relu(module.conv_norm(module.conv(x))) + module.position
    k = k.flatten(2).transpose(1, 2)
    key, value = k @ module.key.weight.T + module.key.bias, k @ module.value.weight.T + module.value.bias
    query = module.query(F.relu(module.query_in(queries)))
    heads = []
    for h in range(module.heads):
        at = slice(h * 12 // module.heads, (h + 1) * 12 // module.heads)
        score = query[..., at] @ key[..., at].transpose(1, 2) / (12 / module.heads) ** 0.5
        heads.append((5.0 * score).softmax(-1) @ value[..., at])
    n = module.norm(module.out(torch.cat(heads, -1)))
    return n + module.contract(F.relu(module.expand(n)))


@pytest.mark.parametrize("own_queries", [True, False])
def test_equations_by_hand(own_queries):
    module, x = cap(own_queries), feature()
    queries = torch.randn(2, 15, 12, dtype=torch.float64)
    found = module(x, None if own_queries else queries)
    expected = by_hand(module, x, module.table.expand(2, -1, -1) if own_queries else queries)
    assert found.shape == (2, 15, 12)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("own_queries", [True, False])
def test_every_parameter_learns(own_queries):
    module = cap(own_queries)
    module(feature(), torch.randn(2, 15, 12, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert (module.table is not None) == own_queries


def test_layer_norm_does_not_couple_samples():
    x = feature(4)
    single, coupled = cap(norm="layer"), cap()
    torch.testing.assert_close(single(x)[:2], single(x[:2]))
    assert not torch.allclose(coupled(x)[:2], coupled(x[:2]))
    norm, map_ = ChannelNorm(10).double(), feature()
    torch.testing.assert_close(norm(map_)[:, :, 1, 2], F.layer_norm(map_[:, :, 1, 2], (10,)))


def macs_of(module, *args):
    module.float().eval().requires_grad_(False)
    # the table's own products are done once per batch
    counts = []
    for batch in (1, 2):
        # attention as matrix products: fused kernels are not counted by every torch
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*(argument.float()[:1].expand(batch, *argument.shape[1:]) for argument in args))
        counts.append(counter.get_total_flops() // 2)
    return counts[1] - counts[0]


@pytest.mark.parametrize("own_queries", [True, False])
def test_macs_are_what_is_computed_per_image(own_queries):
    module = cap(own_queries)
    queries = [] if own_queries else [torch.randn(1, 15, 12)]
    counted = macs_of(module, feature(1), *queries)
    assert counted == module.macs()
    plain = PointwiseProjector((10, 3, 5), 12, (3, 5))
    assert plain.macs() == macs_of(plain, torch.randn(1, 10, 3, 5)) == 10 * 12 * 15


def test_pointwise_is_a_convolution_or_nothing():
    x = torch.randn(2, 10, 3, 5)
    plain = PointwiseProjector((10, 3, 5), 12, (3, 5))
    convolved = F.conv2d(x, plain.align.weight[:, :, None, None], plain.align.bias)
    torch.testing.assert_close(plain(x), convolved.flatten(2).transpose(1, 2))
    same = PointwiseProjector((10, 3, 5), 10, (3, 5))
    assert isinstance(same.align, nn.Identity)
    assert torch.equal(same(x), x.flatten(2).transpose(1, 2))
    assert same.macs() == 0
    with pytest.raises(UserError, match=r"3×5 is not the teacher's 7×7; use projector: cross_attention"):
        PointwiseProjector((10, 3, 5), 12, (7, 7))


def dct_matrix(size):
    """Orthonormal DCT-II."""
    k = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(torch.pi * (k[None] + 0.5) * k[:, None] / size) * (2 / size) ** 0.5
    rows[0] /= 2**0.5
    return rows


def test_without_mean_is_the_transform_without_its_first_coefficient():
    maps = torch.randn(2, 3, 7, 7, dtype=torch.float64) + 5
    basis = dct_matrix(7)
    spectrum = basis @ maps @ basis.T
    spectrum[..., 0, 0] = 0
    filtered = basis.T @ spectrum @ basis
    ours = without_mean(maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(ours, filtered.flatten(2).transpose(1, 2))


def test_mimicking_is_the_squared_distance_of_unit_vectors():
    student = torch.randn(3, 9, 5, dtype=torch.float64, requires_grad=True)
    target = F.normalize(torch.randn(3, 9, 5, dtype=torch.float64), dim=-1)
    expected = (F.normalize(student, dim=-1) - target).square().sum((1, 2))
    torch.testing.assert_close(mimicking(student, target), expected)
    ours, theirs = (torch.autograd.grad(value.sum(), student)[0] for value in (mimicking(student, target), expected))
    torch.testing.assert_close(ours, theirs)
    zero = torch.zeros(1, 1, 5, requires_grad=True)
    mimicking(without_mean(zero), torch.zeros(1, 1, 5)).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_mimicking_is_not_rounded_by_autocast():
    ours, theirs = torch.randn(2, 15, 64), F.normalize(torch.randn(2, 15, 64), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = mimicking(ours, theirs)
    assert torch.equal(found, mimicking(ours, theirs))
