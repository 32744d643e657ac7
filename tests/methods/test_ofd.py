"""OFD: margins from the teacher's BatchNorms, and stages that are paired from the last one on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.ofd import OFD, margin
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import tiny_stages
from tests.methods import straightforward as plain

BATCH = 3


def norms(*widths):
    generator = torch.Generator().manual_seed(3)
    made = {}
    for place, width in enumerate(widths):
        norm = nn.BatchNorm2d(width).double()
        with torch.no_grad():
            norm.weight.copy_(torch.randn(width, generator=generator))
            norm.bias.copy_(torch.randn(width, generator=generator))
        made[f"norm:preact:{place}"] = norm
    return made


def features(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def build(student, teacher):
    roles = [f"stage_{place + 1}" for place in range(len(student))]
    shapes = [Shapes(2, dict(zip(roles, side, strict=True))) for side in (student, teacher)]
    return OFD(OFD.Config(), *shapes, norms(*(shape[0] for shape in teacher))).double()


def losses(method, student, teacher):
    blank = torch.zeros(BATCH, 1)
    pair = (Outputs(blank, taps=dict(zip(method.roles, maps, strict=True))) for maps in (student, teacher))
    return method(*pair, Target(torch.full((BATCH,), -1)), {})


def needs(student, teacher):
    return OFD.needs(OFD.Config(), student, teacher)


@pytest.mark.parametrize("larger", [1, 2])
def test_the_straightforward_form_has_the_same_value_and_gradient(larger):
    shapes = [(3, 4, 6), (4, 2, 3)]
    theirs = [(width + 2, height * larger, columns * larger) for width, height, columns in shapes]
    method, student, teacher = build(shapes, theirs), features(shapes), features(theirs, 1)
    student = [each.requires_grad_() for each in student]
    margins = [method.get_buffer(f"margin_{role}") for role in method.roles]
    values = [
        torch.stack(list(losses(method, student, teacher).values())).sum(),
        plain.ofd(student, teacher, method.connectors, margins),
    ]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, [*student, *method.parameters()]) for value in values)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_margin_is_the_mean_of_what_is_negative_or_three_deviations_below_nothing():
    norm = nn.BatchNorm2d(6).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.3, -1.0, 0.0, 5.0, -2.0, 2.0]))
    found = margin(norm).flatten()
    assert found.requires_grad is False and (found < 0).all()
    for channel in range(3):
        deviation, shift = norm.weight[channel].abs().item(), norm.bias[channel].item()
        places = torch.linspace(shift - 12 * deviation, 0, 200_001, dtype=torch.float64)
        density = torch.exp(-0.5 * ((places - shift) / deviation) ** 2)
        expected = torch.trapezoid(places * density, places) / torch.trapezoid(density, places)
        torch.testing.assert_close(found[channel], expected, rtol=1e-6, atol=0)
    # negative with a probability of 3e-7; without deviation: the shift itself where it is negative
    torch.testing.assert_close(found[3:5], torch.tensor([-3.0, -2.0], dtype=torch.float64))
    assert -1e-10 < found[5] < 0


def test_a_student_below_the_margin_is_left_alone_where_the_teacher_is_silent():
    method = build([(2, 2, 2)], [(2, 2, 2)])
    method.connectors[0] = nn.Identity()
    bound = method.margin_stage_1.expand(1, 2, 2, 2)
    teacher = torch.full((BATCH, 2, 2, 2), -100.0, dtype=torch.float64)
    teacher[0] = 1.0
    student = (bound - 1).repeat(BATCH, 1, 1, 1)
    student[2] = bound + 1
    student.requires_grad_()
    value = losses(method, [student], [teacher])["stage_1"]
    value.backward()
    assert student.grad[0].all() and not student.grad[1].any() and student.grad[2].all()
    torch.testing.assert_close(student.grad[2], torch.full_like(student.grad[2], 2 / BATCH))


def test_networks_with_other_numbers_of_stages_are_paired_from_the_last_one_on():
    found = needs(tiny_stages("five", (4, 4, 6, 6, 8)), tiny_stages("three", (8, 10, 12)))
    assert list(found.student.values()) == ["preact:3", "preact:4", "preact:5"]
    assert list(found.teacher.values()) == ["preact:1", "preact:2", "preact:3"]
    assert found.parts == ("norm:preact:1", "norm:preact:2", "norm:preact:3")
    assert found.batch_coupled and not found.cacheable and not found.teacher_logits


def test_the_last_stage_counts_most_and_margins_are_in_no_checkpoint():
    shapes = [(2, 4, 4)] * 3
    method = build(shapes, shapes)
    method.connectors = nn.ModuleList(nn.Identity() for _ in shapes)
    same = torch.full((BATCH, 2, 4, 4), 1.0, dtype=torch.float64)
    values = list(losses(method, [same + 1] * 3, [same] * 3).values())
    torch.testing.assert_close(torch.stack(values), torch.tensor([8.0, 16.0, 32.0], dtype=torch.float64))
    assert not [name for name in build(shapes, shapes).state_dict() if "margin" in name]


def test_networks_without_pre_activations_are_refused():
    cnn = tiny_stages("resnet")
    linear = replace(cnn, name="mobile", stages=(*cnn.stages[:-1], replace(cnn.stages[-1], preact=None)))
    for pair in ((linear, cnn), (cnn, linear), (cnn, tiny_stages("swin", layout="NHWC"))):
        name = next(info.name for info in pair if info is not cnn)
        with pytest.raises(UserError, match=rf"methods\.ofd .* '{name}' has stages without one; choose"):
            needs(*pair)


def test_a_teacher_with_smaller_maps_is_refused():
    with pytest.raises(UserError, match=r"methods\.ofd: stage_1 is \(3, 4, 4\) in the student and \(3, 2, 8\)"):
        build([(3, 4, 4)], [(3, 2, 8)])
