"""The quick start over several seeds: ``python -m tests.programs.quickstart_study [FOLDER] [--seeds 5]``.

One teacher; for every seed a plain and a distilled student with the same network, steps and data. Prints the table
that the README shows; finished runs in FOLDER are read, not repeated.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from kd_hf.recipe.read import load_recipe
from kd_hf.run.log import read_log
from kd_hf.text.terminal import table
from kd_hf.train.chain import train_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def last_top1(folder: Path) -> float:
    """The last measured top-1 of a run, in percent."""
    return [line["eval_top1"] for line in read_log(folder) if "eval_top1" in line][-1]


def study(folder: Path, seeds: int) -> dict[str, list[float]]:
    """Top-1 by kind of student, one number per seed."""
    found: dict[str, list[float]] = {"plain": [], "distilled": []}
    for seed in range(seeds):
        output = folder / f"seed{seed}"
        train_recipe(load_recipe(RECIPE, [f"train.seed={seed}", f"train.output_dir={output}"]))
        found["plain"].append(last_top1(output / "plain"))
        found["distilled"].append(last_top1(output))
    return found


def describe(values: dict[str, list[float]]) -> str:
    """Every seed, mean and standard deviation over seeds."""
    count = max(len(numbers) for numbers in values.values())
    rows: list[tuple[str, ...]] = [("student", f"top-1 %, seeds 0–{count - 1}", "mean", "std")]
    for name, numbers in values.items():
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        each = " ".join(f"{number:.2f}" for number in numbers)
        rows.append((name, each, f"{statistics.mean(numbers):.2f}", f"{spread:.2f}"))
    return "\n".join(table(rows))


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.quickstart_study")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/quickstart_study"))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    print(describe(study(args.folder, args.seeds)))


if __name__ == "__main__":
    main()
