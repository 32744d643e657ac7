"""The ``evaluate`` surface against the counts that training uses."""

from __future__ import annotations

import evaluate
import pytest
import torch

from kd_hf.evaluate_metrics import Agreement, TopAccuracy
from kd_hf.metrics import ClassificationMeter


def test_both_ways_of_counting_agree():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator)
    label = torch.randint(0, 12, (200,), generator=generator)
    teacher = torch.randint(0, 12, (200,), generator=generator)
    meter = ClassificationMeter(torch.device("cpu"))
    meter.update(logits, label, torch.ones(200, dtype=torch.bool), teacher)
    counted = meter.compute()
    ranked = logits.topk(5).indices.tolist()
    top = TopAccuracy()
    for start in range(0, 200, 64):  # in batches, as users add them
        top.add_batch(predictions=ranked[start : start + 64], references=label[start : start + 64].tolist())
    assert top.compute() == pytest.approx({"top1": counted["top1"], "top5": counted["top5"]})
    same = Agreement().compute(predictions=ranked, references=teacher.tolist())
    assert same == pytest.approx({"agreement": counted["agreement"]})


def test_plain_indices_give_top1_only():
    assert TopAccuracy().compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 0]) == {"top1": 50.0}


def test_metrics_combine():
    both = evaluate.combine([TopAccuracy(), Agreement()])
    assert both.compute(predictions=[1, 2], references=[1, 0]) == {"top1": 50.0, "agreement": 50.0}
