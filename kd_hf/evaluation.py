"""Running networks over an evaluation set: the student while it trains, teachers at their gate, models on their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kd_hf.benchmarks import ClassMap
from kd_hf.callbacks import watched
from kd_hf.config import Recipe, TrainConfig
from kd_hf.data.batch import Batch
from kd_hf.data.loader import BatchLoader, eval_loader
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.gate import GateResult, guessing_top1
from kd_hf.methods.base import Outputs
from kd_hf.metrics import Accuracy, Calibration, Meter, Scored
from kd_hf.models.info import Preprocessing
from kd_hf.prediction import Predictions
from kd_hf.teacher import Teacher

Predict = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] → logits [B, K]
Run = Callable[[Tensor], Outputs]  # the same → float32 logits and taps
FEATURES = "pre_logits"  # the tap that features are compared at


@dataclass(frozen=True)
class Subject:
    """A network under measurement."""

    run: Run
    view: Preprocessing
    """What it is shown."""
    meters: Sequence[Meter]
    classes: ClassMap = field(default_factory=ClassMap)


def measure(
    subjects: Mapping[str, Subject],
    source: Source,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
    max_samples: int | None = None,
    answers: Tensor | None = None,
    reference: str | None = None,
    known: list[Tensor] | None = None,
    keep: Mapping[str, Predictions] | None = None,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Run several networks over the same images, exact over ranks; what their meters give, by network.

    Args:
        subjects: networks by name.
        source: the images.
        accelerator: gives device and ranks.
        batch_size: per process.
        workers: loader processes.
        max_samples: stop after so many images of the set (taken evenly from all of it).
        answers: int64 ``[rows, M]``: instead of the images' labels, all that are right, padded with -1; images
            without any are left out.
        reference: the network that the others are compared with.
        known: the reference's first choices per batch, filled when it is among `subjects` and read when it is not.
        keep: what collects the logits of some of the `subjects`, by their names.
        progress: show a bar.
    """
    device = accelerator.device
    views = {name: subject.view for name, subject in subjects.items()}
    maps = {name: subject.classes.to(device) for name, subject in subjects.items()}
    stage = DeviceStage(views, source.num_classes)
    ranks = {"world": accelerator.num_processes, "rank": accelerator.process_index}
    loader = eval_loader(source, views, batch_size=batch_size, workers=workers, max_samples=max_samples, **ranks)
    answers = None if answers is None else answers.to(device)
    for index, cpu_batch in enumerate(
        _with_bar(loader, min(len(source), max_samples or len(source)), accelerator, progress)
    ):
        batch = cpu_batch.to(device)
        pixels, _ = stage(batch)
        outputs = {name: subject.run(pixels[name]) for name, subject in subjects.items()}
        logits = {name: maps[name].restrict(output.logits) for name, output in outputs.items()}
        if known is not None and reference in logits:
            known.append(logits[reference].argmax(1))
        chosen = known[index] if known else logits[reference].argmax(1) if reference in logits else None
        for name, predictions in (keep or {}).items():
            predictions.add(batch, logits[name])
        for name, subject in subjects.items():
            scored = _scored(batch, logits[name], outputs[name], maps[name], answers)
            if reference is not None and name != reference:
                scored = _beside(scored, chosen, logits.get(reference), outputs.get(reference))
            for meter in subject.meters:
                meter.update(scored)
    total = partial(accelerator.reduce, reduction="sum")
    return {
        name: {key: value for meter in subject.meters for key, value in meter.compute(total).items()}
        for name, subject in subjects.items()
    }


def _with_bar(loader: BatchLoader, total: int, accelerator: Accelerator, progress: bool) -> Iterator[Batch]:
    """The batches, with a bar over the images of all processes."""
    hidden = not (progress and watched())
    with tqdm(desc="evaluate", total=total, unit="image", unit_scale=True, leave=False, disable=hidden) as bar:
        for batch in loader:
            yield batch
            bar.update(int(batch.valid.sum()) * accelerator.num_processes)


def _scored(batch: Batch, logits: Tensor, outputs: Outputs, classes: ClassMap, answers: Tensor | None) -> Scored:
    """What a network says about a batch."""
    if answers is None:
        label, valid = classes.target(batch.label), batch.valid
    else:
        label = answers[batch.row.clamp(min=0)]  # [B, M]
        valid = batch.valid & (label >= 0).any(1)
    return Scored(logits, label, valid, features=outputs.taps.get(FEATURES), group=batch.label)


def _beside(scored: Scored, chosen: Tensor | None, logits: Tensor | None, outputs: Outputs | None) -> Scored:
    """The same with what the reference says about the batch: its choice only, where it was not run again."""
    features = outputs.taps.get(FEATURES) if outputs is not None else None
    return replace(scored, teacher_class=chosen, teacher_logits=logits, teacher_features=features)


def runner(model: nn.Module, accelerator: Accelerator) -> Run:
    """Run a tapped model in eval mode under the run's autocast, without gradient."""

    def run(pixels: Tensor) -> Outputs:
        model.eval()
        with torch.no_grad(), accelerator.autocast():
            outputs: Outputs = model(pixels)
        return replace(outputs, logits=outputs.logits.float(), dist_logits=None)

    return run


def predictor(model: nn.Module, accelerator: Accelerator) -> Predict:
    """Logits of a tapped model in eval mode under the run's autocast, without gradient."""
    run = runner(model, accelerator)
    return lambda pixels: run(pixels).logits


class Stopwatch:
    """Runs a network and takes the time of it alone, on the device's own clock.

    Args:
        run: the network.
        device: where it runs.
    """

    WARM = 3  # batches that are not counted, where there are more

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.device = run, device
        self._laps: list[tuple[int, Callable[[], float]]] = []  # images, and what gives the seconds

    def __call__(self, pixels: Tensor) -> Outputs:
        """Outputs for normalised images ``[B, 3, H, W]``."""
        stop = self._start()
        outputs = self.run(pixels)
        self._laps.append((len(pixels), stop()))
        return outputs

    def _start(self) -> Callable[[], Callable[[], float]]:
        """Start the clock; the result stops it, and gives what to ask for the seconds once the device is done."""
        if self.device.type == "cpu":
            before = time.perf_counter()
            return lambda: partial(float, time.perf_counter() - before)
        start, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
        start.record()

        def seconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000.0

        def stop() -> Callable[[], float]:
            end.record()
            return seconds

        return stop

    def rate(self) -> float | None:
        """Images per second of this process once warm; None after a single batch."""
        laps = self._laps[self.WARM :] or self._laps[1:]
        seconds = sum(lap() for _, lap in laps)
        return sum(size for size, _ in laps) / seconds if seconds else None


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
        self._runs = {name: runner(model, accelerator) for name, model in students.items()}
        self.view = view
        wanted = teachers if recipe.eval.teacher else {}
        self.teachers = {name: t for name, t in wanted.items() if t.info.num_classes == source.num_classes}
        self.source, self.accelerator, self.recipe = source, accelerator, recipe
        self._teacher_choices: list[Tensor] = []
        self._teacher_values: dict[str, dict[str, float]] = {}

    def __call__(self, found: Predictions | None = None) -> dict[str, float]:
        """``top1``, ``top5``, ``nll``, ``ece``, ``brier``, ``agreement`` and ``samples`` of the student.

        Units as in :mod:`kd_hf.metrics`. Beside them ``raw_top1`` or ``ema_top1``, and ``<teacher>_top1``. Only the
        teacher's choices are kept, not its logits: divergence and similarity are for ``kd_hf.eval``.

        Args:
            found: collects the student's logits.
        """
        device = self.accelerator.device
        new = {name: teacher for name, teacher in self.teachers.items() if name not in self._teacher_values}
        subjects = {
            name: Subject(run, self.view, (Accuracy(device), Calibration(device))) for name, run in self._runs.items()
        }
        subjects |= {name: Subject(t, t.info.preprocessing, (Accuracy(device),)) for name, t in new.items()}
        reference = next(iter(self.teachers), None)
        values = measure(
            subjects,
            self.source,
            self.accelerator,
            batch_size=eval_batch_size(self.recipe.train),
            workers=self.recipe.train.dataloader_num_workers,
            max_samples=self.recipe.eval.max_samples,
            reference=reference,
            known=self._teacher_choices if reference else None,
            keep={"student": found} if found is not None else None,
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
            {key: Subject(teacher, view, (Accuracy(accelerator.device),)) for key, view in views.items()},
            source,
            accelerator,
            batch_size=eval_batch_size(cfg),
            workers=cfg.dataloader_num_workers,
            max_samples=teacher.cfg.gate.samples,
        )
        top1 = {key: value["top1"] for key, value in values.items() if "top1" in value}
        if "own" in top1:
            samples = int(values["own"]["samples"])
            sizes, chance = (own.image_size, fed[name].image_size), guessing_top1(source.num_classes, samples)
            fed_top1 = top1.get("fed", top1["own"])
            results.append(GateResult(name, samples, top1["own"], fed_top1, *sizes, guessing=chance))
    return results
