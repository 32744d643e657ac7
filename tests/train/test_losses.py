import math

import pytest
import torch
from accelerate import Accelerator

from kd_hf.train.losses import LossWindow


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def losses(**values):
    return {name: torch.tensor(float(value), requires_grad=True) for name, value in values.items()}


def test_means_since_the_last_fetch(accelerator):
    window = LossWindow()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        window.add(losses(loss=value, ce=2 * value), step + 1)
    assert window.fetch(accelerator) == ({"loss": 3.0, "ce": 6.0}, None)
    window.add(losses(loss=5.0), 4)
    assert window.fetch(accelerator) == ({"loss": 5.0}, None)


def test_an_empty_window(accelerator):
    assert LossWindow().fetch(accelerator) == ({}, None)


def test_a_loss_that_pauses_is_averaged_over_the_steps_it_ran(accelerator):
    window = LossWindow()
    window.add(losses(loss=1, kd=10), 1)
    window.add(losses(loss=3), 2)
    window.add(losses(loss=5, kd=20), 3)
    means, _ = window.fetch(accelerator)
    assert means == {"loss": 3.0, "kd": 15.0}


def test_no_gradient_graph_is_kept():
    window = LossWindow()
    values = losses(loss=1)
    window.add(values, 1)
    window.add(values, 2)
    assert all(not total.requires_grad for total in window._sums.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_part_is_named_not_the_total(accelerator, bad):
    window = LossWindow()
    window.add(losses(loss=1, ce=1, kd=1), 5)
    window.add(losses(loss=bad, ce=1, kd=bad), 6)
    window.add(losses(loss=bad, ce=bad, kd=bad), 7)
    assert window.first_bad(accelerator) == ("kd", 6)
    means, first_bad = window.fetch(accelerator)
    assert first_bad == ("kd", 6)
    assert not math.isfinite(means["loss"])
    assert window.first_bad(accelerator) is None


def test_a_bad_total_of_good_parts_is_named(accelerator):
    window = LossWindow()
    window.add(losses(loss=math.inf, ce=1e38), 3)
    assert window.first_bad(accelerator) == ("loss", 3)


def test_the_earliest_bad_step_counts_over_changing_sets(accelerator):
    window = LossWindow()
    window.add(losses(loss=math.nan, kd=math.nan), 9)
    window.add(losses(loss=math.nan, ce=math.nan), 8)
    assert window.first_bad(accelerator) == ("ce", 8)


def test_half_precision_losses_are_summed_in_float32(accelerator):
    window = LossWindow()
    for step in range(4096):
        window.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)}, step + 1)
    assert window.fetch(accelerator)[0] == {"loss": 1.0}
