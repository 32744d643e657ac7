"""What takes its turn: the trainer's step on one kept batch, the bare networks, and single pieces beside them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from kd_hf.bench.clock import Mark, ignore
from kd_hf.data.batch import Batch
from kd_hf.data.source import Source
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.teacher import Teacher
from kd_hf.recipe.config import Recipe
from kd_hf.train.trainer import DistillTrainer


class TrainerStep:
    """The trainer's own optimiser step, again and again on one batch that stays on the device.

    It stands at the first step of the run (of a hundred that are looked at) where the most losses count.

    Args:
        recipe: with one micro batch a step.
        source: of the images.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.trainer = DistillTrainer(recipe, train_dataset=source, eval_dataset=source)
        self.position = self._busiest()
        self.trainer.state.global_step = self.position
        weights = self.trainer.weights(self.position)
        self.active = tuple(name for name, weight in weights.items() if weight != 0)
        self.feed = self.trainer.feed()
        self.batch = next(self.feed.batches).to(self.feed.device)
        self.feed.batches = itertools.repeat(self.batch)
        self.feed.active = lambda step: self.active
        self.one_queue = copy.copy(self.feed)
        self.one_queue.ahead, self.one_queue.stream, self.one_queue.waiting = 0, None, []
        self._mark: Mark = ignore
        self._set_marks()

    def _busiest(self) -> int:
        total = self.trainer.length.total_steps

        def losses(step: int) -> int:
            return sum(weight != 0 for weight in self.trainer.weights(step).values())

        return max(range(0, total, -(-total // 100)), key=losses)

    def _set_marks(self) -> None:
        """Hooks at the borders of the parts. A compiled module has none inside: its losses count as the student's."""

        def border(part: str) -> Callable[..., None]:
            return lambda *_, **__: self._mark(part)

        trained = self.trainer.trained
        student = trained.wrapped if self.trainer.args.torch_compile else trained.plain.student
        for model, part in [(student, "student"), *((t.model, "teacher") for t in self.trainer.teachers.values())]:
            model.register_forward_pre_hook(border("hand-over"))
            model.register_forward_hook(border(part))
        trained.wrapped.register_forward_hook(border("losses"))
        accelerator: Any = self.trainer.accelerator
        backward = accelerator.backward

        def marked(loss: Tensor) -> None:
            backward(loss)
            self._mark("backward")

        accelerator.backward = marked

    @property
    def teachers(self) -> dict[str, Teacher]:
        """Those that are read."""
        read = {self.trainer.trained.plain.choices[name].teacher for name in self.active}
        return {name: teacher for name, teacher in self.trainer.teachers.items() if name in read}

    @property
    def works_ahead(self) -> bool:
        """Whether the trainer prepares batches on a second stream."""
        return self.feed.stream is not None

    def in_parts(self, mark: Mark) -> None:
        """A step whose parts stand in one queue."""
        self._mark = mark
        self.trainer.step(self.one_queue)
        self._mark = ignore
        mark("optimiser")

    def whole(self, mark: Mark) -> None:
        """A step as the trainer runs it."""
        self.trainer.step(self.feed)
        mark("step")

    def batches(self) -> Iterator[Batch]:
        """Batch after batch of the run, without end."""
        while True:
            yield from self.trainer.feed().batches

    def gradient_bytes(self) -> dict[str, int]:
        """Bytes of the gradients that a step has, of the student and of the methods."""
        module = self.trainer.trained.plain
        parts: Mapping[str, nn.Module] = {"student": module.student, "methods": module.methods}
        return {
            name: sum(p.numel() * p.element_size() for p in part.parameters() if p.requires_grad)
            for name, part in parts.items()
        }


class BarePair:
    """The networks of a recipe with nothing around them: no taps, no methods, no optimiser.

    Args:
        recipe: names networks and precision.
        images: normalised images ``[B, 3, S, S]`` by network name, the student's and those of the teachers that run.
        labels: int64 ``[B]``, -1 where there is none.
        num_classes: of the student.
        accelerator: gives device and precision.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Mapping[str, Tensor],
        labels: Tensor,
        num_classes: int,
        accelerator: Accelerator,
    ) -> None:
        device, args = accelerator.device, recipe.train
        parts = assemble(recipe.model_copy(update={"methods": {}}), num_classes)
        self.student = parts.student.network.to(device).train()
        if args.lies_channels_last(device.type):
            self.student.to(memory_format=torch.channels_last)
        self.teachers = []
        for name, cfg in recipe.all_teachers().items():
            if name in images:
                plain = cfg.model_copy(update={"mode": "eval", "shard": False})
                teacher = Teacher(name, plain, parts.teachers[name], parts.tapped_teachers[name], device, args)
                self.teachers.append((teacher.handle.network, images[name].to(teacher.dtype)))
        if args.torch_compile:  # the trainer compiles networks with their taps, which are not run here
            self.student.compile()
            for network, _ in self.teachers:
                network.compile()
        self.pixels, self.labels, self.autocast = images["student"], labels, accelerator.autocast

    def __call__(self, mark: Mark) -> None:
        """Teachers forward in inference mode; student forward, cross-entropy, backward."""
        with torch.inference_mode():
            for network, pixels in self.teachers:
                network(pixels)
        mark("teacher")
        with self.autocast():
            output: Any = self.student(self.pixels)
        mark("student")
        loss = F.cross_entropy(getattr(output, "logits", output).float(), self.labels, ignore_index=-1)
        mark("losses")
        loss.backward()
        mark("backward")
        for parameter in self.student.parameters():
            parameter.grad = None


def teachers_in(dtype: str, recipe: Recipe, num_classes: int, device: torch.device) -> dict[str, Teacher]:
    """The recipe's teachers with the taps that its methods read, in a dtype of our choice."""
    parts = assemble(recipe, num_classes)
    return {
        name: Teacher(
            name,
            cfg.model_copy(update={"dtype": dtype}),
            parts.teachers[name],
            parts.tapped_teachers[name],
            device,
            recipe.train,
        )
        for name, cfg in recipe.all_teachers().items()
    }


def reading(batches: Iterable[Batch], device: torch.device) -> Callable[[Mark], None]:
    """Read, decode and augment a batch and bring it to the device."""
    iterator = iter(batches)

    def work(mark: Mark) -> None:
        next(iterator).to(device)
        mark("data")

    return work


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in its own instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Mark], None], int]:
    """A product of two large square matrices, and its FLOPs: what the device can do at best."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.rand(2, size, size, device=device).to(dtype)

    def work(mark: Mark) -> None:
        torch.mm(left, right)
        mark("product")

    return work, 2 * size**3
