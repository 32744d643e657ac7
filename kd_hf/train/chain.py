"""A recipe with all it needs: its teachers and its plain twin are trained first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, is_main_process

if TYPE_CHECKING:
    from kd_hf.recipe.config import Recipe
    from kd_hf.train.callbacks import TrainOutput

_TWIN = "plain twin"


def train_recipe(recipe: Recipe, above: tuple[str, ...] = ()) -> TrainOutput:
    """Train what a recipe names: a teacher given by `recipe:` first, then the plain twin it asks for, then the student.

    What is already trained is not trained again; what another run is training is waited for. A signal during one of
    them ends the whole.

    Args:
        recipe: the run.
        above: run folders of the recipes that need this one.

    Raises:
        UserError: anything that cannot be had; another run in the student's own folder.
    """
    from kd_hf.hub.publisher import check_token
    from kd_hf.process import meet
    from kd_hf.recipe.variants import plain_twin, teacher_recipes, with_trained_teachers
    from kd_hf.run.lock import RunLock, locked
    from kd_hf.run.ownership import check_own
    from kd_hf.text.terminal import say
    from kd_hf.train.trainer import DistillTrainer

    folder = Path(recipe.train.output_dir)
    if recipe.train.output_dir in above:
        raise UserError(f"train.output_dir: '{folder}' is the run folder of a student and of its teacher's recipe")
    if recipe.hub.push_to_hub and is_main_process():
        check_token(recipe.hub, folder)  # now, not when a teacher has been trained for days
    needed = teacher_recipes(recipe)
    if recipe.baseline == "train":
        needed[_TWIN] = plain_twin(recipe)
    meet(recipe.train.use_cpu)
    check_own(folder)
    with locked(RunLock(folder), patient=bool(above)):
        for name, other in needed.items():
            output = _train_first(name, other, recipe, above)
            if output is not None and output.stopped_by:
                return output
        if needed:
            say(f"\n— training the student: {folder}")
        return DistillTrainer(with_trained_teachers(recipe)).train()


def _train_first(name: str, other: Recipe, recipe: Recipe, above: tuple[str, ...]) -> TrainOutput | None:
    """Train what a student needs; None where it is trained already."""
    from kd_hf.process import agreed
    from kd_hf.recipe.variants import with_trained_teachers
    from kd_hf.run.folder import START_OVER, OtherRun, is_trained
    from kd_hf.text.terminal import say

    if agreed(lambda: is_trained(with_trained_teachers(other))):
        return None
    say(f"\n— training the {name} first: {other.train.output_dir}")
    try:
        return train_recipe(other, (*above, recipe.train.output_dir))
    except OtherRun as error:
        teachers = recipe.all_teachers()
        if name not in teachers:
            raise
        file = teachers[name].recipe  # the student's own overrides do not reach it
        raise UserError(
            f"{error.what}; choose another train.output_dir in {file}, or train that anew: "
            f"`python -m kd_hf.train {file} {START_OVER}`"
        ) from None
