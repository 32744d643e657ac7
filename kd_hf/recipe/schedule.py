"""How named losses become one number: a weight for each method as a function of the step. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
    """A weight that moves: ``warmup: [from, to, duration]`` (linear), ``cosine: [from, to, duration]``, or
    ``one_minus: NAME``, what another loss leaves of 1 (as KD does with the loss on labels)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    warmup: tuple[float, float, DurationField] | None = None
    cosine: tuple[float, float, DurationField] | None = None
    one_minus: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Ramp:
        if sum(form is not None for form in (self.warmup, self.cosine, self.one_minus)) != 1:
            raise ValueError(
                "give one of `warmup: [from, to, duration]`, `cosine: [from, to, duration]`, `one_minus: NAME`"
            )
        return self

    @property
    def course(self) -> tuple[float, float, Duration]:
        """(from, to, duration) of `warmup` or `cosine`."""
        course = self.warmup or self.cosine
        assert course is not None  # the validator saw to it
        return course

    @property
    def touches_zero(self) -> bool:
        """Whether the weight may be 0 at its start or from its end on."""
        if self.one_minus is not None:
            return True
        start, end, _ = self.course
        return start == 0 or end == 0


Weight = Annotated[float, Field(allow_inf_nan=False)] | Ramp


def weight_at(
    weight: Weight,
    until: Duration | None,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    others: Mapping[str, float] = MappingProxyType({}),
) -> float:
    """The value of a recipe's `weight` (with its `until`) at an optimiser step counted from 0.

    `others` are the weights of the other losses at that step, for ``one_minus``.
    """
    if until is not None and step >= until.steps(total_steps, steps_per_epoch):
        return 0.0
    if not isinstance(weight, Ramp):
        return weight
    if weight.one_minus is not None:
        return 1.0 - others[weight.one_minus]
    start, end, duration = weight.course
    length = max(1, duration.steps(total_steps, steps_per_epoch))
    done = min(1.0, step / length)
    if weight.cosine is not None:
        done = (1.0 - math.cos(math.pi * done)) / 2.0
    return start + (end - start) * done
