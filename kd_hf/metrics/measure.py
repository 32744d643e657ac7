"""Running networks over an evaluation set, all at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from kd_hf.data.batch import Batch
from kd_hf.data.loader import BatchLoader, eval_loader
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.info import Preprocessing
from kd_hf.metrics.classes import ClassMap
from kd_hf.metrics.meters import Meter, Scored
from kd_hf.metrics.predictions import Predictions
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import TrainConfig
from kd_hf.text.terminal import watched

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


def eval_batch_size(cfg: TrainConfig) -> int:
    """Images per process when nothing is trained."""
    return cfg.per_device_eval_batch_size or cfg.per_device_train_batch_size
