"""Parameters spread over processes by torch's FSDP2: the student through accelerate, a large teacher by hand.

Checkpoints do not know about it: what is saved is whole and what is loaded is spread again, so that a run may be
continued with or without sharding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from kd_hf.distillation.choices import Choice
from kd_hf.distillation.module import DistillModule
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo
from kd_hf.models.taps import Tapped
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import Recipe, TrainConfig

# options of `train` that would need FSDP2 to do what it has not been shown to do here
_NOT_SHARDED = ("fp16", "torch_compile", "channels_last", "sync_batchnorm")


def check_sharding(recipe: Recipe, choices: tuple[Choice, ...], accelerator: Accelerator) -> None:
    """Refuse what cannot work on sharded networks.

    Raises:
        UserError: a sharded network whose parts a method runs itself, or `train` options that exclude sharding.
    """
    teachers = recipe.all_teachers()
    for choice in choices:
        if choice.teacher and choice.needs.parts and teachers[choice.teacher].shard:
            raise UserError(
                f"methods.{choice.name} runs parts of the teacher by itself ({', '.join(choice.needs.parts)}), which a "
                f"sharded teacher does not allow; set shard: false for '{choice.teacher}' or leave the method out"
            )
    if recipe.train.channels_last and any(cfg.shard for cfg in teachers.values()):
        raise UserError("teacher.shard: a sharded network cannot be kept in train.channels_last; set one of them false")
    if accelerator.is_fsdp2:
        _check_train(recipe.train)
        for choice in choices:
            if choice.needs.student_parts:
                raise UserError(
                    f"methods.{choice.name} runs parts of the student after its pass "
                    f"({', '.join(choice.needs.student_parts)}), which cannot be used with FSDP; train with "
                    "accelerate_configs/8gpu.yaml, or leave the method out"
                )


def _check_train(cfg: TrainConfig) -> None:
    for name in _NOT_SHARDED:
        if getattr(cfg, name):
            raise UserError(f"train.{name} cannot be used with FSDP; leave it out or use accelerate_configs/8gpu.yaml")


def shard_units(network: nn.Module, info: ModelInfo) -> list[nn.Module]:
    """The modules of a network that are gathered one at a time: its blocks, else what its stages consist of.

    Containers are entered, because networks may run their children without them (gradient checkpointing does).
    """
    paths = info.blocks or tuple(stage.path for stage in info.stages)
    found = [unit for path in paths for unit in _callable_units(network.get_submodule(path))]
    return list(dict.fromkeys(found))


def _callable_units(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [unit for child in module for unit in _callable_units(child)]
    return [module] if any(True for _ in module.parameters()) else []


def shard_network(model: Tapped, info: ModelInfo, mesh: Any = None) -> None:
    """Spread a network's parameters over the processes in place; it is then run through ``model(pixels)`` only.

    Between two runs a process holds its part of each parameter, cut along the first dimension; during a run the
    network's remaining parameters and one unit (:func:`shard_units`) at a time are whole.

    Args:
        model: a network with its taps; parameters may still lie on the CPU and are moved unit by unit.
        info: the network's facts.
        mesh: torch's one-dimensional DeviceMesh over all processes.
    """
    from torch.distributed.fsdp import fully_shard

    for unit in [*shard_units(model.network, info), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def shard_teacher(model: Tapped, info: ModelInfo, device: torch.device) -> None:
    """:func:`shard_network` over all processes of the run; moves the whole network to the device when there is one."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh

    shard_network(model, info, init_device_mesh(device.type, (distributed.get_world_size(),)))


def prepare(
    accelerator: Accelerator, module: DistillModule, optimizer: Optimizer, info: ModelInfo, average: ModelEmaV3 | None
) -> tuple[nn.Module, Any]:
    """Hand module and optimiser to accelerate; under FSDP2 shard the average with the student.

    Args:
        accelerator: of the run.
        module: student and methods.
        optimizer: over the module's parameters.
        info: facts of the student.
        average: the student's moving average, changed in place.
    """
    equal = {f"methods.{name}.{buffer}" for name, method in module.named_methods() for buffer in method.kept_equal}
    if not accelerator.is_fsdp2:
        # DDP looks here for what it need not send before every step
        wrapped_module: Any = module
        wrapped_module._ddp_params_and_buffers_to_ignore = sorted(equal)
        return accelerator.prepare(module, optimizer)
    # accelerate shards the classes a model lists here; the student is one unit too, as evaluation runs it alone
    units = [*shard_units(module.student.network, info), module.student]
    model: Any = module
    model._no_split_modules = sorted({type(unit).__name__ for unit in units})
    module.student.register_forward_hook(_own_storage)
    # autocast as without FSDP, for the same numbers: accelerate's own policy would reduce and add losses in bfloat16
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    prepared, wrapped = accelerator.prepare(module, optimizer)
    if accelerator.mixed_precision != "no":
        prepared.forward = convert_outputs_to_fp32(accelerator.autocast()(prepared.forward))
    prepared.register_forward_pre_hook(partial(_share_buffers, equal))
    _settle_root(prepared)
    if average is not None:
        first: Any = next(module.student.parameters())
        shard_network(average.module, info, first.device_mesh)
        average.foreach = False  # its lists would mix sharded parameters and whole buffers
    return prepared, wrapped


def _settle_root(module: nn.Module) -> None:
    """Let FSDP2 know its root now: by default the first module that runs is, and that may be the student alone."""
    from torch.distributed.fsdp import fully_shard

    states: Any = fully_shard
    states.state(module)._lazy_init()


def _own_storage(module: nn.Module, args: tuple[Any, ...], output: Outputs) -> Outputs:
    """Copy taps that are views: FSDP2 cannot follow a view that a method changes in place, and says so."""
    kind: Any = type(output)  # mypy takes the class of unhashable instances for unhashable
    _show_tensors(kind)
    taps = {tap: value.clone() if value._is_view() else value for tap, value in output.taps.items()}
    return replace(output, taps=taps)


@cache
def _show_tensors(kind: type[Any]) -> None:
    """Tell torch which tensors outputs hold: FSDP2 up to torch 2.11 gathers weights for the backward pass by them."""
    torch.export.register_dataclass(kind)


def _share_buffers(equal: Collection[str], module: nn.Module, args: tuple[Any, ...]) -> None:
    """Give every process the first one's buffers before a training step, as DDP does; not those `equal` anyway."""
    if module.training:
        for name, buffer in module.named_buffers():
            if name not in equal:
                distributed.broadcast(buffer, 0)


def whole(state: Any, keep: bool = True) -> Any:
    """A state dict with every sharded tensor gathered on the CPU; all processes must call this together.

    Args:
        state: nested dictionaries and lists of tensors and plain values; returned as it is where nothing is sharded.
        keep: whether this process needs the values; without, gathered tensors are dropped at once.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({key: _spread_like(own.get(key), value) for key, value in state.items()})


def load_whole_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """``load_state_dict`` of an optimiser's whole state over parameters that may be sharded."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = _spread_like(parameter, value)


def _spread_like(like: Tensor | None, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    # every process has read the same file: nothing needs to be sent
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
