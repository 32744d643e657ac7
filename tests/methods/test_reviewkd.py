"""ReviewKD: features are fused from the last stage to the first and compared at several resolutions."""

from __future__ import annotations

import pytest
import torch

from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.module import check_batch
from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.ofd import OFD
from kd_hf.methods.reviewkd import ReviewKD, hierarchical_distance
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import tiny_stages, tiny_vit
from tests.methods import straightforward as plain
from tests.runs import recipe

BATCH = 3
STUDENT = {"pooled": (6,), "level1": (5, 3, 4), "level2": (4, 7, 8)}
TEACHER = {"pooled": (8,), "level1": (7, 4, 5), "level2": (6, 7, 8)}


def build(student=STUDENT, teacher=TEACHER, **config):
    return ReviewKD(ReviewKD.Config(**config), Shapes(2, student), Shapes(2, teacher), {}).double()


def features(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        role: torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator) for role, shape in shapes.items()
    }


def losses(method, student, teacher):
    blank = torch.zeros(BATCH, 1)
    return method(Outputs(blank, taps=student), Outputs(blank, taps=teacher), Target(torch.full((BATCH,), -1)), {})


def test_the_straightforward_form_has_the_same_value_and_gradient():
    method, student, teacher = build(), features(STUDENT), features(TEACHER, 1)
    leaves = [each.requires_grad_() for each in student.values()]
    values = [
        torch.stack(list(losses(method, student, teacher).values())).sum(),
        plain.reviewkd(student.values(), teacher.values(), method.levels),
    ]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, [*leaves, *method.parameters()]) for value in values)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (4, 4), (7, 7), (8, 6), (14, 14), (8, 3)])
def test_pooling_the_difference_is_pooling_both_maps(grid):
    one, two = (torch.randn(2, 3, *grid, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(hierarchical_distance(one, two), plain.hierarchical(one, two), rtol=1e-12, atol=0)


def test_a_level_sees_the_levels_after_it_and_none_before():
    method = build()
    for level in range(3):
        student = {role: value.requires_grad_() for role, value in features(STUDENT).items()}
        losses(method, student, features(TEACHER, 1))[f"level_{level}"].backward()
        reached = [value.grad is not None and bool(value.grad.any()) for value in student.values()]
        assert reached == [place <= level for place in range(3)]


def test_the_common_width_is_the_pooled_features_or_what_is_asked_for():
    assert [build(mid_channels=width).levels[1].reduce[0].out_channels for width in (512, 6, 2)] == [6, 6, 2]


def test_which_maps_are_compared():
    cnn, swin, vit = tiny_stages("cnn"), tiny_stages("swin", layout="NHWC"), tiny_vit("vit")
    before, after = ([f"{kind}:{place}" for place in (-1, -2, -3, -4)] for kind in ("preact", "stage"))

    def taps(student, teacher, **config):
        found = ReviewKD.needs(ReviewKD.Config(**config), student, teacher)
        return [list(side.values())[1:] for side in (found.student, found.teacher)]

    assert taps(cnn, cnn) == [before, before]
    assert taps(cnn, cnn, preact=False) == [after, before]
    assert taps(swin, cnn) == [after, before] and taps(cnn, swin) == [before, after]
    assert taps(vit, cnn) == [["stage:-1"], ["preact:-1"]]
    assert taps(tiny_stages("three", (4, 6, 8)), cnn) == [before[:3], before[:3]]


def test_parameters_are_as_many_as_published():
    """Of ResNet-8x4 that learns from ResNet-32x4 on CIFAR-100."""
    widths, sizes = (256, 256, 128, 64), (1, 8, 16, 32)
    shapes = {"pooled": (256,)} | {f"level{j}": (widths[j], sizes[j], sizes[j]) for j in (1, 2, 3)}
    assert build(shapes, shapes).cost().parameters == 1_808_774
    maps = {f"stage_{i}": (width, 8, 8) for i, width in enumerate((64, 128, 256), 1)}
    norms = {role: torch.nn.BatchNorm2d(shape[0]) for role, shape in maps.items()}
    assert OFD(OFD.Config(), Shapes(2, maps), Shapes(2, maps), norms).cost().parameters == 86_912


def test_a_batch_of_one_is_refused(tmp_path):
    resnet = {"model": "test_resnet", "num_classes": 10}
    parts = assemble(
        recipe(tmp_path, {"student": resnet, "teacher": resnet, "methods": {"reviewkd": {}}}), 10, device="meta"
    )
    with pytest.raises(UserError, match=r"methods\.reviewkd .* train\.per_device_train_batch_size is 1"):
        check_batch(parts.choices, 1, 8)
