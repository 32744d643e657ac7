"""Running networks over an evaluation set: the student while it trains, teachers at their gate, models on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kd_hf.callbacks import watched
from kd_hf.config import Recipe, TrainConfig
from kd_hf.data.loader import eval_loader
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.metrics import ClassificationMeter
from kd_hf.models.info import Preprocessing
from kd_hf.teacher import GateResult, Teacher

Predict = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] → logits [B, K]


def measure(
    models: Mapping[str, Predict],
    views: Mapping[str, Preprocessing],
    source: Source,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
    max_samples: int | None = None,
    reference: str | None = None,
    known: list[Tensor] | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and agreement of several networks over the same images, exact over ranks.

    Args:
        models: prediction functions by name.
        views: what each of them is shown, by the same names.
        source: the images.
        accelerator: gives device and ranks.
        batch_size: per process.
        workers: loader processes.
        max_samples: stop after so many images of the set (taken evenly from all of it).
        reference: the model that agreement is measured against.
        known: the reference's first choices per batch, filled when it is among `models` and read when it is not.
        progress: show a bar.
    """
    stage = DeviceStage(views, source.num_classes)
    loader = eval_loader(
        source,
        views,
        batch_size=batch_size,
        world=accelerator.num_processes,
        rank=accelerator.process_index,
        workers=workers,
        max_samples=max_samples,
    )
    meters = {name: ClassificationMeter(accelerator.device) for name in models}
    hidden = not (progress and watched())
    for index, batch in enumerate(tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hidden)):
        batch = batch.to(accelerator.device)
        pixels, _ = stage(batch)
        logits = {name: predict(pixels[name]) for name, predict in models.items()}
        if known is not None and reference in logits:
            known.append(logits[reference].argmax(1))
        chosen = known[index] if known else logits[reference].argmax(1) if reference in logits else None
        for name, values in logits.items():
            meters[name].update(values, batch.label, batch.valid, None if name == reference else chosen)
    return {name: meter.compute(lambda sums: accelerator.reduce(sums, "sum")) for name, meter in meters.items()}


def predictor(model: nn.Module, accelerator: Accelerator) -> Predict:
    """Logits of a tapped model in eval mode under the run's autocast, without gradient."""

    def predict(pixels: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            return model(pixels).logits.float()

    return predict


class Evaluator:
    """A student's evaluation during and after training; teachers are run once and remembered.

    Args:
        students: ``student`` is what will be exported; others (``raw``, ``ema``) are measured beside it.
        view: what the students are shown.
        teachers: by name; the first whose classes are the data's is what agreement is measured against.
        source: the images.
        accelerator: gives device and ranks.
        recipe: the run.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        view: Preprocessing,
        teachers: Mapping[str, Teacher],
        source: Source,
        accelerator: Accelerator,
        recipe: Recipe,
    ) -> None:
        self.students = {name: predictor(model, accelerator) for name, model in students.items()}
        self.view = view
        wanted = teachers if recipe.eval.teacher else {}
        self.teachers = {name: t for name, t in wanted.items() if t.info.num_classes == source.num_classes}
        self.source, self.accelerator, self.recipe = source, accelerator, recipe
        self._teacher_choices: list[Tensor] = []
        self._teacher_values: dict[str, dict[str, float]] = {}

    def __call__(self) -> dict[str, float]:
        """Top-1 and so on of the student, ``raw_top1`` or ``ema_top1`` beside it, and ``<teacher>_top1``."""
        new = {name: teacher for name, teacher in self.teachers.items() if name not in self._teacher_values}
        models = {**self.students, **{name: teacher_predictor(teacher) for name, teacher in new.items()}}
        views = dict.fromkeys(self.students, self.view)
        views |= {name: teacher.info.preprocessing for name, teacher in new.items()}
        reference = next(iter(self.teachers), None)
        values = measure(
            models,
            views,
            self.source,
            self.accelerator,
            batch_size=eval_batch_size(self.recipe.train),
            workers=self.recipe.train.dataloader_num_workers,
            max_samples=self.recipe.eval.max_samples,
            reference=reference,
            known=self._teacher_choices if reference else None,
            progress=self.accelerator.is_main_process and not self.recipe.train.disable_tqdm,
        )
        self._teacher_values |= {name: values[name] for name in new}
        beside = {name: values[name] for name in self.students if name != "student"} | self._teacher_values
        return values["student"] | {f"{name}_top1": found["top1"] for name, found in beside.items() if "top1" in found}


def eval_batch_size(cfg: TrainConfig) -> int:
    """Images per process when nothing is trained."""
    return cfg.per_device_eval_batch_size or cfg.per_device_train_batch_size


def teacher_predictor(teacher: Teacher) -> Predict:
    """Logits of a teacher."""
    return lambda pixels: teacher(pixels).logits


def measure_teachers(
    teachers: Mapping[str, Teacher],
    fed: Mapping[str, Preprocessing],
    source: Source,
    accelerator: Accelerator,
    cfg: TrainConfig,
) -> list[GateResult]:
    """Measure teachers on held-out images in their own preprocessing and as training feeds them.

    Args:
        teachers: by name.
        fed: their training views, by the same names.
        source: held-out images.
        accelerator: gives device and ranks.
        cfg: the recipe's `train` block.
    """
    results = []
    for name, teacher in teachers.items():
        if teacher.info.num_classes != source.num_classes:
            continue  # its classes are not the data's: there is no accuracy to measure
        own = teacher.info.native or teacher.info.preprocessing
        views = {"own": own} if own == fed[name] else {"own": own, "fed": fed[name]}
        values = measure(
            {key: teacher_predictor(teacher) for key in views},
            views,
            source,
            accelerator,
            batch_size=eval_batch_size(cfg),
            workers=cfg.dataloader_num_workers,
            max_samples=teacher.cfg.gate.samples,
        )
        top1 = {key: value["top1"] for key, value in values.items() if "top1" in value}
        if "own" in top1:
            samples = int(values["own"]["samples"])
            sizes = (own.image_size, fed[name].image_size)
            results.append(GateResult(name, samples, top1["own"], top1.get("fed", top1["own"]), *sizes))
    return results
