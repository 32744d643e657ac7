"""Which of a network's outputs stand for which classes of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassMap:
    """How a network's classes and those of the data belong together; None where they are the same."""

    label: Tensor | None = None
    """int64 ``[classes of the data]``: index of each among the choices."""
    choices: Tensor | None = None
    """int64 ``[choices]``: the network's classes that compete."""

    def to(self, device: torch.device) -> ClassMap:
        """The same on a device."""
        return ClassMap(*(None if part is None else part.to(device) for part in (self.label, self.choices)))

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits ``[B, choices]``."""
        return logits if self.choices is None else logits.index_select(1, self.choices)

    def target(self, label: Tensor) -> Tensor:
        """Labels of the data, int64 ``[B]``, as indices among the choices; -1 stays."""
        if self.label is None:
            return label
        return torch.where(label >= 0, self.label[label.clamp(min=0)], label)
