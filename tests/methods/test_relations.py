"""SP, RKD, PKT and DIST: losses that compare the images of a batch with each other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kd_hf.methods.rkd as rkd
from kd_hf.methods.dist import DIST
from kd_hf.methods.pkt import PKT
from kd_hf.methods.ranks import gathered
from kd_hf.methods.rkd import RKD
from kd_hf.methods.sp import SP
from kd_hf.outputs import Outputs, Target
from tests.methods import straightforward as plain
from tests.methods.build import build, logits

VECTORS = (SP, RKD, PKT)


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def losses(method, student, teacher, **config):
    blank = student.new_zeros(len(student), 1)
    shapes = {"student": {"feature": tuple(student.shape[1:])}, "teacher": {"feature": tuple(teacher.shape[1:])}}
    built = build(method, **shapes, **config)
    outputs = (Outputs(blank, taps={"feature": feature}) for feature in (student, teacher))
    return built(*outputs, Target(torch.full((len(student),), -1)), {})


def total(method, student, teacher, **config):
    if method is DIST:
        built = build(DIST, **config)
        parts = built(Outputs(student), Outputs(teacher), Target(torch.full((len(student),), -1)), {})
    else:
        parts = losses(method, student, teacher, **config)
    return torch.stack(list(parts.values())).sum()


FORMS = {SP: plain.sp, RKD: plain.rkd, PKT: plain.pkt, DIST: plain.dist}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_straightforward_form_has_the_same_value_and_gradient(method, count):
    student, teacher = rows(count, 5).requires_grad_(), rows(count, 5 if method is DIST else 9, seed=1)
    values = [total(method, student, teacher), FORMS[method](student, teacher)]
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=1e-8, atol=1e-12)


def test_rkd_with_squared_distances():
    student, teacher = rows(6, 4).requires_grad_(), rows(6, 8, seed=1)
    values = [total(RKD, student, teacher, squared=True), plain.rkd(student, teacher, squared=True)]
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", VECTORS)
def test_a_turned_teacher_has_nothing_to_teach(method):
    student = rows(5, 4).requires_grad_()
    turn, _ = torch.linalg.qr(rows(4, 4, seed=2))
    loss = total(method, student, (student @ turn).detach())
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.abs() < 1e-14
    assert gradient.abs().max() < 1e-7


def test_what_each_loss_does_not_see():
    student, teacher = rows(5, 4), rows(5, 6, seed=1)
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.5
    same = {
        SP: 3 * student,  # one scale of all
        PKT: lengths * student,  # the length of each
        RKD: 3 * student + 7,  # one scale, and where the origin is
    }
    for method, changed in same.items():
        torch.testing.assert_close(total(method, changed, teacher), total(method, student, teacher), rtol=1e-5, atol=0)
    assert not torch.isclose(total(RKD, lengths * student, teacher), total(RKD, student, teacher))
    torch.testing.assert_close(
        total(RKD, lengths * student, teacher, normalise=True), total(RKD, student, teacher, normalise=True)
    )


def test_sp_flattens_maps_and_others_average_them():
    maps, teacher = rows(4, 3, 2, 2), rows(4, 5, 3, 3, seed=1)
    torch.testing.assert_close(total(SP, maps, teacher), plain.sp(maps.flatten(1), teacher.flatten(1)))
    for method in (RKD, PKT):
        averaged = total(method, maps.mean((2, 3)), teacher.mean((2, 3)))
        torch.testing.assert_close(total(method, maps, teacher), averaged)


@pytest.mark.parametrize("method", VECTORS)
def test_of_one_image_there_is_nothing_to_learn_and_nothing_breaks(method):
    student = rows(1, 4).requires_grad_()
    loss = total(method, student, rows(1, 6, seed=1))
    loss.backward()
    assert loss.abs() < 1e-12
    assert student.grad.abs().max() < 1e-6
    assert method.least_images > 1


@pytest.mark.parametrize("method", VECTORS)
def test_a_zero_row_has_a_finite_gradient(method):
    student = rows(4, 3)
    student[1] = 0
    student.requires_grad_()
    total(method, student, rows(4, 3, seed=1)).backward()
    assert student.grad.isfinite().all()


def test_equal_rows_keep_their_value_and_have_no_direction():
    student, teacher = rows(5, 4), rows(5, 6, seed=1)
    student[3] = student[1]
    student.requires_grad_()
    loss = total(RKD, student, teacher)
    loss.backward()
    torch.testing.assert_close(loss, plain.rkd(student, teacher), rtol=1e-9, atol=0)
    assert student.grad.abs().max() < 1e3  # the explicit form gives 1e12 here


def test_slices_of_angles_do_not_matter(monkeypatch):
    student, teacher = rows(7, 4).requires_grad_(), rows(7, 6, seed=1)
    whole = torch.autograd.grad(total(RKD, student, teacher), student)[0]
    monkeypatch.setattr(rkd, "_CHUNK", 3 * 49)
    torch.testing.assert_close(torch.autograd.grad(total(RKD, student, teacher), student)[0], whole)


def test_angles_are_as_exact_in_single_precision_as_their_explicit_form():
    student, teacher = 5 + rows(48, 128), 5 + rows(48, 200, seed=1)
    exact, single = student.clone().requires_grad_(), student.float().requires_grad_()
    loss = total(RKD, exact, teacher)
    loss.backward()
    rough = RKD(RKD.Config(), *_shapes(128, 200), {})
    parts = rough(_outputs(single), _outputs(teacher.float()), Target(torch.full((48,), -1)), {})
    value = torch.stack(list(parts.values())).sum()
    value.backward()
    assert value.item() == pytest.approx(loss.item(), rel=2e-6)
    assert (single.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


def _shapes(*widths):
    from kd_hf.info import Shapes

    return [Shapes(7, {"feature": (width,)}) for width in widths]


def _outputs(vectors):
    return Outputs(vectors.new_zeros(len(vectors), 1), taps={"feature": vectors})


def test_dist_forgets_scale_and_offset_of_probabilities():
    teacher = logits()
    assert total(DIST, teacher, teacher).abs() < 1e-6
    # to add the same to all logits of a sample changes no probability
    torch.testing.assert_close(
        total(DIST, logits(seed=2) + torch.arange(5.0)[:, None], teacher), total(DIST, logits(seed=2), teacher)
    )


def test_dist_of_one_image_has_no_classes_to_compare():
    student = logits(1).requires_grad_()
    built = build(DIST, temperature=4.0, gamma=2.0)
    parts = built(Outputs(student), Outputs(logits(1, seed=1)), Target(torch.tensor([-1])), {})
    assert parts["intra"].item() == 2 * 16
    (gradient,) = torch.autograd.grad(parts["intra"], student, retain_graph=True)
    assert not gradient.any()
    parts["inter"].backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_dist_of_certain_networks_stays_finite():
    student, teacher = (F.one_hot(torch.tensor([0, 1, 2]), 1000).float() * 200 for _ in range(2))
    student.requires_grad_()
    total(DIST, student, teacher.roll(1, 0)).backward()
    assert student.grad.isfinite().all()


def test_a_process_alone_gathers_nothing():
    tensor = rows(3, 2)
    assert gathered(tensor) is tensor
