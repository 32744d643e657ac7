from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kd_hf.methods.orthogonal import OrthogonalProjection, positive_qr, skew_exponential

CASES = [
    (12, 40, "householder"),
    (40, 12, "householder"),
    (12, 13, "householder"),
    (16, 16, "matrix_exp"),
    (4, 30, "matrix_exp"),
    (30, 4, "matrix_exp"),
]
MAPS = ("householder", "matrix_exp", "qr")
SHAPES = ((6, 17), (17, 6), (8, 8), (1, 5))


def both(inputs, outputs, kind, dtype=torch.float64, scale=0.5):
    """PyTorch's parametrised layer with a random parameter, and ours from its state."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
    layer = nn.utils.parametrizations.orthogonal(linear, orthogonal_map=kind)
    original = layer.parametrizations.weight.original
    ours = OrthogonalProjection(inputs, outputs, kind).to(dtype)
    with torch.no_grad():
        change = scale * torch.randn_like(original)
        original.add_(change.tril(-1) if outputs >= inputs else change.triu(1))
        ours.original.copy_(original)
    ours.set_base(layer.parametrizations.weight[0].base)
    return layer, ours


def error(weight):
    """How far the columns (rows, of a wide matrix) are from orthonormal."""
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    return (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max().item()


@pytest.mark.parametrize(("inputs", "outputs", "kind"), CASES)
def test_weight_and_gradients_are_those_of_pytorch(inputs, outputs, kind):
    layer, ours = both(inputs, outputs, kind)
    theirs = layer.parametrizations.weight.original
    torch.testing.assert_close(ours.weight(), layer.weight, rtol=0, atol=1e-13)
    features = torch.randn(5, inputs, dtype=torch.float64, requires_grad=True)
    twin = features.detach().clone().requires_grad_()
    pull = torch.randn(5, outputs, dtype=torch.float64)
    (layer(features) * pull).sum().backward()
    (ours(twin) * pull).sum().backward()
    torch.testing.assert_close(ours(twin), layer(features), rtol=0, atol=1e-12)
    torch.testing.assert_close(twin.grad, features.grad, rtol=0, atol=1e-12)
    free = torch.ones_like(theirs).tril(-1) if outputs >= inputs else torch.ones_like(theirs).triu(1)
    torch.testing.assert_close(ours.original.grad * free, theirs.grad * free, rtol=0, atol=1e-11)


def test_single_precision_weight_of_the_published_widths_and_its_price():
    layer, ours = both(96, 1024, "householder", torch.float32, scale=0.05)
    assert (ours.weight() - layer.weight).abs().max() <= 1e-6
    features = torch.randn(32, 96)

    def seconds(module):
        start = time.perf_counter()
        module(features).square().mean().backward()
        return time.perf_counter() - start

    ours = OrthogonalProjection(96, 1024, "householder")
    seconds(ours)
    # 0.0015 at 192 → 3024; the bound leaves room for a busy machine and small matrices
    assert min(seconds(ours) for _ in range(5)) <= 0.1 * seconds(layer)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_fresh_weight_is_orthonormal_and_random(inputs, outputs, kind):
    torch.manual_seed(0)
    first, second = (OrthogonalProjection(inputs, outputs, kind).weight() for _ in range(2))
    assert first.shape == (outputs, inputs)
    assert error(first) < 1e-6
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (6, 17)])
def test_auto_is_what_pytorch_chooses(inputs, outputs):
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(inputs, outputs, bias=False))
    chosen = layer.parametrizations.weight[0].orthogonal_map.name
    assert OrthogonalProjection(inputs, outputs).map == chosen


def train(projector, steps, weight_decay=0.05):
    """AdamW against a fixed random target; returns the features' gradient norm at the end."""
    torch.manual_seed(1)
    inputs = 6
    features, target = torch.randn(32, inputs), torch.randn(32, 17)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2, weight_decay=weight_decay)
    for _ in range(steps):
        leaf = features.clone().requires_grad_()
        loss = (projector(leaf) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return leaf.grad.norm().item()


@pytest.mark.parametrize("kind", MAPS)
def test_it_stays_orthonormal_and_alive_under_weight_decay(kind):
    torch.manual_seed(0)
    projector = OrthogonalProjection(6, 17, kind)
    before = projector.weight().detach()
    assert train(projector, 100) > 1e-3
    assert error(projector.weight()) < 1e-5
    assert (projector.weight() - before).abs().max() > 0.1


def test_truncated_signs_kill_it_as_in_the_released_code():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 17, bias=False))
    ours = OrthogonalProjection(6, 17, truncated_signs=True)
    assert error(ours.weight()) < 1e-6
    for projector in (layer, ours):
        assert train(projector, 2) == 0
    assert not layer.weight.any()
    assert not ours.weight().any()
    alive = OrthogonalProjection(6, 17, truncated_signs=True)
    train(alive, 5, weight_decay=0.0)
    assert error(alive.weight()) < 1e-6


def test_weight_decay_alone_leads_back_to_the_base():
    projector = both(6, 17, "householder", torch.float32)[1]
    with torch.no_grad():
        projector.original.mul_(1e-4)
    base = both(6, 17, "householder", torch.float32)[0].parametrizations.weight[0].base[:, :6]
    torch.testing.assert_close(projector.weight(), base, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("kind", MAPS)
def test_gradients_by_finite_differences(inputs, outputs, kind):
    torch.manual_seed(0)
    projector = OrthogonalProjection(inputs, outputs, kind).double()
    features = torch.randn(3, inputs, dtype=torch.float64)
    point = projector.original.detach() + 0.3 * torch.randn_like(projector.original)

    def function(original):
        return torch.func.functional_call(projector, {"original": original}, (features,))

    assert torch.autograd.gradcheck(function, (point.requires_grad_(),))


def test_a_skew_exponential_of_a_thin_matrix_is_that_of_the_whole():
    thin = torch.randn(30, 4, dtype=torch.float64)
    lower = torch.zeros(30, 30, dtype=torch.float64)
    lower[:, :4] = thin.tril(-1)
    torch.testing.assert_close(skew_exponential(thin), torch.matrix_exp(lower - lower.T)[:, :4])
    start = torch.zeros(30, 4, dtype=torch.float64, requires_grad=True)
    skew_exponential(start)[7, 1].backward()
    assert start.grad[7, 1] == 1


def test_qr_keeps_the_direction_of_each_column():
    matrix = torch.randn(9, 4, dtype=torch.float64)
    q = positive_qr(matrix)
    assert error(q) < 1e-12
    assert ((q * matrix).sum(0) > 0).all()
    torch.testing.assert_close(positive_qr(q), q)


def test_autocast_does_not_reach_it_and_state_restores_it():
    projector = OrthogonalProjection(6, 17)
    features = torch.randn(4, 6)
    exact = projector(features)
    with torch.autocast("cpu", torch.bfloat16):
        under = projector(features.bfloat16())
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, exact, rtol=0, atol=0.02)
    other = OrthogonalProjection(6, 17)
    other.load_state_dict(projector.state_dict(), strict=True)
    assert torch.equal(other(features), exact)
    assert all(tensor.numel() <= 17 * 6 for tensor in projector.state_dict().values()), "no n×n matrix is kept"


@pytest.mark.parametrize("kind", MAPS)
def test_shapes_alone_can_be_built(kind):
    with torch.device("meta"):
        projector = OrthogonalProjection(6, 17, kind)
    assert projector.original.shape == (17, 6)
