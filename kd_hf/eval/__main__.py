"""Evaluate: ``python -m kd_hf.eval MODEL … --data DATA … [--teacher MODEL | --boxes]`` → a table, or JSON.

A model is a Hub id, a folder, a run folder, or a pretrained timm name. Each is shown the images in its own
preprocessing. Data is what a recipe's `data.path` can be, or one of :mod:`kd_hf.eval.benchmarks`, such as
``imagenet-a`` or ``imagenet-a=/path``. With ``--boxes`` models are detectors, and measured by COCO's average precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, is_main_process, run_command
from kd_hf.eval.networks import OPTIONS, Networks, Result, eval_accelerator, naming_options, open_data
from kd_hf.eval.tables import report, write_files

if TYPE_CHECKING:
    from kd_hf.detection.metrics.average_precision import Results

_ONLY_BOXES = ("eval_size", "max_size", "multiple_of", "box_format", "annotations", "images", "save_detections")
_ONLY_CLASSES = ("teacher", "image_size", "label_indices", "per_class")


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
        from kd_hf.eval.detectors import is_detector

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
    return {key: getattr(args, option.removeprefix("--").replace("-", "_")) for key, option in OPTIONS.items()}


def _evaluate_classes(args: argparse.Namespace) -> int:
    # before the networks: a wrong path shows at once
    opened = {path: open_data(_data_options(args) | {"path": path}) for path in args.data}
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
        notes = [f"{path}: {data.source.note}" for path, data in opened.items() if data.source.note]
        print(report(opened, results, args, str(networks.accelerator.device.type), notes=notes))
        write_files(opened, results, args)
    return 0


def _evaluate_boxes(args: argparse.Namespace) -> int:
    from kd_hf.detection.metrics.average_precision import need_pycocotools

    need_pycocotools()
    from kd_hf.detection.data.opening import open_boxes
    from kd_hf.eval.detectors import COLUMNS as BOX_COLUMNS
    from kd_hf.eval.detectors import Detectors, box_config, write_detections

    common = _data_options(args) | {"boxes": _box_options(args)}
    with naming_options():
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
        notes = [f"{path}: {source.note}" for path, source in opened.items() if source.note]
        print(report({}, results, args, device, BOX_COLUMNS, [*detectors.notes(), *notes]))
        write_files({}, results, args)
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


if __name__ == "__main__":
    run_command(main)
