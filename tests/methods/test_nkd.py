from __future__ import annotations

import torch
import torch.nn.functional as F

from kd_hf.methods.nkd import NKD
from tests.methods.build import build, logits, run

LABEL = [0, 3, 6, 2, 2]


def test_equation_on_compacted_columns():
    student, teacher, label = logits(), logits(seed=1), torch.tensor(LABEL)
    keep = ~F.one_hot(label, 7).bool()
    rest_s, rest_t = student[keep].view(5, 6) / 3, teacher[keep].view(5, 6) / 3
    target = -(teacher.softmax(1) * student.log_softmax(1))[range(5), LABEL].mean()
    nontarget = -3.5 * 9 * (rest_t.softmax(1) * rest_s.log_softmax(1)).sum(1).mean()
    parts = run(build(NKD, temperature=3, gamma=3.5), student, teacher, label=LABEL)
    torch.testing.assert_close(parts["target"], target, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["nontarget"], nontarget, rtol=1e-12, atol=0)


def test_the_target_part_has_no_temperature():
    parts = [run(build(NKD, temperature=t), logits(), logits(seed=1), label=LABEL) for t in (1, 5)]
    assert parts[0]["target"] == parts[1]["target"]
    assert parts[0]["nontarget"] != parts[1]["nontarget"]


def test_exact_and_finite_where_the_target_takes_all_probability():
    student = torch.tensor([[90.0, 1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[90.0, 0.0, 1.0]])
    parts = run(build(NKD, classes=3, gamma=1), student, teacher, label=[0])
    expected = -(torch.tensor([0.0, 1.0]).softmax(0) * torch.tensor([1.0, 0.0]).log_softmax(0)).sum()
    torch.testing.assert_close(parts["nontarget"], expected)
    sum(parts.values()).backward()
    assert torch.isfinite(student.grad).all()


def test_a_sample_without_label_adds_nothing():
    student = logits().requires_grad_()
    sum(run(build(NKD), student, logits(seed=1), label=[-1, *LABEL[1:]]).values()).backward()
    assert not student.grad[0].any()
