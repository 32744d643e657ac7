"""What training moves, as one: the wrapped module, its optimiser and schedule, the average; their way through files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from kd_hf.distillation.module import DistillModule
from kd_hf.distillation.sharding import load_whole, load_whole_optimizer, prepare, whole
from kd_hf.info import ModelInfo
from kd_hf.models.recompute import CountOnce
from kd_hf.recipe.config import Recipe
from kd_hf.run import checkpoint as ckpt
from kd_hf.train.optim import LrSchedule, build_average, build_optimizer

_STUDENT = "student."  # begins the names of the student's tensors in the module


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
        initial = {key: value.detach().to("cpu", copy=True) for key, value in module.state_dict().items()}
        self.wrapped, self.optimizer = prepare(accelerator, module, optimizer, info, self.ema)
        self.schedule = LrSchedule(self.optimizer.optimizer, args, total_steps, steps_per_epoch)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        self._initial = (initial, copy.deepcopy(self.optimizer.state_dict()), scaler)
        self._settled = False  # whether the network holds what was exported

    def reset(self) -> None:
        """Begin anew: the initial weights, and nothing in the optimiser."""
        weights, optimizer, scaler = self._initial
        load_whole(self.plain, weights)
        if self.ema is not None:
            start = {key: value for key, value in weights.items() if key.startswith(_STUDENT)}
            load_whole(self.ema.module, {key.removeprefix(_STUDENT): value for key, value in start.items()})
        load_whole_optimizer(self.optimizer, copy.deepcopy(optimizer))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self._settled = False

    def students(self) -> dict[str, nn.Module]:
        """What evaluation measures: ``student`` holds the weights that are exported."""
        raw = self.plain.student
        if self.ema is None or self.args.ema is None or self._settled:
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

    def share_buffers(self) -> None:
        """Give every process the main one's statistics of BatchNorm, in the student and its average; a call of all.

        Each has its own since the last step, and those of the main process are saved and exported.
        """
        if self.accelerator.num_processes > 1:
            networks = [self.plain.student] if self.ema is None else [self.plain.student, self.ema.module]
            for buffer in (buffer for network in networks for buffer in network.buffers()):
                distributed.broadcast(buffer, 0)

    def settle(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Have the network hold what was exported, and nothing beside it be measured.

        Args:
            weights: of the network; None where they are those of its average, or its own.
        """
        if weights is None and self.ema is not None and self.args.ema is not None and self.args.ema.export:
            weights = self.ema.module.network.state_dict()
        if weights is not None:
            load_whole(self.plain.student.network, weights)
        self._settled = True

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
        self._settled = False
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
            state = ckpt.load_tensors(checkpoint, name)
        elif self._settled:
            name, prefix = "module", "student.network."
            state = self.tensors()[name]
        else:
            state = (self.tensors() if tensors is None else tensors).get(name, {})  # empty but on the main process
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
