from __future__ import annotations

import pytest
import torch

from kd_hf.methods.losses import batch_mean, frozen, full_precision, labelled, rest_cross_entropy, without
from tests.methods.build import logits


@pytest.mark.parametrize("removed", [[[0], [3], [6]], [[0, 1], [3, 5], [6, 2]]])
def test_rest_cross_entropy_equals_softmax_over_the_remaining_columns(removed):
    values, other = logits(3), logits(3, seed=1)
    classes = torch.tensor(removed)
    rows = without(other, classes).softmax(1)
    expected = []
    for value, reference, gone in zip(values, other, removed, strict=True):
        keep = [k for k in range(7) if k not in gone]
        expected.append(-(reference[keep].softmax(0) * value[keep].log_softmax(0)).sum())
    torch.testing.assert_close(rest_cross_entropy(values, classes, rows), torch.stack(expected), rtol=1e-12, atol=0)


def test_rest_cross_entropy_is_exact_where_the_removed_class_takes_all_probability():
    values = torch.tensor([[200.0, 1.0, 0.0]], requires_grad=True)
    rows = torch.tensor([[0.0, 0.5, 0.5]])
    loss = rest_cross_entropy(values, torch.tensor([[0]]), rows)
    loss.sum().backward()
    torch.testing.assert_close(loss, -torch.tensor([1.0, 0.0]).log_softmax(0).mean()[None])
    assert values.grad[0, 0] == 0
    assert torch.isfinite(values.grad).all()


def test_precision_is_raised_and_never_lowered():
    for given, result in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert full_precision(torch.ones(1, dtype=given)).dtype == result
    assert not frozen(torch.ones(1, requires_grad=True)).requires_grad


def test_unlabelled_samples_add_nothing_and_stay_in_the_divisor():
    index, known = labelled(torch.tensor([2, -1, 0]))
    assert index.tolist() == [2, 0, 0]
    values = torch.tensor([3.0, torch.nan, 6.0])
    assert batch_mean(values, known).item() == 3.0
