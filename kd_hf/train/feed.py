"""What a step learns from: images on the device, labels, random draws, and what the teachers say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kd_hf.data.loader import BatchLoader
from kd_hf.data.order import Layout
from kd_hf.data.views import STRONG
from kd_hf.distillation.assembly import Assembly
from kd_hf.distillation.choices import taps_of
from kd_hf.distillation.module import DistillModule
from kd_hf.distillation.teacher import Teacher
from kd_hf.draws import Draws
from kd_hf.methods.base import Moment
from kd_hf.outputs import Outputs
from kd_hf.process import seed_networks
from kd_hf.store.reader import Reader


@dataclass
class Lesson:
    """The arguments of :meth:`kd_hf.distillation.module.DistillModule.forward` for one micro batch."""

    pixels: Any  # what a network takes: a tensor, or images of several sizes with their mask
    teachers: dict[str, Outputs]
    target: Any
    draws: dict[str, Mapping[str, Tensor]]
    active: tuple[str, ...]
    corrupt: list[int]  # rows of the batch that could not be read
    strong: Tensor | None = None  # the strongly augmented view, where an active loss needs it

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it that lies on the device."""
        for part in (self.pixels, self.target):
            yield from (part,) if isinstance(part, Tensor) else part.tensors()
        if self.strong is not None:
            yield self.strong
        for outputs in self.teachers.values():
            yield from outputs.tensors()
        for drawn in self.draws.values():
            yield from drawn.values()


class Feed:
    """Lessons in order. On a GPU each is prepared one ahead on a stream of its own, beside the student's work.

    Args:
        batches: this rank's micro batches.
        stage: normalises, erases and mixes them on the device.
        teachers: by name.
        stored: outputs of other teachers, by name.
        module: draws random numbers for its methods.
        active: the losses that count at an optimiser step.
        moment: where the run stands at an optimiser step.
        accumulation: micro batches of a step.
        start_step: the step of the first batch.
        seed: of the run.
        rank: of this process.
        device: where the lessons go.
        ahead: lessons that are prepared before they are asked for; by default one on a GPU.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        stage: Callable[[Any], tuple[Mapping[str, Any], Any]],
        teachers: Mapping[str, Teacher],
        module: DistillModule,
        active: Callable[[int], tuple[str, ...]],
        moment: Callable[[int], Moment],
        *,
        stored: Mapping[str, Reader] | None = None,
        accumulation: int,
        start_step: int,
        seed: int,
        rank: int,
        device: torch.device,
        ahead: int | None = None,
    ) -> None:
        self.batches, self.stage, self.teachers, self.module = batches, stage, teachers, module
        self.active, self.moment = active, moment
        self.accumulation, self.seed, self.rank, self.device = accumulation, seed, rank, device
        self.stored = stored or {}
        self.count = start_step * accumulation
        self.ahead = ahead if ahead is not None else int(device.type == "cuda")
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: list[Lesson] = []
        self.note = ""  # on how the batches are made, for people

    def __next__(self) -> Lesson:
        """The next lesson, ready to be read on the current stream."""
        while len(self.waiting) < 1 + self.ahead:
            try:
                self.waiting.append(self._prepare())
            except StopIteration:
                break
        if not self.waiting:
            raise StopIteration
        lesson = self.waiting.pop(0)
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.stream)
            for tensor in lesson.tensors():
                tensor.record_stream(here)  # its memory stays taken until the student's stream has read it
        return lesson

    def _prepare(self) -> Lesson:
        batch = next(self.batches)
        number, keys = self.count, batch.key
        step, micro = divmod(number, self.accumulation)
        self.count += 1
        with torch.cuda.stream(self.stream):  # None: does nothing
            batch = batch.to(self.device, non_blocking=True)
            views, target = self.stage(batch)
            active = self.active(step)
            losses = [self.module.choices[name] for name in active]
            read = {loss.teacher for loss in losses}  # one that is not read now does not run
            whole = {loss.teacher for loss in losses if loss.needs.teacher_logits}  # the others stop after their taps
            twice = {loss.teacher for loss in losses if loss.needs.strong}
            seed_networks(self.seed, step, micro, self.rank, "teachers")
            live = {name: teacher for name, teacher in self.teachers.items() if name in read}
            taught = {name: teacher(views[name], whole=name in whole) for name, teacher in live.items()}
            for name in (name for name in live if name in twice):
                taught[name] = replace(taught[name], strong=live[name](views[f"{name}{STRONG}"]))
            told = {name: reader for name, reader in self.stored.items() if name in read}
            taught |= {name: reader(number, keys, self.device) for name, reader in told.items()}
            draws = self.module.draw(Draws(batch.key), self.moment(step), active)
        strong = views[f"student{STRONG}"] if any(loss.needs.strong for loss in losses) else None
        return Lesson(views["student"], taught, target, draws, active, batch.corrupt, strong)


def open_feed(
    parts: Assembly,
    source: Any,
    teachers: Mapping[str, Teacher],
    active: Callable[[int], tuple[str, ...]],
    accelerator: Accelerator,
    start_step: int,
    total_steps: int,
) -> Feed:
    """This rank's lessons of the optimiser steps ``start_step … total_steps - 1`` of a run."""
    args, views = parts.recipe.train, parts.shown()
    accumulation = args.gradient_accumulation_steps
    ranks = (accelerator.num_processes, accelerator.process_index)
    layout = Layout(args.per_device_train_batch_size, *ranks, accumulation)
    steps_per_epoch = len(source) // layout.global_batch
    batches: BatchLoader[Any] = parts.task.batches(
        source,
        views,
        per_device=args.per_device_train_batch_size,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
        accumulation=accumulation,
        seed=args.seed,
        start_step=start_step,
        total_steps=total_steps,
        workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=accelerator.device.type == "cuda",
    )
    feed = Feed(
        iter(batches),
        parts.task.stage(source, views, parts.student.info),
        teachers,
        parts.module,
        active,
        lambda step: Moment(step, total_steps, steps_per_epoch),
        stored={
            name: teacher.reader(layout, steps_per_epoch, taps_of(parts.choices, name))
            for name, teacher in parts.stored.items()
        },
        accumulation=accumulation,
        start_step=start_step,
        seed=args.seed,
        rank=accelerator.process_index,
        device=accelerator.device,
    )
    feed.note = batches.note
    return feed
