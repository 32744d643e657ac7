"""Running networks over an evaluation set: the student while it trains, teachers at their gate, models on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kd_hf.callbacks import watched
from kd_hf.data.loader import eval_loader
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.metrics import ClassificationMeter
from kd_hf.models.info import Preprocessing
from kd_hf.teacher import GateResult, Teacher

if TYPE_CHECKING:
    from kd_hf.trainer import DistillTrainer

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
        known: the reference's first choices per batch from an earlier call; filled when empty, read when not.
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
        chosen = known[index] if known and index < len(known) else None
        if reference is not None and chosen is None:
            chosen = models[reference](pixels[reference]).argmax(1)
            if known is not None:
                known.append(chosen)
        for name, predict in models.items():
            against = None if name == reference else chosen
            meters[name].update(predict(pixels[name]), batch.label, batch.valid, against)
    return {name: meter.compute(lambda sums: accelerator.reduce(sums, "sum")) for name, meter in meters.items()}


def predictor(model: nn.Module, accelerator: Accelerator) -> Predict:
    """Logits of a tapped model in eval mode under the run's autocast, without gradient."""

    def predict(pixels: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            return model(pixels).logits.float()

    return predict


class Evaluator:
    """The student's evaluation during and after training; teachers are run once and remembered."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer
        self._teacher_choices: list[Tensor] = []
        self._teacher_values: dict[str, dict[str, float]] = {}

    def __call__(self) -> dict[str, float]:
        """Top-1 and so on of the weights that will be exported; ``raw_…`` or ``ema_…`` for the other ones."""
        trainer = self.trainer
        models, views = self._students(), {}
        for name in models:
            views[name] = trainer.parts.student.info.preprocessing
        teachers = self._teachers_to_run()
        for name, teacher in teachers.items():
            models[name], views[name] = teacher_predictor(teacher), teacher.info.preprocessing
        values = measure(
            models,
            views,
            trainer.eval_source,
            trainer.accelerator,
            batch_size=trainer.args.per_device_eval_batch_size or trainer.args.per_device_train_batch_size,
            workers=trainer.args.dataloader_num_workers,
            max_samples=trainer.recipe.eval.max_samples,
            reference=self._reference,
            known=self._teacher_choices if self._reference else None,
            progress=trainer.accelerator.is_main_process and not trainer.args.disable_tqdm,
        )
        self._teacher_values |= {name: values[name] for name in teachers}
        metrics = dict(values["student"])
        metrics |= {f"{name}_top1": v["top1"] for name, v in values.items() if name in ("raw", "ema") and "top1" in v}
        metrics |= {f"{name}_top1": v["top1"] for name, v in self._teacher_values.items() if "top1" in v}
        return metrics

    @property
    def _reference(self) -> str | None:
        names = list(self.trainer.teachers)
        return names[0] if names and self.trainer.recipe.eval.teacher else None

    def _students(self) -> dict[str, Predict]:
        trainer = self.trainer
        raw = predictor(trainer.plain_module.student, trainer.accelerator)
        if trainer.ema is None or trainer.args.ema is None:
            return {"student": raw}
        average = predictor(trainer.ema.module, trainer.accelerator)
        return {"student": average, "raw": raw} if trainer.args.ema.export else {"student": raw, "ema": average}

    def _teachers_to_run(self) -> dict[str, Teacher]:
        trainer = self.trainer
        if not trainer.recipe.eval.teacher:
            return {}
        return {name: t for name, t in trainer.teachers.items() if name not in self._teacher_values}


def teacher_predictor(teacher: Teacher) -> Predict:
    """Logits of a teacher."""
    return lambda pixels: teacher(pixels).logits


def measure_teachers(trainer: DistillTrainer, teachers: Mapping[str, Teacher]) -> list[GateResult]:
    """Measure teachers on held-out images in their own preprocessing and at the size training feeds them."""
    fed = trainer.parts.views()
    results = []
    for name, teacher in teachers.items():
        if teacher.info.num_classes != trainer.eval_source.num_classes:
            continue  # its classes are not the data's: there is no accuracy to measure
        own = teacher.info.native or teacher.info.preprocessing
        predict = teacher_predictor(teacher)
        views = {"own": own, "fed": replace(teacher.info.preprocessing, image_size=fed[name].image_size)}
        same = views["own"] == views["fed"]
        values = measure(
            dict.fromkeys(["own"] if same else views, predict),
            {key: view for key, view in views.items() if key == "own" or not same},
            trainer.eval_source,
            trainer.accelerator,
            batch_size=trainer.args.per_device_eval_batch_size or trainer.args.per_device_train_batch_size,
            workers=trainer.args.dataloader_num_workers,
            max_samples=teacher.cfg.gate.samples,
        )
        top1 = {key: value["top1"] for key, value in values.items() if "top1" in value}
        if "own" in top1:
            samples = int(values["own"]["samples"])
            sizes = (own.image_size, views["fed"].image_size)
            results.append(GateResult(name, samples, top1["own"], top1.get("fed", top1["own"]), *sizes))
    return results
