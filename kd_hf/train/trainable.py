"""What training moves, as one: the wrapped module, its optimiser and schedule, the average; their way through files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_hf.distillation.module import DistillModule
from kd_hf.distillation.sharding import load_whole, load_whole_optimizer, prepare, whole
from kd_hf.info import ModelInfo
from kd_hf.models.recompute import CountOnce
from kd_hf.recipe.config import Recipe
from kd_hf.run import checkpoint as ckpt
from kd_hf.train.optim import LrSchedule, build_average, build_optimizer


class Trainable:
    """Student and methods on their device, ready to be stepped.

    Args:
        module: what is trained.
        info: facts about the student.
        recipe: the run.
        accelerator: gives device, ranks and precision.
        total_steps: of the run.
        steps_per_epoch: of the data.
    """

    def __init__(
        self,
        module: DistillModule,
        info: ModelInfo,
        recipe: Recipe,
        accelerator: Accelerator,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        args = recipe.train
        if args.lies_channels_last(accelerator.device.type, sharded=accelerator.is_fsdp2):
            module.to(memory_format=torch.channels_last)
        if args.sync_batchnorm and accelerator.num_processes > 1:
            module.student = nn.SyncBatchNorm.convert_sync_batchnorm(module.student)
        module.to(accelerator.device)
        self.accelerator, self.args = accelerator, args
        self.plain = module
        self.ema = build_average(module.student, args.ema) if args.ema else None
        if args.activation_checkpointing:
            CountOnce(module.student.network)
        optimizer = build_optimizer(module, args)
        self.wrapped, self.optimizer = prepare(accelerator, module, optimizer, info, self.ema)
        self.schedule = LrSchedule(self.optimizer.optimizer, args, total_steps, steps_per_epoch)

    def students(self) -> dict[str, nn.Module]:
        """What evaluation measures: ``student`` holds the weights that are exported."""
        raw = self.plain.student
        if self.ema is None or self.args.ema is None:
            return {"student": raw}
        if self.args.ema.export:
            return {"student": self.ema.module, "raw": raw}
        return {"student": raw, "ema": self.ema.module}

    def average(self, step: int) -> None:
        """Move the average towards the weights after a step counted from 1."""
        if self.ema is not None and self.args.ema is not None:
            # timm copies the weights at the update that it is told is the first
            counted = step if self.args.ema.start == "first_step" else step + 1
            self.ema.update(self.plain.student, step=counted)

    # ---------------------------------------------------------------------------------------- files

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of a checkpoint by file, on the main process; a call of all ranks."""
        average = {"ema": self.ema.module.state_dict()} if self.ema is not None else {}
        return whole({"module": self.plain.state_dict(), **average}, self.accelerator.is_main_process)

    def objects(self) -> dict[str, Mapping[str, Any]]:
        """What else a checkpoint holds: optimiser and gradient scaler; a call of all ranks."""
        found: dict[str, Mapping[str, Any]] = {
            "optimizer": whole(self.optimizer.state_dict(), self.accelerator.is_main_process)
        }
        if self.accelerator.scaler is not None:
            found["scaler"] = self.accelerator.scaler.state_dict()
        return found

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint's files."""
        load_whole(self.plain, ckpt.load_tensors(folder, "module"))
        if self.ema is not None:
            load_whole(self.ema.module, ckpt.load_tensors(folder, "ema"))
        load_whole_optimizer(self.optimizer, ckpt.load_objects(folder, "optimizer"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(ckpt.load_objects(folder, "scaler"))

    def exported(self, checkpoint: Path | None = None, tensors: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The bare network's weights, averaged or raw as the recipe exports them; a call of all ranks.

        Args:
            checkpoint: take them from there.
            tensors: what :meth:`tensors` gave, when it is at hand.
        """
        averaged = self.args.ema is not None and self.args.ema.export
        name, prefix = ("ema", "network.") if averaged else ("module", "student.network.")
        if checkpoint is not None:
            found = ckpt.load_tensors(checkpoint, name)
        else:
            found = (self.tensors() if tensors is None else tensors).get(name, {})  # empty but on the main process
        return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
