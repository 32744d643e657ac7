"""Bench: ``python -m kd_hf.bench RECIPE [key=value …]``, also under ``accelerate launch -m``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from kd_hf.errors import UserError, is_main_process, run_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.bench",
        description="Show where the time of a recipe's training step goes, against the bare networks. "
        "Needs neither weights nor, if need be, data.",
    )
    parser.add_argument("recipe", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.bf16=true")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of everything (default: 7)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images a step and process (default: the recipe's, on a CPU at most 8)"
    )
    parser.add_argument("--against", choices=["plain"], help="also steps of the same student without distillation")
    parser.add_argument("--memory", action="store_true", help="also peak memory, in processes of their own")
    parser.add_argument("--bf16-teacher", action="store_true", help="also the teacher in bfloat16 against float32")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", metavar="FILE", help="draw the parts as stacked bars, e.g. step.png")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, show."""
    args = _parser().parse_intermixed_args(argv)
    for name in ("rounds", "batch"):
        given = getattr(args, name)
        if given is not None and given < 1:
            raise UserError(f"--{name}: expected 1 or more (got {given})")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a busy machine

    from kd_hf.recipe.read import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)

    from kd_hf.bench.show import check_picture, describe, draw
    from kd_hf.files import write_text

    if args.plot:
        check_picture(Path(args.plot))

    from kd_hf.bench.measure import Options, bench_recipe

    options = Options(args.rounds, args.batch, args.against == "plain", args.memory, args.bf16_teacher)
    found = {"recipe": args.recipe, "overrides": args.overrides, **bench_recipe(recipe, options)}
    if is_main_process():
        print(describe(found))
        if args.json:
            write_text(Path(args.json), json.dumps(found, indent=1) + "\n")
        if args.plot:
            draw(found, Path(args.plot))
    return 0


if __name__ == "__main__":
    run_command(main)
