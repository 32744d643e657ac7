from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kd_hf.errors import UserError
from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.dkd import DKD
from kd_hf.methods.kd import KD
from kd_hf.methods.mgd import MGD
from kd_hf.methods.nkd import NKD
from kd_hf.testing import tiny_stages
from tests.methods.build import build, logits, run


def test_value_exceeds_the_divergence_by_the_teachers_entropy():
    student, teacher = logits().requires_grad_(), logits(seed=1)
    loss = run(build(KD, temperature=4), student, teacher)["soft"]
    divergence = run(build(DeiTSoft, temperature=4), student, teacher)["soft"]
    entropy = torch.distributions.Categorical(logits=teacher / 4).entropy().mean()
    torch.testing.assert_close(loss - divergence, 16 * entropy, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, divergence)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


def total(losses):
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("method", [KD, DKD, NKD])
def test_standardised_logits_forget_scale_and_offset(method):
    student, teacher, built = logits(), logits(seed=1), build(method, logit_std=True)
    loss, scaled = (
        total(run(built, *pair, label=[0, 3, 6, 2, -1]))
        for pair in ((student, teacher), (5 * student - 2, 0.1 * teacher + 7))
    )
    torch.testing.assert_close(scaled, loss, rtol=1e-6, atol=0)  # up to the 1e-7 beside the deviation
    # the deviation is the unbiased one
    scores = [F.layer_norm(z, (7,)) * (6 / 7) ** 0.5 for z in (student, teacher)]
    plain = total(run(build(method), *scores, label=[0] * 5))
    torch.testing.assert_close(total(run(built, student, teacher, label=[0] * 5)), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [KD, DKD, NKD])
def test_a_constant_row_has_z_scores_of_zero_and_a_finite_gradient(method):
    student = torch.zeros(2, 7, requires_grad=True)
    loss = total(run(build(method, logit_std=True).float(), student, torch.ones(2, 7), label=[0, 1]))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_gradient_keeps_its_size_as_the_temperature_grows():
    student, teacher = logits().requires_grad_(), logits(seed=1)
    sizes = []
    for temperature in (50, 100):
        (gradient,) = torch.autograd.grad(run(build(KD, temperature=temperature), student, teacher)["soft"], student)
        sizes.append(gradient.norm())
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.05)


def test_classes_of_probability_zero_stay_finite():
    student = torch.tensor([[0.0, 150.0, -150.0]], requires_grad=True)
    loss = run(build(KD, classes=3), student, torch.tensor([[0.0, 150.0, -150.0]]))["soft"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_the_official_factors_are_the_default_weights():
    assert (KD.weight, DeiTSoft.weight, MGD.weight, NKD.weight, DKD.weight) == (0.5, 0.5, 7e-5, 1.0, 1.0)


@pytest.mark.parametrize("method", [KD, DKD, NKD, DeiTSoft])
def test_a_missing_or_unsuited_teacher_is_refused_in_the_words_of_the_recipe(method):
    student, teacher = tiny_stages("small"), tiny_stages("large")
    with pytest.raises(UserError, match=rf"methods\.{method.name} needs a teacher"):
        method.needs(method.Config(), student, None)
    with pytest.raises(UserError, match="'large' has 5 classes and the student 'small' has 11"):
        method.needs(method.Config(), student, replace(teacher, num_classes=5))


def test_teacher_with_more_precision_than_the_student_is_fine():
    loss = run(build(KD), logits().float(), logits(seed=1))["soft"]
    expected = F.cross_entropy(logits(), logits(seed=1).softmax(1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
