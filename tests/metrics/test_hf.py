"""The ``evaluate`` surface against the sums that training uses."""

from __future__ import annotations

import evaluate
import pytest
import torch

from kd_hf.metrics.hf import Agreement, CalibrationError, NegativeLogLikelihood, TopAccuracy
from kd_hf.metrics.meters import Accuracy, Calibration, Scored


@pytest.fixture(scope="module")
def batch():
    draws = torch.Generator().manual_seed(0)
    label, teacher = torch.randint(12, (2, 200), generator=draws)
    return Scored(torch.randn(200, 12, generator=draws), label, torch.ones(200, dtype=torch.bool), teacher)


def summed(batch):
    values = {}
    for meter in (Accuracy(torch.device("cpu")), Calibration(torch.device("cpu"))):
        meter.update(batch)
        values |= meter.compute()
    return values


def test_both_ways_of_counting_agree(batch):
    """All of them combined, in batches as users add them."""
    p = batch.logits.double().softmax(1)
    inputs = {
        "predictions": batch.logits.topk(5).indices,
        "references": batch.label,
        "confidences": p.amax(1),
        "correct": (p.argmax(1) == batch.label).long(),
        "likelihoods": p.gather(1, batch.label[:, None])[:, 0],
    }
    metrics = evaluate.combine([TopAccuracy(), CalibrationError(), NegativeLogLikelihood()])
    for start in range(0, 200, 64):
        metrics.add_batch(**{key: value[start : start + 64].tolist() for key, value in inputs.items()})
    expected = summed(batch)
    assert metrics.compute() == pytest.approx({key: expected[key] for key in ("top1", "top5", "ece", "nll")})
    same = Agreement().compute(predictions=inputs["predictions"].tolist(), references=batch.teacher_class.tolist())
    assert same == pytest.approx({"agreement": expected["agreement"]})


def test_plain_indices_give_top1_only():
    assert TopAccuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 0]) == {"top1": 50.0}


def test_metrics_combine():
    both = evaluate.combine([TopAccuracy(), Agreement()])
    assert both.compute(predictions=[1, 2], references=[1, 0]) == {"top1": 50.0, "agreement": 50.0}
