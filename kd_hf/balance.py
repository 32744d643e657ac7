"""How named losses become one number: a weight for each method as a function of the step. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

_DURATION = re.compile(r"\s*([0-9.eE+-]+)\s*(steps?|epochs?)?\s*")


@dataclass(frozen=True)
class Duration:
    """A length of training: ``300`` or ``300 steps``, ``5 epochs``, or a ratio of the whole run below 1."""

    amount: float
    unit: Literal["steps", "epochs", "ratio"]

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Read a duration from a recipe. Raises ValueError with the accepted forms."""
        if isinstance(value, Duration):
            return value
        match = _DURATION.fullmatch(str(value))
        try:
            amount = float(match[1]) if match else math.nan
        except ValueError:
            amount = math.nan
        if isinstance(value, bool) or match is None or not 0 <= amount < math.inf:
            raise ValueError("expected a duration such as '5 epochs', '300 steps', 300 or a ratio below 1")
        if match[2]:
            return cls(amount, "epochs" if match[2].startswith("epoch") else "steps")
        if 0 < amount < 1:
            return cls(amount, "ratio")
        return cls(amount, "steps")

    def steps(self, total_steps: int, steps_per_epoch: int) -> int:
        """The number of optimiser steps this duration covers."""
        scale = {"steps": 1, "epochs": steps_per_epoch, "ratio": total_steps}[self.unit]
        return round(self.amount * scale)

    def __str__(self) -> str:
        # all digits, because the resolved recipe is read back
        amount = int(self.amount) if float(self.amount).is_integer() else self.amount
        return str(amount) if self.unit == "ratio" else f"{amount} {self.unit}"


DurationField = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": ["string", "number"], "description": "'5 epochs', '300 steps', 300, or a ratio below 1"}),
]


class Ramp(BaseModel):
    """A weight that moves: ``warmup: [from, to, duration]`` (linear) or ``cosine: [from, to, duration]``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    warmup: tuple[float, float, DurationField] | None = None
    cosine: tuple[float, float, DurationField] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Ramp:
        if (self.warmup is None) == (self.cosine is None):
            raise ValueError("give either `warmup: [from, to, duration]` or `cosine: [from, to, duration]`")
        return self

    @property
    def course(self) -> tuple[float, float, Duration]:
        """(from, to, duration) of whichever form was given."""
        course = self.warmup or self.cosine
        assert course is not None  # the validator saw to it
        return course

    @property
    def touches_zero(self) -> bool:
        """Whether the weight is 0 at its start or from its end on."""
        start, end, _ = self.course
        return start == 0 or end == 0


Weight = Annotated[float, Field(allow_inf_nan=False)] | Ramp


def weight_at(weight: Weight, until: Duration | None, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The value of a recipe's `weight` (with its `until`) at an optimiser step counted from 0."""
    if until is not None and step >= until.steps(total_steps, steps_per_epoch):
        return 0.0
    if not isinstance(weight, Ramp):
        return weight
    start, end, duration = weight.course
    length = max(1, duration.steps(total_steps, steps_per_epoch))
    done = min(1.0, step / length)
    if weight.cosine is not None:
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return start + (end - start) * done
