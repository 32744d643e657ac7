"""Explain a recipe without training it: ``python -m kd_hf.plan RECIPE [key=value …] [--json | --schema]``.

Networks are built on the meta device: no weights, no data, no network access for architectures that are known here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from kd_hf.errors import UserError, run_command
from kd_hf.plan.describe import describe, plan_recipe


def main(argv: Sequence[str]) -> int:
    """Parse the command line and print the plan."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.plan", description="Explain a recipe without training.")
    parser.add_argument("recipe", nargs="?", help="a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, default=1, help="how many processes will be launched")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipe files, for editors")
    args = parser.parse_intermixed_args(argv)

    from kd_hf.recipe.read import load_recipe
    from kd_hf.recipe.resolved import recipe_schema

    if args.schema:
        print(json.dumps(recipe_schema(), indent=1))
        return 0
    if args.recipe is None:
        raise UserError("which recipe? Give a file, e.g. recipes/quickstart.yaml, or --schema")
    if args.processes < 1:
        raise UserError(f"--processes: expected 1 or more (got {args.processes})")
    plan = plan_recipe(load_recipe(args.recipe, args.overrides), args.processes)
    print(json.dumps(plan, indent=1) if args.json else describe(plan))
    return 0


if __name__ == "__main__":
    run_command(main)
