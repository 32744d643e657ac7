"""Recipes made from a recipe: those of its teachers, its plain twin, and itself with other teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kd_hf.layout import PLAIN
from kd_hf.recipe.config import TASK, HubConfig, ModelConfig, Recipe
from kd_hf.task_table import task_entry

GIVEN_NETWORK = "given:"  # begins the name of a network that a recipe can only name


def teacher_recipes(recipe: Recipe, stored: bool = False) -> dict[str, Recipe]:
    """Recipes of the teachers that are to be trained by this project, by teacher name.

    Args:
        recipe: of the student.
        stored: also those of teachers whose outputs are stored, which need not be trained here.
    """
    from kd_hf.recipe.read import load_recipe

    named = {name: cfg for name, cfg in recipe.all_teachers().items() if stored or not cfg.store}
    return {name: load_recipe(cfg.recipe) for name, cfg in named.items() if cfg.recipe}


def with_trained_teachers(recipe: Recipe) -> Recipe:
    """The recipe with every `teacher.recipe` replaced by the folder its student lies in."""
    folders = {name: trained.train.output_dir for name, trained in teacher_recipes(recipe, stored=True).items()}
    return _replace_teachers(recipe, {name: {"model": folder} for name, folder in folders.items()})


def with_untrained_teachers(recipe: Recipe) -> Recipe:
    """The recipe with every `teacher.recipe` replaced by the network that recipe trains, without its weights.

    A stored teacher becomes the network whose outputs it holds.
    """
    students = {name: other.student for name, other in teacher_recipes(recipe, stored=True).items()}
    same = (*ModelConfig.model_fields,)
    changes = {name: {key: getattr(student, key) for key in same} for name, student in students.items()}
    return without_stores(_replace_teachers(recipe, changes))


def without_stores(recipe: Recipe) -> Recipe:
    """The recipe with networks in the place of stored teachers."""
    change = {"store": None}
    teachers = {name: cfg.model_copy(update=change) for name, cfg in recipe.teachers.items()}
    teacher = recipe.teacher.model_copy(update=change) if recipe.teacher else None
    return recipe.model_copy(update={"teacher": teacher, "teachers": teachers})


def _replace_teachers(recipe: Recipe, changes: Mapping[str, Mapping[str, object]]) -> Recipe:
    found = {
        name: cfg.model_copy(update={**changes[name], "recipe": None}) if name in changes else cfg
        for name, cfg in recipe.all_teachers().items()
    }
    return recipe.model_copy(update={"teacher": found["teacher"]} if recipe.teacher else {"teachers": found})


def plain_twin(recipe: Recipe) -> Recipe:
    """The same student, data, seed and steps without teacher and methods, on labelled images only."""
    task = recipe.methods.get(TASK)
    kept = {TASK: task.model_copy(update={"weight": 1.0, "until": None})} if task else {}
    folder = str(Path(recipe.train.output_dir) / PLAIN)
    resume = False if recipe.train.resume_from_checkpoint is False else None  # a checkpoint is the student's
    return recipe.model_copy(
        update={
            "teacher": None,
            "teachers": {},
            "baseline": None,
            "cell": None,
            "published": None,
            "methods": kept,
            "data": recipe.data.model_copy(update={"unlabelled": "drop"} if task_entry(recipe.task).unlabelled else {}),
            "eval": recipe.eval.model_copy(update={"report": False}),
            "hub": HubConfig(),
            "train": recipe.train.model_copy(update={"output_dir": folder, "resume_from_checkpoint": resume}),
        }
    )
