from __future__ import annotations

import pytest
import torch

from kd_hf.methods.kd import KD
from kd_hf.methods.wsld import WSLD
from tests.methods.build import build, logits, run


def test_weight_of_a_student_equal_to_its_teacher():
    teacher = logits(1)
    assert run(build(WSLD, temperature=4), teacher, teacher, label=[0])["soft"].item() == pytest.approx(
        (1 - torch.e**-1) * run(build(KD, temperature=4), teacher, teacher)["soft"].item(), rel=1e-6
    )


def test_a_student_that_is_certain_of_the_label_is_left_alone():
    student = torch.tensor([[60.0, 0.0, 0.0]])
    assert run(build(WSLD, classes=3), student, torch.zeros(1, 3), label=[0])["soft"] < 1e-6


def test_a_teacher_that_is_certain_counts_in_full():
    student, teacher = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[200.0, 0.0, 0.0]])
    full = run(build(KD, classes=3, temperature=2), student, teacher)["soft"]
    torch.testing.assert_close(run(build(WSLD, classes=3), student, teacher, label=[0])["soft"], full)


def test_no_gradient_through_the_weights():
    student, teacher = logits(1).requires_grad_(), logits(1, seed=1)
    soft = run(build(WSLD), student, teacher, label=[2])["soft"]
    plain = run(build(KD, temperature=2), student, teacher)["soft"]
    gradients = [torch.autograd.grad(value, student)[0] for value in (soft, plain)]
    torch.testing.assert_close(gradients[0], gradients[1] * (soft / plain).detach(), rtol=1e-10, atol=1e-15)
