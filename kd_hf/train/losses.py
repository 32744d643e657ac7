"""Losses between two log lines: summed on the device, fetched once, with the first step at which one was not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

NEVER = float("inf")


class LossWindow:
    """Accumulates named scalar losses without a host–device sync per step.

    Losses whose method pauses come and go, so sums are kept per set of names.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._bad: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Add the losses of one batch; `step` is counted from 1."""
        names = tuple(losses)
        values = torch.stack([value.detach().to(torch.float32) for value in losses.values()])
        bad = torch.where(torch.isfinite(values), NEVER, float(step))
        if names not in self._sums:
            self._sums[names], self._bad[names], self._counts[names] = values, bad, 1
            return
        self._sums[names] += values
        self._bad[names] = torch.minimum(self._bad[names], bad)
        self._counts[names] += 1

    def first_bad(self, accelerator: Accelerator) -> tuple[str, int] | None:
        """The loss part that was NaN or infinite first on any rank, and its step; None when all were finite."""
        found: list[tuple[float, str]] = []
        for names, bad in self._bad.items():
            steps = accelerator.gather(bad[None]).amin(0).tolist()
            found += list(zip(steps, names, strict=True))
        step, name = min(found, default=(NEVER, ""), key=lambda pair: (pair[0], pair[1] == "loss"))
        return None if step == NEVER else (name, int(step))

    def fetch(self, accelerator: Accelerator) -> tuple[dict[str, float], tuple[str, int] | None]:
        """Mean losses over ranks since the last fetch, and the first bad part."""
        first_bad = self.first_bad(accelerator)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names, values in self._sums.items():
            for name, value in zip(names, accelerator.reduce(values, "mean").tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + self._counts[names]
        self._clear()
        return {name: sums[name] / counts[name] for name in sums}, first_bad
