"""What a run costs, found without running it: FLOPs and saved activations on the meta device, memory of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.distillation.assembly import Assembly
from kd_hf.models.taps import Tapped
from kd_hf.recipe.config import TrainConfig

GIB = 2**30
# tensors of a parameter's size that an optimiser keeps; others are taken as Adam-like
_STATES = {"sgd": 1, "momentum": 1, "nesterov": 1, "rmsprop": 2, "lion": 1}


@dataclass(frozen=True)
class StepCost:
    """Of one image: forward FLOPs of a view by network, and by method; bytes kept for the backward pass in float32.

    `twice` are the networks that see two views of every image.
    """

    flops: Mapping[str, int]
    method_flops: Mapping[str, int]
    activation_bytes: int
    twice: frozenset[str] = frozenset()

    @property
    def relative(self) -> float:
        """FLOPs of a training step over those of plain training of the student (backward = twice forward)."""
        plain = 3 * self.flops["student"]
        passes = {name: value * (2 if name in self.twice else 1) for name, value in self.flops.items()}
        teachers = sum(value for name, value in passes.items() if name != "student")
        return (3 * passes["student"] + teachers + 3 * sum(self.method_flops.values())) / max(plain, 1)


def step_cost(parts: Assembly) -> StepCost:
    """Count a step of one image; `parts` must be on the meta device."""
    flops = {name: _network_flops(parts, name, model) for name, model in _networks(parts).items()}
    methods = {name: 2 * method.cost().macs for name, method in parts.module.named_methods()}
    student, size, task = parts.module.student, parts.views()["student"].image_size, parts.task
    # at batch 2 for BatchNorm's sake
    saved = _saved_bytes(student, partial(task.pretend, student, size, 2)) // 2
    double = [choice.teacher for choice in parts.choices if choice.needs.strong]
    twice = frozenset(("student", *(name for name in double if name))) if double else frozenset[str]()
    return StepCost(flops, methods, saved * (2 if twice else 1), twice)


def network_macs(parts: Assembly) -> dict[str, int]:
    """Multiply–accumulates of each network's forward pass for one image of the size that training shows it, by name.

    They are counted on copies without weights, so `parts` may be on any device. A network of which no such copy can
    be made or run, because it looks at values, is left out.
    """
    found = {}
    for name, model in _networks(parts).items():
        with suppress(Exception):  # whatever code a network brings
            found[name] = _network_flops(parts, name, _without_weights(model)) // 2
    return found


def _networks(parts: Assembly) -> dict[str, Tapped]:
    return {"student": parts.module.student, **parts.tapped_teachers}


def _network_flops(parts: Assembly, name: str, model: Tapped) -> int:
    """Of one image; the `model` is that network of the parts, or a copy of it, on the meta device."""
    size = parts.views()[name].image_size
    return _forward_flops(model, partial(parts.task.pretend, model, size, 1))


def _without_weights(model: Tapped) -> Tapped:
    """A copy on the meta device, which takes no memory."""
    held = (tensor for module in model.modules() for tensor in (*module.parameters(False), *module.buffers(False)))
    loose = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    # deepcopy takes what its memo holds for what is copied already
    return copy.deepcopy(model, {id(tensor): _emptied(tensor) for tensor in (*held, *loose)})


def _emptied(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


def _forward_flops(model: nn.Module, run: Callable[[], None]) -> int:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # the counter hooks the gradient of what enters a module, and without one a bare parameter (CaiT) has none
        for parameter in learned:
            parameter.requires_grad_(False)
        with _mode(model, False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


def _saved_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes that autograd keeps of a pass in training, parameters left out."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # alive, so that no other tensor takes its place
        return tensor

    held: list[Any] = []
    with _mode(model, True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def memory_bytes(parts: Assembly, cost: StepCost, train: TrainConfig, images: int = 0) -> dict[str, int]:
    """An estimate of one process's memory, by what it holds; `images` are those of the training set."""
    trained = sum(p.numel() for p in parts.module.parameters() if p.requires_grad)
    student = sum(p.numel() for p in parts.module.student.parameters())
    banks = sum(method.cost().sample_bytes for _, method in parts.module.named_methods())
    half = train.bf16 or train.fp16
    teachers = sum(handle.info.parameters for handle in parts.teachers.values())
    found = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "optimiser": 4 * trained * _STATES.get(train.optim.lower(), 2),
        "average": 4 * student if train.ema else 0,
        "banks": banks * images,
        "teachers": (2 if half else 4) * teachers,
        # autocast keeps most activations in half precision
        "activations": cost.activation_bytes * train.per_device_train_batch_size // (2 if half else 1),
    }
    return {name: size for name, size in found.items() if size}
