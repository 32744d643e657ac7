"""TTM and WTTM: the student matches a power of the teacher's distribution."""

from __future__ import annotations

import pytest
import torch

from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.ttm import TTM
from kd_hf.methods.wttm import WTTM
from tests.methods import straightforward as plain
from tests.methods.build import build, logits, run

BOTH = (TTM, WTTM)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.5])
def test_the_straightforward_form_has_the_same_value_and_gradient(method, gamma):
    student, teacher = logits().requires_grad_(), logits(seed=1)
    values = [
        run(build(method, gamma=gamma), student, teacher)["match"],
        plain.ttm(student, teacher, gamma, weighted=method is WTTM),
    ]
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("method", BOTH)
def test_without_a_power_it_is_the_ordinary_divergence_and_no_sample_counts_more(method):
    student, teacher = logits(), logits(seed=1)
    expected = run(build(DeiTSoft, temperature=1), student, teacher)["soft"]
    torch.testing.assert_close(run(build(method, gamma=1), student, teacher)["match"], expected)


def test_an_uncertain_teacher_counts_most_in_wttm():
    """U is K^(1 - γ) for equal probabilities, and 1 for a single class."""
    student, gamma = logits(rows=1), 0.2
    for teacher, weight in ((torch.zeros(1, 7), 7**0.8), (torch.eye(7)[:1] * 1000, 1.0)):
        parts = [run(build(method, gamma=gamma), student, teacher.double())["match"] for method in BOTH]
        torch.testing.assert_close(parts[1], weight * parts[0])


@pytest.mark.parametrize("method", BOTH)
def test_float32_is_exact_where_powers_of_probabilities_underflow(method):
    teacher = torch.tensor([[0.0, -120.0, -150.0, -300.0]])
    values = [
        run(build(method, classes=4, gamma=0.1), torch.ones(1, 4, dtype=dtype), teacher.to(dtype))["match"].double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    assert plain.ttm(torch.ones(1, 4), teacher, 0.1).isnan()
