from __future__ import annotations

import pytest
import torch

from kd_hf.methods.losses import (
    batch_mean,
    cross_entropy,
    divergence,
    exact,
    frozen,
    full_precision,
    gram_difference,
    labelled,
    squared_distance,
    tempered,
    unit,
    without,
)
from tests.methods.build import logits


@pytest.mark.parametrize("removed", [[[0], [3], [6]], [[0, 1], [3, 5], [6, 2]]])
def test_removed_classes_leave_the_softmax_over_the_remaining_columns(removed):
    values, other = logits(3), logits(3, seed=1)
    log_p, log_q = (without(each, torch.tensor(removed)).log_softmax(1) for each in (values, other))
    crossed, diverged = [], []
    for value, reference, gone in zip(values, other, removed, strict=True):
        keep = [k for k in range(7) if k not in gone]
        q, log_ratio = reference[keep].softmax(0), reference[keep].log_softmax(0) - value[keep].log_softmax(0)
        crossed.append(-(q * value[keep].log_softmax(0)).sum())
        diverged.append((q * log_ratio).sum())
    for found, expected in ((cross_entropy(log_p, log_q.exp()), crossed), (divergence(log_p, log_q), diverged)):
        torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-12, atol=0)


def test_the_rest_is_exact_where_the_removed_class_takes_all_probability():
    values = torch.tensor([[200.0, 1.0, 0.0]], requires_grad=True)
    loss = cross_entropy(without(values, torch.tensor([[0]])).log_softmax(1), torch.tensor([[0.0, 0.5, 0.5]]))
    loss.backward()
    torch.testing.assert_close(loss, -torch.tensor([1.0, 0.0]).log_softmax(0).mean())
    assert values.grad[0, 0] == 0
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("loss", [cross_entropy, divergence])
def test_factors_scale_and_samples_not_counted_stay_in_the_divisor(loss):
    def parts():
        return logits(4).log_softmax(1), logits(4, seed=1).softmax(1) if loss is cross_entropy else logits(4, seed=1)

    whole, half = loss(*parts()), loss(*(part[:2] for part in parts()))
    torch.testing.assert_close(loss(*parts(), 3.0), 3 * whole)
    counted = torch.tensor([True, True, False, False])
    torch.testing.assert_close(loss(*parts(), counted=counted), half / 2)


def test_a_temperature_divides_and_one_leaves_the_logits_as_they_are():
    values = logits()
    assert torch.equal(tempered(values, 4.0), values / 4)
    assert tempered(values, 1.0) is values


def test_precision_is_raised_and_never_lowered():
    for given, result in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert full_precision(torch.ones(1, dtype=given)).dtype == result
    assert not frozen(torch.ones(1, requires_grad=True)).requires_grad


def test_unlabelled_samples_add_nothing_and_stay_in_the_divisor():
    index, known = labelled(torch.tensor([2, -1, 0]))
    assert index.tolist() == [2, 0, 0]
    values = torch.tensor([3.0, torch.nan, 6.0])
    assert batch_mean(values, known).item() == 3.0


def rows(groups=3, count=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, count, width, dtype=torch.float64, generator=generator)


def plain_gram_difference(student, teacher):
    return (teacher @ teacher.transpose(1, 2) - student @ student.transpose(1, 2)).square().mean()


def test_gram_difference_and_its_gradient_equal_those_of_the_plain_formula():
    teacher, ours, plain = rows(width=7, seed=1), rows().requires_grad_(), rows().requires_grad_()
    value, expected = gram_difference(ours, teacher), plain_gram_difference(plain, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)


def test_gram_difference_vanishes_for_rotated_rows_of_another_width():
    rotation = torch.linalg.qr(rows(1, 7, 4, seed=2)[0]).Q  # [7, 4], orthonormal columns
    assert gram_difference(rows(), rows() @ rotation.T) < 1e-28
    assert gram_difference(rows(), rows(seed=1)) > 1


def test_gram_difference_keeps_no_gram_matrix_for_the_backward_pass():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        gram_difference(rows(2, 50, 4).requires_grad_(), rows(2, 50, 6))
    assert kept == [(2, 50, 4)]


def test_gram_difference_is_not_rounded_by_autocast():
    student, teacher = unit(rows(width=64)).float(), unit(rows(width=64, seed=1)).float()
    expected = plain_gram_difference(student.double(), teacher.double()).item()
    with torch.autocast("cpu", torch.bfloat16):
        rough, ours = plain_gram_difference(student, teacher).item(), gram_difference(student, teacher)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    assert rough != pytest.approx(expected, rel=1e-5)


def test_exact_switches_autocast_off():
    matrix = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with exact(matrix):
            assert (matrix @ matrix).dtype == torch.float32


def test_unit_vectors_have_length_one_and_zero_stays_zero():
    tokens = torch.cat([rows().bfloat16(), torch.zeros(3, 1, 4, dtype=torch.bfloat16)], dim=1)
    vectors = unit(tokens)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=2), torch.tensor([1.0] * 5 + [0.0]).expand(3, 6))


@pytest.mark.parametrize("rows", [rows(), rows() * 1e-3])
def test_gradient_of_unit_vectors(rows):
    ours, expected = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    pull = torch.randn(rows.shape, dtype=rows.dtype, generator=torch.Generator().manual_seed(3))
    (unit(ours) * pull).sum().backward()
    (torch.nn.functional.normalize(expected, dim=-1) * pull).sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-12, atol=1e-13)
    nothing = torch.zeros(1, 4, requires_grad=True)
    unit(nothing).sum().backward()
    assert torch.isfinite(nothing.grad).all()


def test_squared_distance_sums_over_a_sample_and_gives_the_teacher_no_gradient():
    ours, theirs = rows().requires_grad_(), rows(seed=1).requires_grad_()
    loss = squared_distance(ours, theirs)
    torch.testing.assert_close(loss, (ours - theirs).square().sum((1, 2)).mean())
    loss.backward()
    assert theirs.grad is None
    assert squared_distance(ours.bfloat16(), theirs.bfloat16()).dtype == torch.float32
