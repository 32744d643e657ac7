"""From a recipe to the numbers of its bench."""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_hf.bench.clock import Mark, Rounds, Slot, Stopwatch, Work, medians, ratio, take_turns, totals
from kd_hf.bench.exchange import exchange, sent_bytes
from kd_hf.bench.memory import peak_bytes
from kd_hf.bench.photos import Photos
from kd_hf.bench.work import BarePair, TrainerStep, has_bf16, matrix_product, reading, teachers_in
from kd_hf.data.mix import is_mixing
from kd_hf.data.opening import open_source
from kd_hf.data.source import Source
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.cost import step_cost
from kd_hf.errors import UserError
from kd_hf.process import device_name, versions
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.variants import plain_twin, teacher_recipes
from kd_hf.train.smoke import num_classes, smoke_recipe

CPU_BATCH = 8
REPEATS_ON_GPU = 10
PHOTOS = 4096
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Options:
    """What is measured, beside the parts of the step.

    Args:
        rounds: in which everything takes its turn once.
        batch: images a step and process; by default the recipe's own on a GPU, at most 8 on a CPU.
        against_plain: also whole steps of the same student without teacher and methods.
        memory: also peak memory, in processes of their own.
        bf16_teacher: also the teachers' forward pass in bfloat16 and in float32.
    """

    rounds: int = 7
    batch: int | None = None
    against_plain: bool = False
    memory: bool = False
    bf16_teacher: bool = False


def bench_recipe(recipe: Recipe, options: Options | None = None) -> dict[str, Any]:
    """Measure a recipe's step at random weights. Plain values; times in seconds, sizes in bytes.

    Raises:
        UserError: what the recipe names cannot be built, or an option does not fit it.
    """
    chosen = options or Options()
    with tempfile.TemporaryDirectory() as folder:
        small = _bench_version(recipe, chosen.batch, Path(folder))
        source, images = _images(small)
        fitting = _with_heads(small, teacher_recipes(recipe), source.num_classes)
        return {"images": images, **_Bench(fitting, source, chosen).result()}


def _bench_version(recipe: Recipe, batch: int | None, folder: Path) -> Recipe:
    """The recipe as its smoke run has it, but for the batch, and as long and compiled as it is."""
    on_gpu = torch.cuda.is_available() and not recipe.train.use_cpu
    own, augment = recipe.train.per_device_train_batch_size, recipe.data.augment
    multiple = math.lcm(2 if is_mixing(augment) else 1, augment.repeats)
    usual = own if on_gpu else max(multiple, min(own, CPU_BATCH) // multiple * multiple)
    small = smoke_recipe(recipe, folder)
    changes = {
        "per_device_train_batch_size": batch or usual,
        "max_steps": recipe.train.max_steps,
        "torch_compile": recipe.train.torch_compile,
    }
    return small.model_copy(update={"train": small.train.model_copy(update=changes)})


def _with_heads(recipe: Recipe, trained: Collection[str], num_classes: int) -> Recipe:
    """The recipe whose teachers that a recipe of this project trains have the classes of its data."""
    heads = {
        name: cfg.model_copy(update={"num_classes": cfg.num_classes or num_classes} if name in trained else {})
        for name, cfg in recipe.all_teachers().items()
    }
    return recipe.model_copy(update={"teacher": heads["teacher"]} if recipe.teacher else {"teachers": heads})


def _images(recipe: Recipe) -> tuple[Source, str]:
    """The recipe's training images, else synthetic ones, and a line about them."""
    try:
        source = open_source(recipe.data, "train", recipe.train.seed)
        return source, source.describe()
    except UserError as error:
        photos = Photos(max(PHOTOS, recipe.train.per_device_train_batch_size), num_classes(recipe))
        return photos, f"{photos.describe()}, for the recipe's own cannot be opened here: {error}"


class _Bench:
    """The slots of a recipe, and what their times say."""

    def __init__(self, recipe: Recipe, source: Source, options: Options) -> None:
        self.options, self.source = options, source
        self.step = TrainerStep(recipe, source)
        trainer = self.step.trainer
        self.accelerator, self.device = trainer.accelerator, trainer.device
        # what is built later must not count the idle cores anew
        train = recipe.train.model_copy(update={"cpu_threads": trainer.threads})
        self.recipe = recipe.model_copy(update={"train": train})
        alone = self.accelerator.num_processes == 1
        if options.memory and not alone:
            raise UserError("--memory measures one process; leave the launcher out")
        self.watch, self.host_watch = Stopwatch(self.device, alone), Stopwatch(torch.device("cpu"), alone)
        self.gradients = self.step.gradient_bytes()
        dtype = _DTYPES.get(self.accelerator.mixed_precision, torch.float32)
        self.product, self.product_flops = matrix_product(self.device, dtype)

    # ------------------------------------------------------------------------------------------ measuring

    def slots(self) -> dict[str, Slot]:
        """Everything that takes turns."""
        found = {
            "parts": self._slot(self.step.in_parts),
            "bare": self._slot(self._bare_pair()),
            "data": Slot(reading(self.step.batches(), self.device), self.host_watch),
            "product": self._slot(self.product),
        }
        if self.step.works_ahead:
            found["step"] = self._slot(self.step.whole)
        if self.options.against_plain:
            found["plain"] = self._slot(TrainerStep(plain_twin(self.recipe), self.source).whole)
        if self.options.bf16_teacher and has_bf16(self.device):
            found |= {dtype: self._slot(self._teachers(dtype)) for dtype in ("bfloat16", "float32")}
        if self.accelerator.num_processes > 1:
            found["exchange"] = self._slot(exchange(sum(self.gradients.values()), self.device))
        return found

    def _slot(self, work: Work) -> Slot:
        return Slot(work, self.watch, REPEATS_ON_GPU if self.device.type == "cuda" else 1)

    def _bare_pair(self) -> BarePair:
        images, target = self.step.feed.stage(self.step.batch)
        shown = {name: images[name] for name in ("student", *self.step.teachers)}
        return BarePair(self.recipe, shown, target.hard, self.source.num_classes, self.accelerator)

    def _teachers(self, dtype: str) -> Work:
        images, _ = self.step.feed.stage(self.step.batch)
        teachers = teachers_in(dtype, self.recipe, self.source.num_classes, self.device)

        def work(mark: Mark) -> None:
            for name in self.step.teachers:
                teachers[name](images[name])
            mark("teacher")

        return work

    # -------------------------------------------------------------------------------------------- numbers

    def result(self) -> dict[str, Any]:
        """All numbers."""
        times = take_turns(self.slots(), self.options.rounds)
        whole = totals(times["step" if self.step.works_ahead else "parts"])
        return {
            **self._setting(),
            "data_seconds": statistics.median(totals(times["data"])),
            "parts": medians(times["parts"]),
            "step_seconds": statistics.median(whole),
            "images_per_second": self._images_a_step / statistics.median(whole),
            "bare": medians(times["bare"]),
            "bare_seconds": statistics.median(totals(times["bare"])),
            **self._ratios(times, whole),
            "flops": self._flops(statistics.median(whole), statistics.median(totals(times["product"]))),
            "exchange": self._exchange(times.get("exchange")),
            "memory": self._memory(),
        }

    @property
    def _images_a_step(self) -> int:
        return self.recipe.train.per_device_train_batch_size * self.accelerator.num_processes

    def _setting(self) -> dict[str, Any]:
        networks = self.step.trainer.parts
        return {
            "student": networks.student.info.name,
            "teachers": {name: networks.teachers[name].info.name for name in self.step.teachers},
            "losses": list(self.step.active),
            "at_step": self.step.position,
            "device": device_name(self.device),
            "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
            "threads": self.step.trainer.threads,
            "processes": self.accelerator.num_processes,
            "batch": self.recipe.train.per_device_train_batch_size,
            "precision": self.accelerator.mixed_precision,
            "rounds": self.options.rounds,
            "counted": self.watch.counts,
            "versions": versions(),
        }

    def _ratios(self, times: Mapping[str, Rounds], whole: list[float]) -> dict[str, Any]:
        bare = totals(times["bare"])
        without = [step - parts["optimiser"] for step, parts in zip(whole, times["parts"], strict=True)]
        found = {"tax": ratio(without, bare), "tax_with_optimiser": ratio(whole, bare)}
        if "plain" in times:
            found["over_plain"] = ratio(whole, totals(times["plain"]))
        if "bfloat16" in times:
            found["bf16_teacher"] = ratio(totals(times["bfloat16"]), totals(times["float32"]))
        return found

    def _flops(self, step: float, product: float) -> dict[str, Any]:
        """FLOPs of a step in one process (a backward pass is twice the forward one), the tax they mean, their rate."""
        cost = step_cost(assemble(self.recipe, self.source.num_classes, device="meta"))
        batch = self.recipe.train.per_device_train_batch_size
        parts = {
            "student": 3 * batch * cost.flops["student"],
            "teacher": batch * sum(cost.flops[name] for name in self.step.teachers),
            "methods": 3 * batch * sum(cost.method_flops[name] for name in self.step.active),
        }
        total = sum(parts.values())
        return {
            **parts,
            "tax": total / (total - parts["methods"]),
            "per_second": total / step,
            "share_of_matrix_product": total / step * product / self.product_flops,
        }

    def _exchange(self, times: Rounds | None) -> dict[str, Any]:
        total = sum(self.gradients.values())
        sent = sent_bytes(self.step.trainer.trained.wrapped, lambda: self.step.in_parts(lambda part: None))
        return {
            "gradient_bytes": self.gradients,
            "sent_bytes": sent,
            "sent_over_gradients": sent / total if sent else None,
            "seconds_alone": statistics.median(totals(times)) if times else None,
        }

    def _memory(self) -> dict[str, int] | None:
        return peak_bytes(self.recipe, self.source.num_classes) if self.options.memory else None
