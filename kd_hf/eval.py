"""Evaluate: ``python -m kd_hf.eval MODEL … --data DATA … [--teacher MODEL | --boxes]`` → a table, or JSON.

A model is a Hub id, a folder, a run folder, or a pretrained timm name. Each is shown the images in its own
preprocessing. Data is what a recipe's `data.path` can be, or one of :mod:`kd_hf.benchmarks`, such as ``imagenet-a``
or ``imagenet-a=/path``. With ``--boxes`` models are detectors, and measured by COCO's average precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, is_main_process, run_command

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.benchmarks import ClassMap, EvalSet
    from kd_hf.detection.average_precision import Results
    from kd_hf.evaluation import Run, Stopwatch, Subject
    from kd_hf.metrics import Meter
    from kd_hf.models.handle import ModelHandle

Columns = Sequence[tuple[str, str, str]]
"""Key of the values, head of the column, format."""
COLUMNS: Columns = (
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
_BOX_OPTIONS = {  # the same for what is in its `boxes`
    "boxes.augment.eval_size": "--eval-size",
    "boxes.augment.max_size": "--max-size",
    "boxes.augment.multiple_of": "--multiple-of",
    "boxes.augment": "--eval-size, --max-size",
    "boxes.box_format": "--box-format",
    "boxes.annotations": "--annotations",
    "boxes.images": "--images",
}
_ONLY_BOXES = ("eval_size", "max_size", "multiple_of", "box_format", "annotations", "images", "save_detections")
_ONLY_CLASSES = ("teacher", "image_size", "label_indices", "per_class")
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
        with _told_by_option():
            return open_eval_set(DataConfig.model_validate(data))
    except ValidationError as error:
        raise UserError(f"--data: {error.errors()[0]['msg']}") from None


@contextmanager
def _told_by_option() -> Iterator[None]:
    """Errors name the option where they would name the recipe's key."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for key, option in {**_BOX_OPTIONS, **_OPTIONS}.items():
            text = text.replace(f"data.{key}", option)
        raise type(error)(text) from error


# --- the command -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Parse the command line, evaluate, print."""
    args = _parser().parse_args(argv)
    _check_options(args)
    args.batch_size = args.batch_size or (8 if args.boxes else 64)
    if args.boxes:
        return _evaluate_boxes(args)
    try:
        return _evaluate_classes(args)
    except UserError:
        from kd_hf.detection.evaluate import is_detector

        detector = next((name for name in args.models if is_detector(name)), None)
        if detector is None:
            raise
        raise UserError(f"{detector} is a detector: add --boxes") from None


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    idle = next((name for name in (_ONLY_CLASSES if args.boxes else _ONLY_BOXES) if _is_set(args, name)), None)
    if idle is not None:
        option = "--" + idle.replace("_", "-")
        raise UserError(f"{option} is not for detectors (--boxes)" if args.boxes else f"{option} needs --boxes")
    if args.save_detections and (len(args.models), len(args.data)) != (1, 1):
        raise UserError(
            f"--save-detections: COCO's format holds what one model finds in one data set; here are {len(args.models)} "
            f"and {len(args.data)}"
        )


def _is_set(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None and getattr(args, name) is not False  # 0 is a number that was given


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of a recipe's `data` block but its path."""
    return {key: getattr(args, option.removeprefix("--").replace("-", "_")) for key, option in _OPTIONS.items()}


def _evaluate_classes(args: argparse.Namespace) -> int:
    # before the networks: a wrong path shows at once
    opened = {path: _open_data(_data_options(args) | {"path": path}) for path in args.data}
    options = {"image_size": args.image_size, "allow_pickle": args.allow_pickle}
    options["trust_remote_code"] = args.trust_remote_code
    networks = Networks(args.models, args.teacher, eval_accelerator(args.use_cpu), **options)
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


def _evaluate_boxes(args: argparse.Namespace) -> int:
    from kd_hf.detection.average_precision import need_pycocotools

    need_pycocotools()
    from kd_hf.detection.evaluate import COLUMNS as BOX_COLUMNS
    from kd_hf.detection.evaluate import Detectors, box_config, write_detections
    from kd_hf.detection.source import open_boxes

    common = _data_options(args) | {"boxes": _box_options(args)}
    with _told_by_option():
        configs = {path: box_config(common | {"path": path}) for path in args.data}
        opened = {path: open_boxes(cfg, "eval", cfg.boxes) for path, cfg in configs.items()}
    options = {"allow_pickle": args.allow_pickle, "trust_remote_code": args.trust_remote_code}
    detectors = Detectors(args.models, eval_accelerator(args.use_cpu), configs[args.data[0]].boxes, **options)
    results: dict[str, dict[str, Result]] = {}
    kept: dict[str, Results] = {}
    for path, source in opened.items():
        measured = detectors.evaluate(
            source,
            batch_size=args.batch_size,
            workers=args.workers,
            max_samples=args.max_samples,
            keep=kept,
            progress=True,
        )
        results[path] = {name: Result(values) for name, values in measured.items()}
    if is_main_process():
        device = str(detectors.accelerator.device.type)
        print(_report({}, results, args, device, BOX_COLUMNS, detectors.notes()))
        _write_files({}, results, args)
        if args.save_detections:
            write_detections(args.save_detections, kept[args.models[0]])
    return 0


def _box_options(args: argparse.Namespace) -> dict[str, Any]:
    """`boxes` of a recipe's `data` block, with what was given only."""
    augment = {key: getattr(args, key) for key in ("eval_size", "max_size", "multiple_of") if _is_set(args, key)}
    files = {key: {args.split: getattr(args, key)} for key in ("annotations", "images") if _is_set(args, key)}
    return {"augment": augment, **files, **({"box_format": args.box_format} if args.box_format else {})}


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
    add("--batch-size", type=int, help="images per process (default: 64, with --boxes 8)")
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
    _add_box_options(parser.add_argument_group("detectors"))
    return parser


def _add_box_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--boxes", action="store_true", help="models are detectors, data has boxes: COCO's average precision, recall")
    add("--eval-size", type=int, help="pixels of an image's shortest side (default: the model's own, or 800)")
    add("--max-size", type=int, help="of its longest side at most (default: the model's own, or 1333)")
    add("--multiple-of", type=int, help="sides are rounded down to multiples of this (default: 16)")
    add("--box-format", choices=("xywh", "xyxy"), help="of Parquet files and tables (default: xywh)")
    add("--annotations", metavar="FILE", help="COCO's JSON file (default: annotations/instances_SPLIT.json)")
    add("--images", metavar="FOLDER", help="of its images (default: SPLIT), both relative to --data")
    add("--save-detections", type=Path, metavar="FILE", help="write COCO's JSON of results, classes as in --data")


def _report(
    opened: Mapping[str, EvalSet],
    results: Mapping[str, Mapping[str, Result]],
    args: argparse.Namespace,
    device: str,
    columns: Columns = COLUMNS,
    notes: Sequence[str] = (),
) -> str:
    """Everything that is printed."""
    lines = _lines(_summary(results, columns), args.markdown)
    notes = [*notes, *(f"{path}: {data.protocol}" for path, data in opened.items() if data.protocol)]
    if any("images_per_second" in result.values for found in results.values() for result in found.values()):
        notes.append(f"images/s: the network alone, {device}, batches of {args.batch_size}; indicative")
    lines += ["", *(f"- {note}" if args.markdown else note for note in notes)] if notes else []
    for path, data in opened.items() if args.per_class == "" else ():
        head, *rows = _by_class(data, results[path], args.teacher)
        if len(rows) > 2 * _SHOWN_CLASSES:
            rows = [*rows[:_SHOWN_CLASSES], ["…", *[""] * (len(head) - 1)], *rows[-_SHOWN_CLASSES:]]
        lines += ["", f"{path}, top-1 % by class", "", *_lines([head, *rows], args.markdown)]
    return "\n".join(lines)


def _summary(results: Mapping[str, Mapping[str, Result]], known: Columns) -> list[list[str]]:
    """One row per data set and network; of the known columns, those that nobody has are left out."""
    every = [result.values for found in results.values() for result in found.values()]
    columns = [column for column in known if any(column[0] in values for values in every)]
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
