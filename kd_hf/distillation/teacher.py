"""Frozen teachers: held in their mode, outside the trained module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kd_hf.distillation.sharding import shard_teacher
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import Tapped
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import TeacherConfig, TrainConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen network that is run beside the student, never registered in a module that is trained.

    Args:
        name: its name in the recipe.
        cfg: its block.
        handle: the loaded network.
        model: the same network with the taps that methods read.
        device: where it runs.
        args: the recipe's `train` block; `dtype: auto` follows its mixed precision.
    """

    def __init__(
        self,
        name: str,
        cfg: TeacherConfig,
        handle: ModelHandle,
        model: Tapped,
        device: torch.device,
        args: TrainConfig,
    ) -> None:
        self.name = name
        self.cfg = cfg
        self.handle = handle
        self.info = handle.info
        mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        self.dtype = _DTYPES[mixed if cfg.dtype == "auto" else cfg.dtype]
        handle.network.requires_grad_(False)
        self.model = model.to(self.dtype)
        if args.lies_channels_last(device.type, sharded=cfg.shard):
            model.to(memory_format=torch.channels_last)
        if args.torch_compile:
            model.compile()
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

    def __call__(self, pixels: Any, whole: bool = True) -> Outputs:
        """Outputs for what the network takes, such as normalised images ``[B, 3, H, W]``.

        Logits are float32, taps are in the teacher's dtype; there is no gradient. Where the `whole` pass is
        not needed the network, unless it is sharded, stops after its last tap, and the logits are ``[B, 0]``.
        """
        if self._mode_was_changed:
            self._hold_mode()
        # its own dtype rules: an autocast of the student's run must not reach it
        with torch.inference_mode(), torch.autocast(pixels.device.type, enabled=False):
            outputs: Outputs = self.model(pixels.to(self.dtype), whole=whole or self.cfg.shard)
        # a loss may save for its backward pass what it was given, which inference mode's own tensors do not allow
        outputs = replace(outputs, logits=outputs.logits.float(), dist_logits=None)
        return outputs.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
