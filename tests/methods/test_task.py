from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kd_hf.methods.task import Task
from tests.methods.build import build, logits, run

LABEL = [0, 3, 6, 2, 2]


def mixed_rows():
    return 0.7 * F.one_hot(torch.tensor(LABEL), 7).double() + 0.3 * F.one_hot(torch.tensor(LABEL[::-1]), 7).double()


def test_plain_cross_entropy():
    assert run(build(Task), logits(), label=LABEL)["ce"] == F.cross_entropy(logits(), torch.tensor(LABEL))


def test_equal_to_the_losses_of_timm():
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    values, label, rows = logits(), torch.tensor(LABEL), mixed_rows()
    smooth = 0.9 * rows + 0.1 / 7
    pairs = [
        ({"label_smoothing": 0.1}, None, LabelSmoothingCrossEntropy(0.1)(values, label)),
        ({"label_smoothing": 0.1}, rows, SoftTargetCrossEntropy()(values, smooth)),
        ({"loss": "bce", "bce_threshold": 0.4}, rows, BinaryCrossEntropy(0.0, target_threshold=0.4)(values, rows)),
        (
            {"loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
            None,
            BinaryCrossEntropy(0.1, target_threshold=0.2)(values, label),
        ),
        ({"loss": "bce", "label_smoothing": 0.1}, None, BinaryCrossEntropy(0.1)(values, label)),
        ({"loss": "bce", "label_smoothing": 0.1}, rows, BinaryCrossEntropy(0.0)(values, smooth)),
        (
            {"loss": "bce", "bce_reduction": "sum"},
            None,
            BinaryCrossEntropy(0.0, sum_classes=True)(values, label),
        ),
    ]
    for config, soft, expected in pairs:
        (loss,) = run(build(Task, **config), values, label=LABEL, soft=soft).values()
        torch.testing.assert_close(loss, expected.double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_sample_without_label_changes_the_divisor_only(loss, soft):
    task = build(Task, loss=loss, label_smoothing=0.1)
    rows = mixed_rows()
    known = run(task, logits()[1:], label=LABEL[1:], soft=rows[1:] if soft else None)
    rows[0] = 0
    values = logits().requires_grad_()
    partly = run(task, values, label=[-1, *LABEL[1:]], soft=rows if soft else None)
    (name,) = known
    torch.testing.assert_close(partly[name], known[name] * 4 / 5, rtol=1e-12, atol=0)
    partly[name].backward()
    assert not values.grad[0].any()


def test_a_batch_without_any_label_is_zero():
    assert run(build(Task), logits())["ce"] == 0


def test_the_distillation_head_is_not_read():
    with_head = run(build(Task), logits(), label=LABEL, dist=logits(seed=5))
    assert with_head["ce"] == run(build(Task), logits(), label=LABEL)["ce"]


def test_options_are_checked():
    everything = {"loss": "bce", "bce_threshold": 0, "label_smoothing": 0.1}
    for wrong in ({"loss": "mse"}, {"label_smoothing": 1.0}, {"smoothing": 0.1}, {"bce_threshold": 0.5}, everything):
        with pytest.raises(ValidationError):
            Task.Config(**wrong)
