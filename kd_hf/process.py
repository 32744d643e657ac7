"""The process around a run: devices, ranks and what they agree on, CPU threads, random state of the networks."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    LoggerType,
    broadcast_object_list,
)
from torch import Tensor, distributed

from kd_hf.draws import hash_key
from kd_hf.errors import UserError, nearest
from kd_hf.version import __version__

if TYPE_CHECKING:
    from kd_hf.recipe.config import TrainConfig

T = TypeVar("T")
_CPU_ADVICE = "On a CPU use accelerate_configs/2cpu.yaml (distributed_type: MULTI_GPU with use_cpu: true)"


def build_accelerator(cfg: TrainConfig, unused_parameters: bool = False) -> Accelerator:
    """The accelerator of a run; stops when the launcher's processes do not know each other.

    Args:
        cfg: the recipe's `train` block.
        unused_parameters: whether some steps leave parameters without gradient (a loss that pauses).
    """
    use_cpu = cfg.use_cpu or not torch.accelerator.is_available()
    if cfg.fp16 and use_cpu:
        raise UserError("train.fp16 needs a GPU; on a CPU use train.bf16 or neither")
    if cfg.sync_batchnorm and use_cpu:
        raise UserError("train.sync_batchnorm needs GPUs; leave it out on a CPU")
    _check_trackers(cfg.report_to)
    if cfg.full_determinism:
        require_determinism()
    launched_alone = _launched_alone()  # before accelerate sets ranks itself
    # a second run in one process (teacher, then student) starts from a clean state
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        # the first run's engine; accelerate chooses it anew, from this
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    ddp = DistributedDataParallelKwargs(find_unused_parameters=unused_parameters)
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if cfg.bf16 else "fp16" if cfg.fp16 else "no",
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        dynamo_backend="inductor" if cfg.torch_compile else "no",
        log_with=cfg.report_to or None,
        project_dir=cfg.output_dir,
        kwargs_handlers=[ddp],
        step_scheduler_with_optimizer=False,
    )
    _check_processes(accelerator, launched_alone)
    _check_engine(accelerator)
    return accelerator


def require_determinism() -> None:
    """Let torch choose deterministic kernels from now on, and raise where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product opens cuBLAS
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # finds reads of it, at the price of writing it all


@contextmanager
def nondeterminism_named() -> Iterator[None]:
    """Turn torch's refusal of an operation into a :class:`UserError` that names it."""
    try:
        yield
    except RuntimeError as error:
        refused = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if refused is None:
            raise
        raise UserError(
            f"train.full_determinism: {refused[1]}, which a network or a method of this recipe runs, has no "
            "deterministic kernel on this device; leave the option out, or choose other networks or methods"
        ) from None


def _launched_alone() -> bool:
    """Whether accelerate's launcher was told of several CPU processes and started one.

    It then names the meeting point of all processes, but gives this one no rank.
    """
    met = "MASTER_ADDR" in os.environ and "ACCELERATE_USE_CPU" in os.environ
    return met and "RANK" not in os.environ


def _check_processes(accelerator: Accelerator, launched_alone: bool) -> None:
    """Stop where fewer processes train together than were asked for."""
    _check_number(accelerator.num_processes)
    if launched_alone and accelerator.num_processes == 1:
        raise UserError(
            f"the launcher's configuration asks for several processes, but it started one. {_CPU_ADVICE}; "
            "for one process set num_processes: 1 and unset MASTER_ADDR"
        )


def _check_number(processes: int) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:
        raise UserError(
            f"the launcher started {launched} processes but accelerate sees {processes}; "
            f"they would train side by side without knowing each other. {_CPU_ADVICE}"
        )


def _check_engine(accelerator: Accelerator) -> None:
    """Stop where accelerate would run another engine than was asked for, or one that this trainer does not drive."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise UserError(f"the launcher asks for {kind.value}; kd_hf trains with DDP or FSDP2 (accelerate_configs/)")
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and kind != DistributedType.FSDP:
        raise UserError("the launcher asks for FSDP, which needs GPUs; use accelerate_configs/2cpu.yaml on a CPU")
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin)


def _check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse the variants of FSDP that the checkpoints here have not been shown to survive."""
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    wanted = {
        "fsdp_version: 2": plugin.fsdp_version == 2,
        "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: false (train.activation_checkpointing does it)": not (
            plugin.activation_checkpointing
        ),
        "fsdp_cpu_ram_efficient_loading: false": not plugin.cpu_ram_efficient_loading,
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP without class names": (
            plugin.auto_wrap_policy is transformer_auto_wrap_policy and not plugin.transformer_cls_names_to_wrap
        ),
    }
    missing = [line for line, met in wanted.items() if not met]
    if missing:
        raise UserError(f"the launcher's fsdp_config must say {missing[0]}, as accelerate_configs/8gpu_fsdp2.yaml does")


def _check_trackers(names: list[str]) -> None:
    known = {kind.value for kind in LoggerType} - {LoggerType.ALL.value}
    installed = {kind.value for kind in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UserError(f"train.report_to: unknown tracker '{name}'.{nearest(name, known)}")
        if name not in installed:
            raise UserError(f"train.report_to: the tracker '{name}' is not installed; pip install {name}")


def set_cpu_threads(wanted: int | str, processes: int) -> int:
    """Set torch's threads for this process and return their number.

    `auto` takes the idle cores divided by the processes, at least one: threads that spin on cores that
    are taken make a step many times slower than one thread would.
    """
    if wanted == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        wanted = max(1, int(cores - busy) // processes)
    torch.set_num_threads(int(wanted))
    return int(wanted)


def agreed(decide: Callable[[], T]) -> T:
    """What the main process decides, on all of them; a :class:`UserError` of it is raised on all.

    All processes call this together. Where a launcher has started several, they must know each other by now.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return decide()
    state = PartialState()
    box: list[Any] = [None]
    if state.is_main_process:
        try:
            box = [decide()]
        except UserError as error:
            box = [error]
    if state.num_processes > 1:
        broadcast_object_list(box)
    if isinstance(box[0], UserError):
        raise box[0]
    result: T = box[0]
    return result


def meet(use_cpu: bool) -> None:
    """Have the processes of a launcher know each other, so that they can agree before anything is built.

    Raises:
        UserError: they do not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _check_number(PartialState(cpu=use_cpu or not torch.accelerator.is_available()).num_processes)


def check_agreement(accelerator: Accelerator, seen: int, folder: Path) -> None:
    """Raise :class:`UserError` unless all processes see the same in a run folder."""
    everyone = accelerator.gather(torch.tensor([seen], device=accelerator.device))
    if len(set(everyone.tolist())) > 1:
        raise UserError(
            f"train.output_dir: the processes do not see the same checkpoints in {folder}; "
            "give a folder that all machines share"
        )


class Vote:
    """The largest number that any process says, one step later on all of them, without a word to the device.

    Every step each process casts a number and learns the result of the step before. That travels between the hosts
    while they compute: by the time it is asked for, all have cast it. A process that is alone is answered at once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self._cast: tuple[Any, Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Cast a number; the result of the last call, 0 at the first one."""
        if self._group is None:
            return number
        result = self._result()
        value = torch.tensor([number])
        work = distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._cast = (work, value)
        return result

    def _result(self) -> int:
        if self._cast is None:
            return 0
        work, value = self._cast
        work.wait()
        return int(value)

    def close(self) -> int:
        """End it: the result of the last call."""
        result, self._cast = self._result(), None
        if self._group is not None:
            distributed.destroy_process_group(self._group)
            self._group = None
        return result


def device_name(device: torch.device) -> str:
    """What computes: the GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide what a run computes."""
    libraries = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "pillow")
    return {"kd_hf": __version__, "python": platform.python_version(), **{name: version(name) for name in libraries}}


def seed_networks(seed: int, step: int, micro_step: int, rank: int, whose: str = "networks") -> None:
    """Seed what networks draw inside themselves (dropout, drop path), so that a resumed step repeats it."""
    torch.manual_seed(hash_key(seed, whose, step, micro_step, rank) & 0x7FFFFFFFFFFFFFFF)
