"""Which task a recipe names. A task is found by name, as a method is: its package may lie above this room."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kd_hf.recipe.config import Recipe
from kd_hf.task_table import task_entry

if TYPE_CHECKING:
    from kd_hf.tasks.base import Task


def open_task(recipe: Recipe) -> Task:
    """The task of a recipe; made once for a run and handed down."""
    module, name = task_entry(recipe.task).place.split(":")
    task: Task = getattr(import_module(module), name)(recipe)
    return task
