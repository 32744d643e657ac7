"""Train: ``python -m kd_hf.train RECIPE [key=value …]``, also under ``accelerate launch -m`` and ``torchrun -m``.

``python -m kd_hf.train --push RUN_FOLDER [hub.key=value …]`` pushes the student of a finished run to the Hub.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, is_main_process, run_command

if TYPE_CHECKING:
    from kd_hf.callbacks import TrainOutput
    from kd_hf.config import Recipe


def train_recipe(recipe: Recipe, above: tuple[str, ...] = ()) -> TrainOutput:
    """Train what a recipe names: a teacher given by `recipe:` first, then the plain twin it asks for, then the student.

    What is already trained is not trained again. A signal during one of them ends the whole.

    Args:
        recipe: the run.
        above: run folders of the recipes that need this one.
    """
    from kd_hf.assemble import plain_twin, teacher_recipes, with_trained_teachers
    from kd_hf.hub import check_token
    from kd_hf.trainer import DistillTrainer

    if recipe.train.output_dir in above:
        raise UserError(
            f"train.output_dir: '{recipe.train.output_dir}' is the run folder of a student and of its teacher's recipe"
        )
    if recipe.hub.push_to_hub and is_main_process():
        check_token(recipe.hub, Path(recipe.train.output_dir))  # now, not when a teacher has been trained for days
    needed = teacher_recipes(recipe)
    if recipe.baseline == "train":
        needed["plain twin"] = plain_twin(recipe)
    for name, other in needed.items():
        if _is_trained(other):
            continue
        _say(f"\n— training the {name} first: {other.train.output_dir}")
        output = train_recipe(other, (*above, recipe.train.output_dir))
        if output.stopped_by:
            return output
    if needed:
        _say(f"\n— training the student: {recipe.train.output_dir}")
    return DistillTrainer(with_trained_teachers(recipe)).train()


def _is_trained(recipe: Recipe) -> bool:
    """Whether the run folder holds the student of this very recipe."""
    from kd_hf.assemble import with_trained_teachers
    from kd_hf.recipe import recipe_hash, trained_hash
    from kd_hf.record import STUDENT

    return trained_hash(Path(recipe.train.output_dir) / STUDENT) == recipe_hash(with_trained_teachers(recipe))


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def main(argv: Sequence[str]) -> int:
    """Parse the command line, train, and show the result."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.train", description="Distil a student as a recipe says.")
    parser.add_argument("recipe", help="a recipe file, e.g. recipes/quickstart.yaml; with --push, a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-3")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--smoke", action="store_true", help="two steps on noise with random weights, export and reload; keeps nothing"
    )
    instead.add_argument(
        "--push", action="store_true", help="push the student of a finished run, e.g. --push RUN hub.hub_model_id=me/x"
    )
    args = parser.parse_intermixed_args(argv)  # options may stand among overrides
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a busy machine

    if args.push:
        if is_main_process():
            from kd_hf.hub import push_run

            print(f"pushed to {push_run(args.recipe, args.overrides)}")
        return 0

    from kd_hf.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.smoke:
        from kd_hf.smoke import smoke

        with tempfile.TemporaryDirectory() as folder:
            _say(smoke(recipe, Path(folder)))
        return 0
    output = train_recipe(recipe)
    if is_main_process() and not output.stopped_by:
        from kd_hf.report import finish_report

        print(finish_report(recipe))
    return 0


if __name__ == "__main__":
    run_command(main)
