"""What networks give and labels say for a batch: the tensors that losses compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass
class Outputs:
    """What a network gives for a batch. `taps` are keyed by the method's role names.

    `logits` ``[B, K]`` come from the class head; `dist_logits` ``[B, K]`` from the distillation head when the
    student trains with two heads, else None. `strong` is what the network gives for the strongly augmented view of the
    same images, where a method of the step needs it.
    """

    logits: Tensor
    dist_logits: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    strong: Outputs | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with the function's result in the place of every tensor."""
        dist_logits = None if self.dist_logits is None else function(self.dist_logits)
        taps = {name: function(tap) for name, tap in self.taps.items()}
        strong = None if self.strong is None else self.strong.map(function)
        return replace(self, logits=function(self.logits), dist_logits=dist_logits, taps=taps, strong=strong)

    def tensors(self) -> list[Tensor]:
        """Everything in it that lies on the device."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found


@dataclass
class Target:
    """Labels of a batch. `hard` int64 ``[B]`` is -1 where a sample has no label; under mixing or soft labels
    it is the argmax of the row. `soft` ``[B, K]`` is None unless rows are mixed; unlabelled rows sum to 0. `row` int64
    ``[B]`` is the number of each image among the training images, the same in every epoch, or None."""

    hard: Tensor
    soft: Tensor | None = None
    row: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it that lies on the device."""
        yield from (tensor for tensor in (self.hard, self.soft, self.row) if tensor is not None)

    def rows(self, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Label rows ``[B, K]``: `soft`, or one-hot of `hard` (a zero row where unlabelled)."""
        if self.soft is not None:
            return self.soft.to(dtype)
        known = self.hard >= 0
        rows = torch.zeros(len(self.hard), num_classes, dtype=dtype, device=self.hard.device)
        return rows.scatter_(1, self.hard.clamp(min=0)[:, None], known[:, None].to(dtype))
