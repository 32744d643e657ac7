"""Networks measured on their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.eval.benchmarks import EvalSet
    from kd_hf.metrics.classes import ClassMap
    from kd_hf.metrics.measure import Run, Stopwatch, Subject
    from kd_hf.metrics.meters import Meter
    from kd_hf.models.handle import ModelHandle

OPTIONS = {  # key of a recipe's `data` block → option
    "path": "--data",
    "name": "--name",
    "eval_split": "--split",
    "image_column": "--image-column",
    "label_column": "--label-column",
    "image_size": "--image-size",
    "streaming": "--streaming",
}
_BOX_OPTIONS = {  # the same for what is in its `boxes`
    "boxes.augment.eval_size": "--eval-size",
    "boxes.augment.max_size": "--max-size",
    "boxes.augment.multiple_of": "--multiple-of",
    "boxes.augment": "--eval-size, --max-size",
    "boxes.box_format": "--box-format",
    "boxes.annotations": "--annotations",
    "boxes.images": "--images",
}


@dataclass(frozen=True)
class Result:
    """What one network reached on one set."""

    values: dict[str, float]
    """``top1``, ``top5``, ``agreement``, ``ece`` in percent, ``nll``, ``kl`` in nats, ``brier``, ``cka``, ``samples``,
    ``images_per_second`` (of the network alone on one device)."""
    classes: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """(right, images) of each class of the data."""


class Networks:
    """The networks that are measured, loaded once.

    Args:
        models: what to measure, by anything that :func:`kd_hf.models.load.load_model` takes.
        teacher: the network the others are compared with; measured too.
        accelerator: gives device and ranks.
        options: further arguments of :func:`kd_hf.models.load.load_model`, the same for all.
    """

    def __init__(self, models: Sequence[str], teacher: str | None, accelerator: Accelerator, **options: Any) -> None:
        from kd_hf.metrics.measure import FEATURES, runner
        from kd_hf.models.load import load_model
        from kd_hf.models.taps import TappedModel, available_taps

        self.accelerator, self.teacher = accelerator, teacher
        self.handles: dict[str, ModelHandle] = {}
        self.runs: dict[str, Run] = {}
        for name in dict.fromkeys([*models, *([teacher] if teacher else [])]):
            handle = load_model(name, pretrained=True, **options)
            taps = [FEATURES] if teacher and FEATURES in available_taps(handle.info) else []
            self.handles[name] = handle
            self.runs[name] = runner(TappedModel(handle, handle.info, taps).to(accelerator.device), accelerator)

    def evaluate(
        self,
        data: EvalSet,
        *,
        batch_size: int = 64,
        workers: int = 0,
        max_samples: int | None = None,
        label_indices: bool = False,
        progress: bool = False,
    ) -> dict[str, Result]:
        """Measure all of them over the same images; a call of all ranks. Arguments as of :func:`evaluate_models`."""
        from kd_hf.eval.benchmarks import match_classes
        from kd_hf.metrics.measure import Stopwatch, Subject, measure

        watches = {name: Stopwatch(run, self.accelerator.device) for name, run in self.runs.items()}
        subjects = {
            name: Subject(
                watches[name],
                handle.info.preprocessing,
                self._meters(name, data),
                match_classes(handle.info, handle.label_names, data, label_indices),
            )
            for name, handle in self.handles.items()
        }
        self._check_comparable(subjects)
        values = measure(
            subjects,
            data.source,
            self.accelerator,
            batch_size=batch_size,
            workers=workers,
            max_samples=max_samples,
            answers=data.answers,
            reference=self.teacher,
            progress=progress and self.accelerator.is_main_process,
        )
        return {name: self._result(values[name], subjects[name].meters, watches[name]) for name in subjects}

    def _meters(self, name: str, data: EvalSet) -> list[Meter]:
        """What is asked of a network: calibration where an image has one label, comparison where there is a teacher."""
        from kd_hf.metrics.meters import Accuracy, ByClass, Calibration, Divergence, FeatureSimilarity

        device = self.accelerator.device
        meters: list[Meter] = [Accuracy(device), ByClass(device, data.source.num_classes)]
        if data.answers is None:
            meters.append(Calibration(device))
        if self.teacher and name != self.teacher:
            meters += [Divergence(device), FeatureSimilarity(device)]
        return meters

    def _check_comparable(self, subjects: Mapping[str, Subject]) -> None:
        """Refuse to compare networks whose choices are not the same classes."""
        if self.teacher is None:
            return
        sizes = {name: _choices(self.handles[name], subject.classes) for name, subject in subjects.items()}
        for name, size in sizes.items():
            if size != sizes[self.teacher]:
                raise UserError(
                    f"--teacher: {name} chooses among {size[0]} classes and {self.teacher} among "
                    f"{sizes[self.teacher][0]}, or they number them differently, so that they cannot be compared"
                )

    def _result(self, values: dict[str, float], meters: Sequence[Meter], watch: Stopwatch) -> Result:
        from kd_hf.metrics.meters import ByClass

        by_class = next(meter for meter in meters if isinstance(meter, ByClass))
        counts = by_class.counts(lambda sums: self.accelerator.reduce(sums, "sum"))
        rate = watch.rate()
        return Result(values | ({"images_per_second": rate} if rate else {}), tuple(counts))


def _choices(handle: ModelHandle, classes: ClassMap) -> tuple[int, list[int] | None]:
    """How many classes a network chooses among, and which of them the data's are."""
    count = handle.info.num_classes if classes.choices is None else len(classes.choices)
    return count, None if classes.label is None else classes.label.tolist()


def evaluate_models(
    models: Sequence[str],
    teacher: str | None,
    data: Mapping[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_samples: int | None = None,
    label_indices: bool = False,
    use_cpu: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Measure models on one data set; see :class:`Result` for the values.

    Args:
        models: what to measure.
        teacher: the model the others are compared with; it is measured too.
        data: keys of a recipe's `data` block; `path` may be one of :mod:`kd_hf.eval.benchmarks`.
        batch_size: images per process.
        workers: loader processes.
        max_samples: stop after so many images, spread over the set.
        label_indices: labels without names are indices into the models' classes, of which there may be more.
        use_cpu: stay on the CPU.
        progress: show a bar.

    Raises:
        UserError: a model or data set that is not there, or whose classes do not fit.
    """
    opened = open_data(data)
    networks = Networks(models, teacher, eval_accelerator(use_cpu), image_size=data.get("image_size"))
    results = networks.evaluate(
        opened,
        batch_size=batch_size,
        workers=workers,
        max_samples=max_samples,
        label_indices=label_indices,
        progress=progress,
    )
    return {name: result.values for name, result in results.items()}


def eval_accelerator(use_cpu: bool) -> Accelerator:
    """Devices and ranks of an evaluation; sets the number of CPU threads."""
    from kd_hf.process import build_accelerator, set_cpu_threads
    from kd_hf.recipe.config import TrainConfig

    accelerator = build_accelerator(TrainConfig(output_dir=".", use_cpu=use_cpu))
    set_cpu_threads("auto", accelerator.num_processes)
    return accelerator


def open_data(data: Mapping[str, Any]) -> EvalSet:
    """The data set that keys of a recipe's `data` block name; a mistake is told by the command's options."""
    from pydantic import ValidationError

    from kd_hf.eval.benchmarks import open_eval_set
    from kd_hf.recipe.config import DataConfig

    try:
        with naming_options():
            return open_eval_set(DataConfig.model_validate(data))
    except ValidationError as error:
        raise UserError(f"--data: {error.errors()[0]['msg']}") from None


@contextmanager
def naming_options() -> Iterator[None]:
    """Errors name the option where they would name the recipe's key."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, option in {**_BOX_OPTIONS, **OPTIONS}.items():
            text = text.replace(f"data.{key}", option)
        raise type(error)(text) from error
