"""Evaluate: ``python -m kd_hf.eval MODEL … --data DATA … [--teacher MODEL]`` → a table, or JSON.

A model is a Hub id, a folder, a run folder, or a pretrained timm name. Each is shown the images in its own
preprocessing. Data is what a recipe's `data.path` can be, or one of :mod:`kd_hf.benchmarks`, such as ``imagenet-a``
or ``imagenet-a=/path``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, is_main_process, run_command

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.benchmarks import ClassMap, EvalSet
    from kd_hf.evaluation import Run, Stopwatch, Subject
    from kd_hf.metrics import Meter
    from kd_hf.models.handle import ModelHandle

# key of the values, head of the column, format
COLUMNS = (
    ("top1", "top-1 %", ".2f"),
    ("top5", "top-5 %", ".2f"),
    ("nll", "nll", ".4f"),
    ("ece", "ece %", ".2f"),
    ("brier", "brier", ".4f"),
    ("agreement", "agreement %", ".2f"),
    ("kl", "kl", ".4f"),
    ("cka", "cka", ".4f"),
    ("images_per_second", "images/s", ".0f"),
)
_OPTIONS = {  # key of a recipe's `data` block → option
    "path": "--data",
    "name": "--name",
    "eval_split": "--split",
    "image_column": "--image-column",
    "label_column": "--label-column",
    "image_size": "--image-size",
    "streaming": "--streaming",
}
_SHOWN_CLASSES = 20  # of each end of a long list by class


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
        from kd_hf.evaluation import FEATURES, runner
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
        from kd_hf.benchmarks import match_classes
        from kd_hf.evaluation import Stopwatch, Subject, measure

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
        from kd_hf.metrics import Accuracy, ByClass, Calibration, Divergence, FeatureSimilarity

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
        from kd_hf.metrics import ByClass

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
        data: keys of a recipe's `data` block; `path` may be one of :mod:`kd_hf.benchmarks`.
        batch_size: images per process.
        workers: loader processes.
        max_samples: stop after so many images, spread over the set.
        label_indices: labels without names are indices into the models' classes, of which there may be more.
        use_cpu: stay on the CPU.
        progress: show a bar.

    Raises:
        UserError: a model or data set that is not there, or whose classes do not fit.
    """
    opened = _open_data(data)
    networks = Networks(models, teacher, _accelerator(use_cpu), image_size=data.get("image_size"))
    results = networks.evaluate(
        opened,
        batch_size=batch_size,
        workers=workers,
        max_samples=max_samples,
        label_indices=label_indices,
        progress=progress,
    )
    return {name: result.values for name, result in results.items()}


def _accelerator(use_cpu: bool) -> Accelerator:
    from kd_hf.config import TrainConfig
    from kd_hf.runtime import build_accelerator, set_cpu_threads

    accelerator = build_accelerator(TrainConfig(output_dir=".", use_cpu=use_cpu))
    set_cpu_threads("auto", accelerator.num_processes)
    return accelerator


def _open_data(data: Mapping[str, Any]) -> EvalSet:
    from pydantic import ValidationError

    from kd_hf.benchmarks import open_eval_set
    from kd_hf.config import DataConfig

    try:
        return open_eval_set(DataConfig.model_validate(data))
    except ValidationError as error:
        raise UserError(f"--data: {error.errors()[0]['msg']}") from None
    except UserError as error:
        text = str(error)
        for key, option in _OPTIONS.items():
            text = text.replace(f"data.{key}", option)
        raise type(error)(text) from error


# --- the command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Parse the command line, evaluate, print."""
    args = _parser().parse_args(argv)
    common = {key: getattr(args, option.removeprefix("--").replace("-", "_")) for key, option in _OPTIONS.items()}
    # before the networks: a wrong path shows at once
    opened = {path: _open_data(common | {"path": path}) for path in args.data}
    options = {"image_size": args.image_size, "allow_pickle": args.allow_pickle}
    options["trust_remote_code"] = args.trust_remote_code
    networks = Networks(args.models, args.teacher, _accelerator(args.use_cpu), **options)
    results = {}
    for path, data in opened.items():
        results[path] = networks.evaluate(
            data,
            batch_size=args.batch_size,
            workers=args.workers,
            max_samples=args.max_samples,
            label_indices=args.label_indices,
            progress=True,
        )
    if is_main_process():
        print(_report(opened, results, args, str(networks.accelerator.device.type)))
        _write_files(opened, results, args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.eval",
        description="Evaluate models on data sets: accuracy, calibration, and how near they are to a teacher.",
        epilog="ECE: 15 bins; Brier: squared error summed over classes; KL(teacher || model) at temperature 1; CKA: "
        "linear, of what the classifier receives; images/s: of the network alone on this device, indicative.",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hub id, folder, run folder or timm name, such as resnet18.a1_in1k")
    add(
        "--data",
        required=True,
        action="append",
        help="data set, may be given again: Hub id, folder, builtin:digits, or a benchmark, on the Hub or as "
        "NAME=FOLDER: imagenet-1k, imagenet-real, imagenet-v2, imagenet-a, imagenet-r, imagenet-sketch",
    )
    add("--split", default="validation", help="split to use (default: validation)")
    add("--name", help="configuration of a Hub data set that has several")
    add("--image-column", help="column of the images, where it is not clear")
    add("--label-column", help="column of the labels, where it is not clear")
    add("--teacher", metavar="MODEL", help="compare with this model: agreement, KL, CKA")
    add("--image-size", type=int, help="pixels per side, instead of each model's own")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0)
    add("--max-samples", type=int, help="look at so many images only, spread over the set")
    add("--streaming", action="store_true", help="read the data as it is needed")
    add("--label-indices", action="store_true", help="labels without names are indices into the models' classes")
    add("--trust-remote-code", action="store_true", help="let code of the models' repositories run")
    add("--allow-pickle", action="store_true", help="read weights that exist as pickles only; tensors, nothing else")
    add("--use-cpu", action="store_true")
    add("--per-class", nargs="?", const="", metavar="FILE", help="accuracy by class: a table, or a CSV file")
    add("--markdown", action="store_true", help="print tables for a README")
    add("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    return parser


def _report(
    opened: Mapping[str, EvalSet],
    results: Mapping[str, Mapping[str, Result]],
    args: argparse.Namespace,
    device: str,
) -> str:
    """Everything that is printed."""
    lines = _lines(_summary(results), args.markdown)
    notes = [f"{path}: {data.protocol}" for path, data in opened.items() if data.protocol]
    if any("images_per_second" in result.values for found in results.values() for result in found.values()):
        notes.append(f"images/s: the network alone, {device}, batches of {args.batch_size}; indicative")
    lines += ["", *(f"- {note}" if args.markdown else note for note in notes)] if notes else []
    for path, data in opened.items() if args.per_class == "" else ():
        head, *rows = _by_class(data, results[path], args.teacher)
        if len(rows) > 2 * _SHOWN_CLASSES:
            rows = [*rows[:_SHOWN_CLASSES], ["…", *[""] * (len(head) - 1)], *rows[-_SHOWN_CLASSES:]]
        lines += ["", f"{path}, top-1 % by class", "", *_lines([head, *rows], args.markdown)]
    return "\n".join(lines)


def _summary(results: Mapping[str, Mapping[str, Result]]) -> list[list[str]]:
    """One row per data set and network; columns that nobody has are left out."""
    every = [result.values for found in results.values() for result in found.values()]
    columns = [column for column in COLUMNS if any(column[0] in values for values in every)]
    rows = [["data", "model", "images", *(head for _, head, _ in columns)]]
    for data, found in results.items():
        for name, result in found.items():
            cells = [f"{result.values[key]:{form}}" if key in result.values else "" for key, _, form in columns]
            rows.append([data, name, str(int(result.values["samples"])), *cells])
    return rows


def _by_class(data: EvalSet, results: Mapping[str, Result], teacher: str | None) -> list[list[str]]:
    """Top-1 in percent by class, the largest gain of the first other network over the reference first."""
    reference = teacher or next(iter(results))
    others = [name for name in results if name != reference]
    shares = {
        name: [100.0 * right / count if count else 0.0 for right, count in result.classes]
        for name, result in results.items()
    }
    counts = [count for _, count in results[reference].classes]
    first = shares[reference]
    gains = [new - old for new, old in zip(shares[others[0]], first, strict=True)] if others else first
    names = [reference, *others]
    rows = [["class", "images", *names, *(["gain"] if others else [])]]
    for index in sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-gains[i], i)):
        cells = [f"{shares[name][index]:.2f}" for name in names]
        gain = [f"{gains[index]:+.2f}"] if others else []
        rows.append([data.source.class_names[index], str(counts[index]), *cells, *gain])
    return rows


def _lines(rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Rows of text as aligned columns, or as a Markdown table."""
    if not markdown:
        from kd_hf.report import table

        return table(rows)
    from kd_hf.card import markdown as md

    return md.table([[md.plain(cell) for cell in row] for row in rows], left=2)


def _write_files(
    opened: Mapping[str, EvalSet], results: Mapping[str, Mapping[str, Result]], args: argparse.Namespace
) -> None:
    from kd_hf.files import write_text

    if args.json:
        values = {data: {name: result.values for name, result in found.items()} for data, found in results.items()}
        write_text(args.json, json.dumps(values, indent=1) + "\n")
    if args.per_class:
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for index, (path, data) in enumerate(opened.items()):
            head, *rows = _by_class(data, results[path], args.teacher)
            writer.writerows([["data", *head]] if index == 0 else [])
            writer.writerows([path, *row] for row in rows)
        write_text(Path(args.per_class), text.getvalue())


if __name__ == "__main__":
    run_command(main)
