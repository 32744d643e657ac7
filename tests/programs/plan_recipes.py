"""Plan every recipe on the meta device: ``python -m tests.programs.plan_recipes [FILE …]`` prints a row for each.

A recipe that is a table of runs has a row for each of its cells; by default that takes a quarter of an hour.

Needs neither weights nor data. The exit code is 1 when a recipe cannot be planned.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kd_hf.distillation.summary import shown_size
from kd_hf.plan.describe import plan_recipe
from kd_hf.recipe.read import load_recipe
from tests.programs.recipe_index import FOLDER, cells_of, processes


def plan_file(path: Path, *overrides: str) -> dict:
    """The plan of a recipe at the number of processes that its header says."""
    return plan_recipe(load_recipe(path, overrides), processes(path))


def describe(plan: dict) -> str:
    """Networks, trained parameters and global batch in one line."""
    networks = ", ".join(
        f"{name} {net['parameters'] / 1e6:.2f} M at {shown_size(net)}" for name, net in plan["networks"].items()
    )
    return f"{networks}; trains {plan['trained_parameters'] / 1e6:.2f} M, {plan['global_batch']} images a step"


def main(names: list[str]) -> int:
    """Plan the named recipes, by default all."""
    failed = 0
    files = [Path(name) for name in names] or [*sorted(FOLDER.glob("*.yaml")), *sorted(FOLDER.glob("[!_]*/*.yaml"))]
    for path, cell in [(file, cell) for file in files for cell in cells_of(file) or ("",)]:
        start = time.perf_counter()
        try:
            line = describe(plan_file(path, *([f"cell={cell}"] if cell else [])))
        except Exception as error:  # a defect of one recipe must not hide the others
            failed += 1
            line = f"FAILED: {type(error).__name__}: {error}"
        print(f"{f'{path.stem} {cell}':45} {time.perf_counter() - start:4.1f} s  {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
