"""What moves the weights: parameter groups, optimiser, learning-rate schedule and average, all by timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from kd_hf.distillation.module import DistillModule
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import EmaConfig, TrainConfig


def build_optimizer(module: DistillModule, cfg: TrainConfig) -> Optimizer:
    """The optimiser over student and methods, from any name of ``timm.optim``.

    Norms, biases and what a network lists in ``no_weight_decay()`` are not decayed unless
    ``decay_norm_and_bias``, and never what the recipe lists; layer decay applies to the student only.
    """
    known = [str(name) for name in list_optimizers()]
    if cfg.optim.lower() not in known:
        raise UserError(f"train.optim: unknown optimiser '{cfg.optim}'.{nearest(cfg.optim, known)}")
    _check_patterns(module, cfg)
    groups = [*_student_groups(module, cfg), *_plain_groups(module.methods, "methods.", cfg)]
    groups = [group for group in groups if group["params"]]
    try:
        return create_optimizer_v2(
            groups,
            opt=cfg.optim.lower(),
            lr=cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            momentum=cfg.momentum,
            **cfg.optim_args,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"train.optim_args: {cfg.optim} does not take these arguments: {error}") from None


def _student_groups(module: DistillModule, cfg: TrainConfig) -> list[dict[str, Any]]:
    network, prefix = module.student.network, "student.network."
    if cfg.layer_decay is None:
        return _plain_groups(network, prefix, cfg)
    if not hasattr(network, "group_matcher"):
        raise UserError("train.layer_decay needs a timm student: only those say which layer a parameter belongs to")
    return param_groups_layer_decay(
        network, cfg.weight_decay, no_weight_decay_list=_exempt(network, prefix, cfg), layer_decay=cfg.layer_decay
    )


def _plain_groups(network: nn.Module, prefix: str, cfg: TrainConfig) -> list[dict[str, Any]]:
    exempt = _exempt(network, prefix, cfg)
    if not cfg.decay_norm_and_bias:
        return param_groups_weight_decay(network, cfg.weight_decay, no_weight_decay_list=exempt)
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": cfg.weight_decay},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]


def _exempt(network: nn.Module, prefix: str, cfg: TrainConfig) -> tuple[str, ...]:
    """Names of parameters that are not decayed: what the recipe lists, and the network unless all is decayed."""
    names = getattr(network, "no_weight_decay", None)
    own = tuple(names()) if callable(names) and not cfg.decay_norm_and_bias else ()
    every = [name for name, _ in network.named_parameters()]
    return (*own, *(name for name in every if any(fnmatchcase(prefix + name, p) for p in cfg.no_weight_decay)))


def _check_patterns(module: DistillModule, cfg: TrainConfig) -> None:
    for pattern in cfg.no_weight_decay:
        names = [name for name, _ in module.named_parameters()]
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"train.no_weight_decay: no parameter is called '{pattern}'.{nearest(pattern, names)}")


def build_average(student: nn.Module, cfg: EmaConfig) -> ModelEmaV3:
    """The moving average of a student's weights, by timm."""
    return ModelEmaV3(student, decay=cfg.decay, use_warmup=cfg.warmup, exclude_buffers=cfg.buffers == "copy")


class LrSchedule:
    """The learning rate as a function of the optimiser step counted from 0; holds no state to save.

    Args:
        optimizer: whose groups are set.
        cfg: the recipe's `train` block.
        total_steps: steps of the whole run.
        steps_per_epoch: steps of one epoch.
    """

    def __init__(self, optimizer: Optimizer, cfg: TrainConfig, total_steps: int, steps_per_epoch: int) -> None:
        self.optimizer = optimizer
        self.lag = cfg.lr_schedule_lag.steps(total_steps, steps_per_epoch)
        warmup = cfg.warmup_steps.steps(total_steps, steps_per_epoch)
        at = [milestone.steps(total_steps, steps_per_epoch) for milestone in cfg.lr_decay_at]
        unit = 1 if cfg.lr_schedule_on == "step" else steps_per_epoch
        if cfg.lr_schedule_on == "epoch_after_warmup":
            # two curves: steps up to the last of the warm-up, which has the full rate, then epochs counted from there
            later = [step - warmup for step in at]
            self.curves: tuple[_Curve, ...] = (
                _Curve(optimizer, cfg, "constant", 1, warmup - 1, warmup, []),
                _Curve(optimizer, cfg, cfg.lr_scheduler_type, unit, 0, total_steps - warmup, later, start=warmup),
            )
        else:
            self.curves = (_Curve(optimizer, cfg, cfg.lr_scheduler_type, unit, warmup, total_steps, at),)

    def set(self, step: int) -> float:
        """Set the rate for the step about to be taken; returns it as it is without layer decay."""
        position = max(0, step - self.lag)
        next(curve for curve in reversed(self.curves) if position >= curve.start).set(position)
        first = self.optimizer.param_groups[0]
        return float(first["lr"] / first.get("lr_scale", 1.0))


class _Curve:
    """One of timm's schedulers, counted in units of `unit` steps from `start` on; all lengths are in steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        cfg: TrainConfig,
        kind: str,
        unit: int,
        warmup: int,
        length: int,
        milestones: list[int],
        start: int = 0,
    ) -> None:
        self.unit, self.start = unit, start
        common = {"warmup_t": self._units(warmup), "warmup_lr_init": cfg.warmup_lr, "t_in_epochs": False}
        # rounded up, so that a part of an epoch at the end is not trained at rate 0; timm warns of a length of 1,
        # where only the first rate is used, which is the same for 2
        units = max(2, math.ceil(length / unit))
        at = sorted(self._units(milestone) for milestone in milestones)
        self.scheduler = _SCHEDULERS[kind](optimizer, cfg, units, at, common)

    def _units(self, steps: int) -> int:
        return max(0, round(steps / self.unit))

    def set(self, step: int) -> None:
        self.scheduler.step_update((step - self.start) // self.unit)


def _cosine(optimizer: Optimizer, cfg: TrainConfig, length: int, _: list[int], common: dict[str, Any]) -> Scheduler:
    return CosineLRScheduler(optimizer, t_initial=length, lr_min=cfg.min_lr, **common)


def _linear(optimizer: Optimizer, cfg: TrainConfig, length: int, _: list[int], common: dict[str, Any]) -> Scheduler:
    return PolyLRScheduler(optimizer, t_initial=length, power=1.0, lr_min=cfg.min_lr, **common)


def _multistep(optimizer: Optimizer, cfg: TrainConfig, _: int, at: list[int], common: dict[str, Any]) -> Scheduler:
    # timm lowers the rate one unit before a milestone; here, as in torch, it holds up to the milestone
    later = [milestone + 1 for milestone in at]
    return MultiStepLRScheduler(optimizer, decay_t=later, decay_rate=cfg.lr_decay_rate, **common)


def _step(optimizer: Optimizer, cfg: TrainConfig, _: int, at: list[int], common: dict[str, Any]) -> Scheduler:
    return StepLRScheduler(optimizer, decay_t=max([1, *at]), decay_rate=cfg.lr_decay_rate, **common)


def _constant(optimizer: Optimizer, cfg: TrainConfig, _: int, __: list[int], common: dict[str, Any]) -> Scheduler:
    return MultiStepLRScheduler(optimizer, decay_t=[], decay_rate=1.0, **common)


_SCHEDULERS: Mapping[str, Any] = {
    "cosine": _cosine,
    "linear": _linear,
    "multistep": _multistep,
    "step": _step,
    "constant": _constant,
}
