"""Running networks over a set: what is remembered of a reference, what is kept, what is timed."""

from __future__ import annotations

import time

import pytest
import torch
from accelerate import Accelerator

from kd_hf.data.opening import open_source
from kd_hf.info import Preprocessing
from kd_hf.metrics.measure import Stopwatch, Subject, measure
from kd_hf.metrics.meters import Accuracy, Divergence, FeatureSimilarity
from kd_hf.metrics.predictions import Predictions
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import DataConfig

VIEW = Preprocessing(8, mean=(0.0,) * 3, std=(1.0,) * 3)
CPU = torch.device("cpu")


def network(seed):
    """A fixed linear map of the pixels, with its input as features."""
    weight = torch.randn(10, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed))

    def run(pixels):
        return Outputs(pixels.flatten(1) @ weight.T, None, {"pre_logits": pixels.flatten(1)})

    return run


def subject(seed):
    return Subject(network(seed), VIEW, [Accuracy(CPU), Divergence(CPU), FeatureSimilarity(CPU)])


@pytest.fixture(scope="module")
def digits():
    return open_source(DataConfig(path="builtin:digits"), "eval")


def run(digits, subjects, **options):
    return measure(subjects, digits, Accelerator(cpu=True), batch_size=30, max_samples=100, **options)


def test_a_reference_that_was_run_before(digits):
    """Its choices are enough for agreement; nothing else is made up."""
    known = []
    first = run(digits, {"a": subject(0), "b": subject(1)}, reference="b", known=known)
    assert "kl" in first["a"] and first["a"]["cka"] == pytest.approx(1.0)
    assert not {"agreement", "kl", "cka"} & first["b"].keys()
    again = run(digits, {"a": subject(0)}, reference="b", known=known)
    assert again["a"] == {key: first["a"][key] for key in ("top1", "top5", "agreement", "samples")}
    assert len(known) == 4


def test_logits_are_kept_in_order(digits):
    found = Predictions()
    values = run(digits, {"a": subject(0), "b": subject(1)}, keep={"b": found})["b"]
    predictions, labels = found.gather(Accelerator(cpu=True))
    assert predictions.shape == (100, 10)
    assert 100 * (predictions.argmax(1) == labels).mean() == pytest.approx(values["top1"])


def test_first_batches_are_not_timed():
    seconds = iter([0.3, 0.3, 0.3, 0.02, 0.02])

    def slow(pixels):
        time.sleep(next(seconds))
        return Outputs(pixels)

    watch = Stopwatch(slow, CPU)
    assert watch.rate() is None
    for count in range(5):
        watch(torch.zeros(10, 3))
        assert (watch.rate() is None) == (count == 0)
    assert 30 < watch.rate() <= 500  # 10 images in at least 20 ms; 33 a second with the slow ones
