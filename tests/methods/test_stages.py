"""FitNet, AT and VID: losses that compare maps of two networks one by one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_hf.errors import UserError
from kd_hf.methods.at import AT
from kd_hf.methods.fitnet import FitNet
from kd_hf.methods.vid import VID, log_scale_of
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import check_method, tiny_stages, tiny_vit
from tests.methods import straightforward as plain
from tests.methods.build import build

SIZES = ((4, 8, 8), (6, 4, 4), (8, 2, 2)), ((5, 8, 8), (9, 4, 4), (12, 2, 2))


def maps(sizes, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *size, dtype=torch.float64, generator=generator) for size in sizes]


def staged(method, sizes=SIZES, **config):
    """A method on as many maps as there are sizes, and its losses for random ones with the maps themselves."""
    shapes = [{f"map{place}": size for place, size in enumerate(side)} for side in sizes]
    built = build(method, student=shapes[0], teacher=shapes[1], **config)
    ours, theirs = [each.requires_grad_() for each in maps(sizes[0])], maps(sizes[1], seed=1)
    return built, ours, theirs, lambda: built(*outputs(ours, theirs), Target(torch.full((3,), -1)), {})


def outputs(*sides):
    return [Outputs(side[0].new_zeros(3, 1), taps={f"map{i}": each for i, each in enumerate(side)}) for side in sides]


def agree(value, expected, *leaves):
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def total(losses):
    return torch.stack(list(losses.values())).sum()


# equal, one side higher in turn
PAIRS = (SIZES, (((4, 8, 8), (6, 6, 6)), ((5, 4, 4), (9, 7, 7))))


@pytest.mark.parametrize("sizes", PAIRS)
def test_at_is_the_straightforward_form(sizes):
    _, ours, theirs, losses = staged(AT, sizes)
    assert list(losses()) == [f"stage{place + 1}" for place in range(len(ours))]
    agree(total(losses()), plain.at(ours, theirs), *ours)


@pytest.mark.parametrize("sizes", PAIRS)
def test_vid_is_the_straightforward_form(sizes):
    method, ours, theirs, losses = staged(VID, sizes)
    with torch.no_grad():
        for stage in method.stages:
            stage.log_scale += torch.randn(len(stage.log_scale))
    agree(total(losses()), plain.vid(ours, theirs, method.stages), *ours, *method.parameters())


def test_at_compares_where_maps_are_large_and_not_how_large():
    method, ours, theirs, losses = staged(AT)
    scaled = method(*outputs([7 * each for each in ours], theirs), Target(torch.full((3,), -1)), {})
    torch.testing.assert_close(total(scaled), total(losses()))
    cubed = staged(AT, p=3)[3]()
    expected = F.mse_loss(*(F.normalize(f.pow(3).mean(1).flatten(1)) for f in (ours[0], theirs[0])))
    torch.testing.assert_close(cubed["stage1"], expected)


def test_the_variance_starts_where_it_is_told_and_may_stay():
    built, ours, theirs, losses = staged(VID, initial_variance=2.0)
    variance = F.softplus(built.stages[0].log_scale) + 1e-5
    torch.testing.assert_close(variance, torch.full_like(variance, 2.0), rtol=1e-6, atol=0)
    assert log_scale_of(5.0) == pytest.approx(4.99323, abs=1e-5)
    fixed, ours, theirs, losses = staged(VID, learn_variance=False)
    total(losses()).backward()
    learned = [name for name, parameter in fixed.named_parameters() if parameter.requires_grad]
    assert not [name for name in learned if "log_scale" in name] and len(learned) == 9
    expected = (fixed.stages[0].regressor(ours[0]) - theirs[0]).square().mean() / 10 + 0.5 * torch.tensor(5.0).log()
    torch.testing.assert_close(losses()["stage1"], expected, rtol=1e-6, atol=0)


def test_a_large_scale_does_not_overflow():
    built = staged(VID)[0].float()
    with torch.no_grad():
        built.stages[0].log_scale.fill_(100.0)
    sides = (side.map(torch.Tensor.float) for side in outputs(maps(SIZES[0]), maps(SIZES[1], seed=1)))
    losses = built(*sides, Target(torch.full((3,), -1)), {})
    total(losses).backward()
    assert all(value.isfinite() for value in losses.values())
    assert built.stages[0].log_scale.grad.isfinite().all()


def test_stages_are_paired_from_the_last_one():
    student, teacher = tiny_stages("five", (4, 6, 8, 10, 12)), tiny_stages("three", (8, 10, 12))
    needs = AT.needs(AT.Config(), student, teacher)
    assert list(needs.student.values()) == list(needs.teacher.values()) == ["stage:-3", "stage:-2", "stage:-1"]
    named = AT.Config(student_taps=("stage:5",), teacher_taps=("stage:1",))
    assert AT.needs(named, student, teacher).student == {"map0": "stage:5"}
    for method in (AT, VID):
        check_method(method, student=student, teacher=teacher)


def test_patches_of_a_transformer_are_a_map():
    taps = {"student_taps": ("block:1", "block:3"), "teacher_taps": ("stage:-1", "block:-1")}
    for method in (AT, VID):
        check_method(method, taps, tiny_vit("small"), tiny_vit("large", 16, 5, ("cls", "reg0")))
    check_method(FitNet, {"student_tap": "block:1", "teacher_tap": "stage:4"}, tiny_vit("v"), tiny_stages("cnn"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"student_taps": ("stage:1",)}, "give student_taps and teacher_taps, or neither"),
        ({"student_taps": ("stage:1", "stage:2"), "teacher_taps": ("stage:1",)}, "names 2 maps and teacher_taps 1"),
    ],
)
def test_taps_are_named_in_pairs(config, message):
    with pytest.raises(ValueError, match=message):
        AT.Config(**config)


@pytest.mark.parametrize("method", [AT, VID])
def test_maps_that_pooling_does_not_make_equal_are_refused(method):
    with pytest.raises(UserError, match=rf"methods\.{method.name}: pair 0 compares a map of 4×6 with one of 4×4"):
        staged(method, (((3, 4, 6),), ((3, 4, 4),)))
    with pytest.raises(UserError, match=r"student_taps: number 0 gives shape \(7,\)"):
        staged(method, (((7,),), ((3, 4, 4),)))
    with pytest.raises(UserError, match=r"the teacher 'bare' has no stages; name maps in methods\.\w+\.teacher_taps"):
        method.needs(method.Config(), tiny_stages("cnn"), tiny_stages("bare", ()))


def fitnet(student, teacher):
    return build(FitNet, student={"hint": student}, teacher={"hint": teacher})


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((4, 6, 6), (7, 6, 6), (7, 4, 1, 1)),
        ((4, 8, 8), (7, 4, 4), (7, 4, 3, 3)),
        ((4, 7, 7), (7, 4, 4), (7, 4, 4, 4)),  # 7 is no twice 4
        ((4, 9, 5), (7, 4, 4), (7, 4, 6, 2)),
        ((4, 3, 3), (7, 6, 6), (4, 7, 4, 4)),  # transposed
    ],
)
def test_fitnet_chooses_the_convolution_by_the_heights(student, teacher, kernel):
    built = fitnet(student, teacher)
    assert built.conv.weight.shape == kernel and built.conv.bias is not None
    ours, theirs = maps([student])[0].requires_grad_(), maps([teacher], seed=1)[0]
    given = [Outputs(ours.new_zeros(3, 1), taps={"hint": each}) for each in (ours, theirs)]
    loss = built(*given, Target(torch.full((3,), -1)), {})["hint"]
    norm = nn.BatchNorm2d(7).double()
    regressed = norm(built.conv(ours)).clamp(min=0)
    torch.testing.assert_close(loss, (regressed - theirs).square().mean())
    torch.testing.assert_close(built.bn.running_var, norm.running_var)


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 3, 3), (7, 5, 5)), ((4, 8, 8), (7, 4, 6)), ((4, 3, 4), (7, 6, 6))]
)
def test_fitnet_refuses_what_no_convolution_resizes(student, teacher):
    with pytest.raises(UserError, match=r"methods\.fitnet: no convolution .* brings the student's map of \d×\d"):
        fitnet(student, teacher)


def test_own_parameters_are_counted_as_the_papers_pair_has_them():
    widths = (32, 64, 128, 256)  # resnet32x4 → resnet8x4
    assert fitnet((128, 16, 16), (128, 16, 16)).cost().parameters == 16_768
    sizes = [(width, size, size) for width, size in zip(widths[1:], (32, 16, 8), strict=True)]
    method = staged(VID, (sizes, sizes))[0]
    assert method.cost().parameters == 258_048 + 448
    assert method.cost().macs == sum(3 * width**2 * size**2 for width, size, _ in sizes)
    assert all(one > other for one, other in pairwise(size[1] for size in sizes))
