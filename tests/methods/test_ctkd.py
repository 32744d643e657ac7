"""CTKD: the temperature learns against the loss, by a factor that follows the epoch."""

from __future__ import annotations

import math

import pytest
import torch

from kd_hf.methods.base import Moment
from kd_hf.methods.ctkd import CTKD
from kd_hf.methods.losses import standardised
from tests.methods import straightforward as plain
from tests.methods.build import build, logits, run

LABEL = torch.tensor([0, 3, 6, 2, 2])
FORMS = {
    "kd": lambda s, t, temperature: plain.deit_soft(s, t, temperature),
    "dkd": lambda s, t, temperature: plain.dkd(s, t, LABEL, temperature, 1.0, 2.0),
}


def total(method, student, teacher, reversal=-1.0, label=LABEL):
    factor = torch.tensor(reversal, dtype=torch.float64)
    parts = run(method, student, teacher, label=label, draws={"reversal": factor})
    return torch.stack(list(parts.values())).sum()


def test_the_factor_is_the_cosine_of_the_epoch_counted_from_1():
    method = build(CTKD, epochs=10)
    per_epoch = 7
    for epoch in (1, 2, 9, 10, 11, 240):
        steps = (epoch - 1) * per_epoch, epoch * per_epoch - 1
        values = [method.scheduled(Moment(step, 1680, per_epoch))["reversal"] for step in steps]
        expected = -0.5 * (1 - math.cos(math.pi * min(epoch, 10) / 10))
        assert values == [pytest.approx(expected, abs=1e-12)] * 2


@pytest.mark.parametrize("kind", FORMS)
def test_the_gradient_of_the_temperature_is_turned_and_nothing_else_is(kind):
    method, teacher = build(CTKD, kind=kind), logits(seed=1)
    found = {}
    for reversal in (1.0, -0.3, 0.0):
        student = logits().requires_grad_()
        method.zero_grad()
        value = total(method, student, teacher, reversal)
        value.backward()
        found[reversal] = value.detach(), student.grad, method.level.grad.clone()
    student, step = logits().requires_grad_(), 1e-5

    def expected(level):
        return FORMS[kind](student, teacher, 1 + 20 * torch.tensor(level, dtype=torch.float64).sigmoid())

    slope = (expected(1 + step) - expected(1 - step)).detach() / (2 * step)
    (plain_gradient,) = torch.autograd.grad(expected(1.0), student)
    for reversal, (value, gradient, own) in found.items():
        torch.testing.assert_close(value, expected(1.0).detach(), rtol=1e-11, atol=0)
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(own[0], reversal * slope, rtol=1e-5, atol=1e-15)


def test_descent_on_the_temperature_raises_the_loss():
    method, student, teacher = build(CTKD), logits(), logits(seed=1)
    before = total(method, student, teacher)
    before.backward()
    with torch.no_grad():
        method.level -= 0.01 * method.level.grad.sign()
    assert total(method, student, teacher) > before


@pytest.mark.parametrize("kind", FORMS)
def test_a_certain_teacher_leaves_the_temperature_a_finite_gradient(kind):
    method = build(CTKD, kind=kind, t_start=0.01, t_end=0.01).float()
    student = torch.zeros(2, 7, requires_grad=True)
    total(method, student, 500 * torch.eye(7)[:2], label=[0, 3]).backward()
    assert student.grad.isfinite().all() and method.level.grad.isfinite().all()


def test_a_sample_without_label_adds_nothing_to_dkd_and_its_part_to_kd():
    for kind in FORMS:
        student = logits().requires_grad_()
        total(build(CTKD, kind=kind), student, logits(seed=1), label=[-1, 3, 6, 2, 2]).backward()
        assert bool(student.grad[0].any()) == (kind == "kd")
        assert student.grad[1:].any(1).all()


@pytest.mark.parametrize("kind", FORMS)
def test_standardised_logits(kind):
    one = total(build(CTKD, kind=kind, logit_std=True), logits(), logits(seed=1))
    two = total(build(CTKD, kind=kind), standardised(logits()), standardised(logits(seed=1)))
    torch.testing.assert_close(one, two)
