"""The process around a run: devices and ranks, CPU threads, signals, random state of the networks."""

from __future__ import annotations

import os
import platform
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    LoggerType,
)

from kd_hf.draws import hash_key
from kd_hf.errors import UserError, nearest
from kd_hf.version import __version__

if TYPE_CHECKING:
    from kd_hf.recipe.config import TrainConfig

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
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"the launcher started {launched} processes but accelerate sees {accelerator.num_processes}; "
            f"they would train side by side without knowing each other. {_CPU_ADVICE}"
        )
    if launched_alone and accelerator.num_processes == 1:
        raise UserError(
            f"the launcher's configuration asks for several processes, but it started one. {_CPU_ADVICE}; "
            "for one process set num_processes: 1 and unset MASTER_ADDR"
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


def check_agreement(accelerator: Accelerator, seen: int, folder: Path) -> None:
    """Raise :class:`UserError` unless all processes see the same in a run folder."""
    everyone = accelerator.gather(torch.tensor([seen], device=accelerator.device))
    if len(set(everyone.tolist())) > 1:
        raise UserError(
            f"train.output_dir: the processes do not see the same checkpoints in {folder}; "
            "give a folder that all machines share"
        )


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


class StopSignal:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop reads; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop."""
        return bool(self.name)
