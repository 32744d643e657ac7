from __future__ import annotations

import pytest
import torch.nn.functional as F

from kd_hf.methods.deit_hard import DeiTHard
from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.testing import tiny_stages, tiny_vit
from tests.methods.build import build, logits, run


def test_reductions_differ_by_the_number_of_classes():
    per_image = run(build(DeiTSoft, temperature=3), logits(), logits(seed=1))["soft"]
    per_number = run(build(DeiTSoft, temperature=3, reduction="numel"), logits(), logits(seed=1))["soft"]
    assert (per_image / per_number).item() == pytest.approx(7, rel=1e-12)


def test_hard_labels_are_the_teachers_argmax():
    teacher = logits(seed=1)
    assert run(build(DeiTHard), logits(), teacher)["hard"] == F.cross_entropy(logits(), teacher.argmax(1))


@pytest.mark.parametrize("method", [DeiTSoft, DeiTHard])
def test_the_distillation_head_is_trained_where_there_is_one(method):
    plain, second = logits().requires_grad_(), logits(seed=2).requires_grad_()
    (loss,) = run(build(method), plain, logits(seed=1), dist=second).values()
    loss.backward()
    assert plain.grad is None
    assert second.grad.any()
    (alone,) = run(build(method), logits(seed=2), logits(seed=1)).values()
    assert loss == alone


@pytest.mark.parametrize("method", [DeiTSoft, DeiTHard])
@pytest.mark.parametrize(("prefix", "expected"), [(("cls",), False), (("cls", "dist"), True)])
def test_two_heads_are_asked_for_only_where_they_exist(method, prefix, expected):
    needs = method.needs(method.Config(), tiny_vit("student", prefix=prefix), tiny_stages("teacher"))
    assert needs.dist_head is expected
    assert needs.teacher_logits
