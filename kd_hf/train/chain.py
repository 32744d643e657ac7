"""A recipe with all it needs: its teachers and its plain twin are trained first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, is_main_process

if TYPE_CHECKING:
    from kd_hf.recipe.config import Recipe
    from kd_hf.train.callbacks import TrainOutput


def train_recipe(recipe: Recipe, above: tuple[str, ...] = ()) -> TrainOutput:
    """Train what a recipe names: a teacher given by `recipe:` first, then the plain twin it asks for, then the student.

    What is already trained is not trained again. A signal during one of them ends the whole.

    Args:
        recipe: the run.
        above: run folders of the recipes that need this one.
    """
    from kd_hf.hub.publisher import check_token
    from kd_hf.recipe.variants import plain_twin, teacher_recipes, with_trained_teachers
    from kd_hf.train.trainer import DistillTrainer

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
    from kd_hf.layout import STUDENT
    from kd_hf.recipe.resolved import recipe_hash, trained_hash
    from kd_hf.recipe.variants import with_trained_teachers

    return trained_hash(Path(recipe.train.output_dir) / STUDENT) == recipe_hash(with_trained_teachers(recipe))


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)
