from __future__ import annotations

import torch

from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.dkd import DKD
from tests.methods.build import build, logits, run

LABEL = [0, 3, 6, 2, 2]


def test_parts_recompose_to_the_ordinary_divergence():
    """KL(q ‖ p) = TCKD + (1 - q_y) NCKD, equation 7 of the paper, sample by sample."""
    for row, label in enumerate(LABEL):
        student, teacher = logits()[row : row + 1], logits(seed=1)[row : row + 1]
        parts = run(build(DKD, temperature=3, beta=1), student, teacher, label=[label])
        rest = 1 - (teacher / 3).softmax(1)[0, label]
        whole = run(build(DeiTSoft, temperature=3), student, teacher)["soft"]
        torch.testing.assert_close(parts["tckd"] + rest * parts["nckd"], whole, rtol=1e-10, atol=1e-13)


def test_zero_for_equal_logits_whatever_their_offset():
    parts = run(build(DKD), logits() + 100, logits(), label=LABEL)
    assert all(abs(value) < 1e-12 for value in parts.values())


def test_factors_scale_their_own_part():
    one = run(build(DKD, alpha=1, beta=1), logits(), logits(seed=1), label=LABEL)
    two = run(build(DKD, alpha=2, beta=8), logits(), logits(seed=1), label=LABEL)
    torch.testing.assert_close(two["tckd"], 2 * one["tckd"])
    torch.testing.assert_close(two["nckd"], 8 * one["nckd"])


def test_finite_where_probabilities_underflow_in_float32():
    for target in (-500.0, 500.0):
        student = torch.tensor([[target, 1.0, 0.0]], requires_grad=True)
        parts = run(build(DKD, classes=3), student, torch.tensor([[-target, 0.0, 1.0]]), label=[0])
        sum(parts.values()).backward()
        assert all(torch.isfinite(value) for value in parts.values())
        assert torch.isfinite(student.grad).all()


def test_a_sample_without_label_adds_nothing():
    student = logits().requires_grad_()
    parts = run(build(DKD), student, logits(seed=1), label=[-1, *LABEL[1:]])
    sum(parts.values()).backward()
    assert not student.grad[0].any()
    assert student.grad[1:].any()
