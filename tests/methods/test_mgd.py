from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.methods.mgd import MGD
from kd_hf.outputs import Outputs, Target
from tests.methods.build import build

SAME = {"student": {"feature": (4, 3, 5)}, "teacher": {"feature": (4, 3, 5)}}
WIDER = {"student": {"feature": (4, 3, 5)}, "teacher": {"feature": (6, 3, 5)}}


def maps(seed=0, channels=4):
    return torch.randn(2, channels, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss(method, student, teacher, mask):
    outputs = [Outputs(torch.zeros(2, 1), taps={"feature": value}) for value in (student, teacher)]
    return method(*outputs, Target(torch.zeros(2, dtype=torch.long)), {"mask": mask})["generation"]


def make_identity(method):
    """Let the generator pass its input through (where that is not negative)."""
    for conv in (method.generation[0], method.generation[2]):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    return method


def test_equal_maps_and_an_identity_generator_leave_what_was_masked():
    method = make_identity(build(MGD, **SAME))
    feature = maps().abs()
    assert loss(method, feature, feature, torch.ones(2, 4, 1, 1)) == 0
    mask = torch.tensor([0.0, 0.149, 0.151, 1.0]).view(1, 4, 1, 1).expand(2, 4, 1, 1)
    torch.testing.assert_close(loss(method, feature, feature, mask), feature[:, :2].square().sum() / 2)


def test_the_aligner_exists_only_between_different_widths():
    assert not list(build(MGD, **SAME).align.parameters())
    assert build(MGD, **WIDER).align.weight.shape == (6, 4, 1, 1)


def test_mask_is_one_number_per_sample_and_channel_and_depends_on_the_sample_only():
    method = build(MGD, **WIDER)
    keys = torch.arange(512)
    mask = method.draw(Draws(keys))["mask"]
    assert mask.shape == (512, 6, 1, 1)
    assert torch.equal(method.draw(Draws(keys[7:9]))["mask"], mask[7:9])
    assert (mask < 0.15).double().mean().item() == pytest.approx(0.15, abs=0.03)


def test_maps_of_different_size_are_refused_with_both_shapes():
    with pytest.raises(UserError, match=r"\(4, 3, 5\).*\(6, 7, 7\)"):
        build(MGD, student={"feature": (4, 3, 5)}, teacher={"feature": (6, 7, 7)})
    with pytest.raises(UserError, match=r"methods\.mgd\.teacher_tap: 'tokens'.*expected a map"):
        build(MGD, student={"feature": (4, 3, 5)}, teacher={"feature": (16, 6)}, teacher_tap="tokens")


def test_cost_counts_what_the_convolutions_compute():
    from torch.utils.flop_counter import FlopCounterMode

    method = build(MGD, **WIDER)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss(method, maps(), maps(1, 6), torch.ones(2, 6, 1, 1))
    assert counter.get_total_flops() == 2 * 2 * method.cost().macs
    assert method.cost().parameters == sum(p.numel() for p in method.parameters())
