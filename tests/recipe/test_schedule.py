import math

import pytest
from pydantic import TypeAdapter, ValidationError

from kd_hf.recipe.schedule import Duration, Ramp, Weight, weight_at

TOTAL, EPOCH = 1000, 100


def weight(value):
    return TypeAdapter(Weight).validate_python(value)


def curve(value, until=None, total=TOTAL, epoch=EPOCH):
    until = None if until is None else Duration.parse(until)
    return [weight_at(weight(value), until, step, total, epoch) for step in range(total)]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        (300, 300),
        ("300", 300),
        ("300 steps", 300),
        ("1 step", 1),
        ("5 epochs", 500),
        ("1 epoch", 100),
        ("0.5 epochs", 50),
        ("2.5epochs", 250),
        (" 7  steps ", 7),
        (0.25, 250),
        ("1e-1", 100),
        (0, 0),
        ("0 epochs", 0),
        (1, 1),
    ],
)
def test_durations_in_steps(text, steps):
    assert Duration.parse(text).steps(TOTAL, EPOCH) == steps


@pytest.mark.parametrize(
    "text", ["", "five epochs", "5 weeks", "-1", -3, "-2 epochs", True, None, "1e999", math.nan, math.inf, "1 2", "..",
             [5], "5 epochs 3"]
)  # fmt: skip
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="expected a duration such as '5 epochs'"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["1234567 steps", "0.1", "12.5 epochs", "300", "0.333333333333", "90 epochs", 0, 1e-7])
def test_a_duration_survives_being_written(text):
    duration = Duration.parse(text)
    assert Duration.parse(str(duration)) == duration


def test_constant_weight():
    assert set(curve(0.3)) == {0.3}


def test_linear_warmup():
    values = curve({"warmup": [0, 2, "2 epochs"]})
    assert values[0] == 0
    assert values[50] == pytest.approx(0.5)
    assert values[100] == pytest.approx(1.0)
    assert set(values[200:]) == {2.0}
    assert values == sorted(values)


def test_cosine_is_steepest_in_the_middle_and_monotone():
    values = curve({"cosine": [1, 0, "1.0 epochs"]})
    assert values[0] == 1
    assert values[50] == pytest.approx(0.5)
    assert values[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert values[25] + values[75] == pytest.approx(1)
    assert values[100:] == [0] * 900
    assert values == sorted(values, reverse=True)


def test_a_ramp_of_no_length_is_a_jump():
    assert curve({"warmup": [0, 1, 0]}, total=3) == [0, 1, 1]


def test_until_ends_a_loss_and_wins_over_its_ramp():
    values = curve({"warmup": [0, 1, "2 epochs"]}, until="1 epoch")
    assert values[99] > 0
    assert values[100:] == [0] * 900


def test_until_as_a_share_of_the_run():
    values = curve(1.0, until=0.9)
    assert (values[899], values[900]) == (1, 0)


@pytest.mark.parametrize(
    ("ramp", "pauses"),
    [
        ({"warmup": [0, 1, 5]}, True),
        ({"cosine": [1, 0, 5]}, True),
        ({"warmup": [1, 2, 5]}, False),
        ({"cosine": [2, 1, 5]}, False),
    ],
)
def test_touching_zero(ramp, pauses):
    assert weight(ramp).touches_zero is pauses
    assert (0 in curve(ramp)) is pauses


@pytest.mark.parametrize(
    "value",
    [{}, {"warmup": [0, 1, 5], "cosine": [0, 1, 5]}, {"warmup": [0, 1]}, {"warmup": [0, 1, 5, 6]}, "high", math.nan,
     math.inf, {"warmup": [0, math.inf, 5]}, {"linear": [0, 1, 5]}],
)  # fmt: skip
def test_what_is_no_weight(value):
    with pytest.raises(ValidationError):
        weight(value)


def test_a_ramp_survives_being_written():
    ramp = weight({"warmup": [0, 1.5, "1234567 steps"]})
    assert Ramp.model_validate(ramp.model_dump(mode="json", exclude_none=True)) == ramp
    assert Ramp.model_validate(ramp.model_dump(mode="json")) == ramp
