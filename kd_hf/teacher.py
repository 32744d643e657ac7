"""Frozen teachers: held in their mode, outside the trained module, and measured before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_hf.config import GateConfig, TeacherConfig
from kd_hf.errors import UserError
from kd_hf.methods.base import Outputs
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import TappedModel
from kd_hf.sharding import shard_teacher

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen network that is run beside the student, never registered in a module that is trained.

    Args:
        name: its name in the recipe.
        cfg: its block.
        handle: the loaded network.
        model: the same network with the taps that methods read.
        device: where it runs.
        precision: dtype of the run's mixed precision (float32 when there is none), for `dtype: auto`.
    """

    def __init__(
        self,
        name: str,
        cfg: TeacherConfig,
        handle: ModelHandle,
        model: TappedModel,
        device: torch.device,
        precision: torch.dtype,
    ) -> None:
        self.name = name
        self.cfg = cfg
        self.handle = handle
        self.info = handle.info
        self.dtype = precision if cfg.dtype == "auto" else _DTYPES[cfg.dtype]
        handle.network.requires_grad_(False)
        self.model = model.to(self.dtype)
        if cfg.shard:
            shard_teacher(model, self.info, device)
        else:
            model.to(device)
        self._hold_mode()

    def _hold_mode(self) -> None:
        self.model.train(self.cfg.mode == "train")
        if self.cfg.mode == "batch_stats":
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()

    @property
    def _mode_was_changed(self) -> bool:
        return self.model.network.training != (self.cfg.mode == "train")

    def __call__(self, pixels: Tensor) -> Outputs:
        """Outputs for normalised images ``[B, 3, H, W]``; float32 logits, taps in the teacher's dtype, no gradient."""
        if self._mode_was_changed:
            self._hold_mode()
        # its own dtype rules: an autocast of the student's run must not reach it
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            outputs = self.model(pixels.to(self.dtype))
        return Outputs(outputs.logits.float(), None, outputs.taps)


@dataclass(frozen=True)
class GateResult:
    """What the gate measured: top-1 in percent in the teacher's own preprocessing, and as training feeds it."""

    teacher: str
    samples: int
    own: float
    fed: float
    own_size: int
    fed_size: int

    def describe(self) -> str:
        """One line for the log."""
        text = f"teacher '{self.teacher}': top-1 {self.own:.1f} on {self.samples} held-out images"
        if self.fed_size == self.own_size and self.fed == self.own:
            return text
        text += f" in its own preprocessing ({self.own_size} px)"
        return f"{text}, {self.fed:.1f} as training feeds it ({self.fed_size} px)"

    def warning(self) -> str | None:
        """What to tell the user when the pipeline costs the teacher accuracy; None when it does not."""
        if self.own - self.fed <= 2.0:
            return None
        return (
            f"teacher '{self.teacher}' loses {self.own - self.fed:.1f} points in the training pipeline: check its "
            "image_size and preprocessing (mean, std, interpolation) in the recipe"
        )

    def check(self, gate: GateConfig, classes: int) -> None:
        """Raise :class:`UserError` when the teacher is below the gate, or no better than guessing."""
        if gate.min_top1 is not None and self.own < gate.min_top1:
            raise UserError(
                f"teacher '{self.teacher}' reaches top-1 {self.own:.1f} on {self.samples} held-out images, below "
                f"gate.min_top1 = {gate.min_top1:g}; check its weights, preprocessing and label order"
            )
        chance = 100.0 / classes
        # three standard errors above guessing, in percent
        spread = 3.0 * (chance * (100.0 - chance) / max(1, self.samples)) ** 0.5
        if gate.min_top1 is None and self.own <= chance + spread:
            raise UserError(
                f"teacher '{self.teacher}' reaches top-1 {self.own:.1f} on {self.samples} held-out images, no better "
                f"than guessing among {classes} classes; check its weights, preprocessing and label order, or set "
                "gate.enabled: false"
            )


def check_label_order(name: str, handle: ModelHandle, class_names: Sequence[str]) -> None:
    """Refuse a teacher that knows the data's class names in another order."""
    known = [label.lower() for label in handle.label_names]
    wanted = [label.lower() for label in class_names]
    if known and wanted and known != wanted and sorted(known) == sorted(wanted):
        first = next(i for i, pair in enumerate(zip(known, wanted, strict=True)) if pair[0] != pair[1])
        raise UserError(
            f"teacher '{name}' has the data's classes in another order: class {first} is "
            f"'{handle.label_names[first]}' for the teacher and '{class_names[first]}' in the data"
        )
