"""Evaluate: ``python -m kd_hf.eval MODEL … --data PATH [--teacher MODEL]`` → a table, or JSON.

A model is a Hub id, a folder, a run folder, or a pretrained timm name. Each is shown the images in its own
preprocessing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_hf.errors import UserError, is_main_process, run_command


def evaluate_models(
    models: Sequence[str],
    teacher: str | None,
    data: dict[str, Any],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_samples: int | None = None,
    use_cpu: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Top-1, top-5 and, beside a teacher, agreement for each model, in percent.

    Args:
        models: what to measure.
        teacher: the model that agreement is measured against; it is measured too.
        data: keys of a recipe's `data` block.
        batch_size: images per process.
        workers: loader processes.
        max_samples: stop after so many images, spread over the set.
        use_cpu: stay on the CPU.
        progress: show a bar.
    """
    from pydantic import ValidationError

    from kd_hf.config import DataConfig, TrainConfig
    from kd_hf.data.source import open_source
    from kd_hf.evaluation import measure, predictor
    from kd_hf.models.load import load_model
    from kd_hf.models.taps import TappedModel
    from kd_hf.runtime import build_accelerator, set_cpu_threads

    try:
        source = open_source(DataConfig.model_validate(data), "eval")
    except ValidationError as error:
        raise UserError(f"--data: {error.errors()[0]['msg']}") from None
    accelerator = build_accelerator(TrainConfig(output_dir=".", use_cpu=use_cpu))
    set_cpu_threads("auto", accelerator.num_processes)
    predictors, views = {}, {}
    for name in dict.fromkeys([*models, *([teacher] if teacher else [])]):
        handle = load_model(name, pretrained=True, image_size=data.get("image_size"))
        if handle.info.num_classes != source.num_classes:
            raise UserError(
                f"{name} has {handle.info.num_classes} classes, {source.describe()} has {source.num_classes}"
            )
        tapped = TappedModel(handle, handle.info, ()).to(accelerator.device)
        predictors[name], views[name] = predictor(tapped, accelerator), handle.info.preprocessing
    return measure(
        predictors,
        views,
        source,
        accelerator,
        batch_size=batch_size,
        workers=workers,
        max_samples=max_samples,
        reference=teacher,
        progress=progress and accelerator.is_main_process,
    )


def main(argv: Sequence[str]) -> int:
    """Parse the command line, evaluate, print."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.eval", description="Evaluate models on a data set.")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hub id, folder, run folder or timm name")
    parser.add_argument("--data", required=True, help="data set: Hub id, folder, or builtin:digits")
    parser.add_argument("--split", default="validation", help="split to use (default: validation)")
    parser.add_argument("--teacher", help="report agreement with this model")
    parser.add_argument("--image-size", type=int, help="pixels per side, instead of each model's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--max-samples", type=int)
    parser.add_argument("--streaming", action="store_true", help="read the data as it is needed")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    args = parser.parse_args(argv)
    data = {"path": args.data, "eval_split": args.split, "streaming": args.streaming}
    if args.image_size:
        data["image_size"] = args.image_size
    values = evaluate_models(
        args.models,
        args.teacher,
        data,
        batch_size=args.batch_size,
        workers=args.workers,
        max_samples=args.max_samples,
        use_cpu=args.use_cpu,
        progress=True,
    )
    if is_main_process():
        print(_table(values))
        if args.json:
            from kd_hf.files import write_text

            write_text(args.json, json.dumps(values, indent=1) + "\n")
    return 0


def _table(values: dict[str, dict[str, float]]) -> str:
    from kd_hf.report import table

    columns = [key for key in ("top1", "top5", "agreement") if any(key in row for row in values.values())]
    rows = [
        (name, f"{int(row['samples'])} images", *(f"{row[key]:.2f}" if key in row else "" for key in columns))
        for name, row in values.items()
    ]
    return "\n".join(table([("model", "", *columns), *rows]))


if __name__ == "__main__":
    run_command(main)
