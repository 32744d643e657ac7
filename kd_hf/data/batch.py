"""What the loader hands to the device stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kd_hf.data.geometry import Placing
from kd_hf.data.mix import Erasing, Mixing, join_mixing

COLUMNS = ("label", "row", "key", "valid")  # the tensors with one number per image


@dataclass
class Batch:
    """One rank's images of one micro step, before they are normalised, erased and mixed on the device."""

    views: dict[str, Tensor]
    """uint8 ``[B, 3, S, S]`` per view."""
    label: Tensor
    """int64 ``[B]``; -1 where there is none."""
    row: Tensor
    """int64 ``[B]``: rows of the source (-1 for padding)."""
    key: Tensor
    """int64 ``[B]``: names the sample's random numbers."""
    valid: Tensor
    """bool ``[B]``: false for padding and, in evaluation, for unreadable images."""
    view_of: dict[str, str]
    """Network name → its view."""
    epoch: int = 0
    mixing: tuple[Mixing, ...] | None = None
    """Coefficients of Mixup and CutMix; None when the recipe does not mix."""
    erasing: tuple[Erasing, ...] = ()
    placing: dict[str, Placing] = field(default_factory=dict)
    """By view: how its images are still to be moved and flipped; none where they lie as they are shown."""
    corrupt: list[int] = field(default_factory=list)
    """Rows that could not be read: replaced in training, not valid in evaluation."""

    def __len__(self) -> int:
        return len(self.label)

    def __getstate__(self) -> dict[str, Any]:
        # a tensor that travels between processes takes a file descriptor and a message of its own
        return {**vars(self), **{name: getattr(self, name).numpy() for name in COLUMNS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, **{name: torch.from_numpy(state[name]) for name in COLUMNS})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            views={name: function(view) for name, view in self.views.items()},
            label=function(self.label),
            row=function(self.row),
            key=function(self.key),
            valid=function(self.valid),
            placing={name: placing.map(function) for name, placing in self.placing.items()},
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with all tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    @classmethod
    def join(cls, parts: Sequence[Batch], pin: bool = False) -> Batch:
        """One batch of consecutive parts, in page-locked memory if `pin`."""
        if len(parts) == 1:
            return parts[0].pin_memory() if pin else parts[0]

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
            return torch.cat(tuple(tensors), out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=pin))

        first = parts[0]
        starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
        mixing = [m.shifted(start) for start, part in zip(starts, parts, strict=True) for m in part.mixing or ()]
        return replace(
            first,
            views={name: joined([part.views[name] for part in parts]) for name in first.views},
            label=joined([part.label for part in parts]),
            row=joined([part.row for part in parts]),
            key=joined([part.key for part in parts]),
            valid=joined([part.valid for part in parts]),
            placing={
                name: replace(placing, moves=joined([part.placing[name].moves for part in parts]))
                for name, placing in first.placing.items()
            },
            mixing=None if first.mixing is None else join_mixing(mixing),
            erasing=tuple(e.shifted(start) for start, part in zip(starts, parts, strict=True) for e in part.erasing),
            corrupt=[row for part in parts for row in part.corrupt],
        )
