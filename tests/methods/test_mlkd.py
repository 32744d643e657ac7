"""MLKD: samples, classes and batches at five temperatures on two views, as meant and as executed."""

from __future__ import annotations

import pytest
import torch

from kd_hf.methods.losses import standardised
from kd_hf.methods.mlkd import MLKD, batch_difference, class_difference
from kd_hf.outputs import Outputs, Target
from tests.methods import straightforward as plain
from tests.methods.build import build, logits


def views(rows=5, classes=7, requires_grad=False):
    found = [logits(rows, classes, seed=seed) for seed in range(4)]
    return [each.requires_grad_() if requires_grad and place % 2 == 0 else each for place, each in enumerate(found)]


def losses(method, student, teacher, strong_student, strong_teacher):
    target = Target(torch.full((len(student),), -1))
    pair = (Outputs(student, strong=Outputs(strong_student)), Outputs(teacher, strong=Outputs(strong_teacher)))
    return method(*pair, target, {})


def total(parts):
    return torch.stack(list(parts.values())).sum()


@pytest.mark.parametrize("wiring", ["intended", "as_executed"])
@pytest.mark.parametrize(("rows", "classes"), [(5, 7), (6, 8), (8, 3), (1, 4)])
def test_the_straightforward_form_has_the_same_value_and_gradient(wiring, rows, classes):
    student, teacher, strong, strong_teacher = views(rows, classes, requires_grad=True)
    method = build(MLKD, classes, wiring=wiring, temperature=4)
    values = [
        total(losses(method, student, teacher, strong, strong_teacher)),
        plain.mlkd(student, teacher, strong, strong_teacher, 4.0, wiring == "as_executed"),
    ]
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    for one, two in zip(*(torch.autograd.grad(value, [student, strong]) for value in values), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("rows", "classes"), [(3, 9), (9, 3)])
def test_no_large_matrix_is_needed_for_the_differences_of_gram_matrices(rows, classes):
    p, q = (logits(2 * rows, classes, seed=seed).softmax(1).unflatten(0, (2, rows)) for seed in (0, 1))
    weights, shares = torch.rand(classes, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)
    of_classes = (p.mT @ p - q.mT @ q).square().sum(2) * weights
    torch.testing.assert_close(class_difference(p, q, weights), of_classes.sum() / classes)
    of_samples = (p @ p.mT - q @ q.mT).square().sum(2) * shares
    torch.testing.assert_close(batch_difference(p, q, shares), of_samples.sum() / rows)


def test_a_float32_difference_of_near_equal_predictions_keeps_its_digits():
    q = logits(8, 40).softmax(1)[None]
    p = q + 1e-5 * (logits(8, 40, seed=1).softmax(1)[None] - q)
    weights = torch.ones(40, dtype=torch.float64)
    exact, single = class_difference(p, q, weights), class_difference(p.float(), q.float(), weights.float())
    torch.testing.assert_close(single.double(), exact, rtol=2e-2, atol=0)


def test_the_weak_views_divergence_is_of_samples_that_the_teacher_is_unsure_of():
    student, teacher, strong, strong_teacher = views(6, 7, requires_grad=True)
    losses(build(MLKD), student, teacher, strong, strong_teacher)["kd"].backward()
    confidence = teacher.softmax(1).amax(1)
    unsure = confidence <= confidence.quantile(0.5)
    assert torch.equal(student.grad.any(1), unsure) and unsure.sum() == 3
    assert strong.grad.any(1).all()
    student.grad = None
    executed = build(MLKD, wiring="as_executed")
    losses(executed, student, teacher, strong, strong_teacher)["kd"].backward()
    assert student.grad.any(1).all()


def test_classes_and_batches_are_of_the_weak_view():
    student, teacher, strong, strong_teacher = views(requires_grad=True)
    parts = losses(build(MLKD), student, teacher, strong, strong_teacher)
    gradients = torch.autograd.grad(parts["class"] + parts["batch"], [student, strong], allow_unused=True)
    assert gradients[0].any() and gradients[1] is None


def test_nothing_is_left_when_both_views_agree_with_the_teacher():
    _, teacher, _, strong_teacher = views()
    parts = losses(build(MLKD), teacher + 3, teacher, strong_teacher - 1, strong_teacher)
    assert all(abs(value) < 1e-12 for value in parts.values())


def test_standardised_logits_are_for_the_divergences_alone():
    given = views()
    one, two = (losses(build(MLKD, logit_std=switch, wiring="as_executed"), *given) for switch in (True, False))
    assert one["class"] == two["class"] and one["batch"] == two["batch"]
    three = losses(build(MLKD, wiring="as_executed"), *map(standardised, given))
    torch.testing.assert_close(one["kd"], three["kd"])
