"""What distillation does to a small detector.

``python -m tests.programs.detection_study FOLDER [--seeds N] [--steps N]``.

Drawn scenes of coloured rectangles; a ViDT learns them, then a smaller one with and without its tokens (VkD), over
seeds. Prints average precision on scenes that nobody was trained on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_hf.recipe.read import make_recipe
from kd_hf.train.trainer import DistillTrainer
from tests.detection.scenes import scene, write_parquet
from tests.runs import merged

TRAINED, HELD_OUT = 96, 96
SIZES = {"window_size": 4, "num_queries": 12, "d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
MORE = {"decoder_n_points": 2, "dropout": 0.0, "decoder_layers": 2, "num_heads": [1, 2, 2, 4]}
STUDENT = {**SIZES, **MORE, "embed_dim": 8, "depths": [1, 1, 1, 1]}
TEACHER = {**SIZES, **MORE, "embed_dim": 24, "depths": [1, 1, 2, 1]}


def recipe(data: Path, output: Path, *blocks: dict[str, Any]) -> Any:
    """A short run of a tiny ViDT on the scenes."""
    sizes = {"sizes": [64], "eval_size": 64, "max_size": 160, "crop": 0.0}
    train = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "warmup_steps": 50,
        "max_grad_norm": 1.0,
        "logging_steps": 100,
        "eval_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "cpu_threads": 1,
    }
    base = {"data": {"path": str(data), "boxes": {"augment": sizes}}, "train": train, "eval": {"report": False}}
    return make_recipe(merged(base, *blocks), "the study")


def main(argv: Sequence[str]) -> int:
    """Train everything, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.detection_study", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for data and runs; made when it is missing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    data = args.folder / "scenes"
    for split, start, count in (("train", 0, TRAINED), ("validation", 10_000, HELD_OUT)):
        scenes = [scene(start + index, least=24) for index in range(count)]
        write_parquet(data / "data" / f"{split}-0.parquet", scenes, start=start)
    network = {"model": "kd_hf/vidt_nano"}
    taught = recipe(data, args.folder / "teacher", {"student": {**network, "kwargs": TEACHER}})
    taught = taught.model_copy(update={"train": taught.train.model_copy(update={"max_steps": 2 * args.steps})})
    teacher = DistillTrainer(taught).train().metrics["eval_ap"]
    distilled = {"teacher": {"model": str(args.folder / "teacher")}, "methods": {"vkd_tokens": {}}}
    found: dict[str, list[float]] = {"plain": [], "distilled": []}
    for seed in range(args.seeds):
        for name, blocks in (("plain", {}), ("distilled", distilled)):
            run = {"student": {**network, "kwargs": STUDENT}, "train": {"seed": seed, "max_steps": args.steps}}
            made = recipe(data, args.folder / f"{name}{seed}", run, blocks)
            found[name].append(DistillTrainer(made).train().metrics["eval_ap"])
    print(f"\nteacher: AP {teacher:.2f} on {HELD_OUT} scenes that were not trained on")
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:10} AP {each}  mean {statistics.mean(values):.2f} std {spread:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
