"""Which task a recipe names. A task is found by name, as a method is: its package lies above this room."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kd_hf.recipe.config import Recipe

if TYPE_CHECKING:
    from kd_hf.tasks.base import Task

# what the Hub calls it → its class
_TASKS = {
    "image-classification": "kd_hf.tasks.classification:Classification",
    "object-detection": "kd_hf.detection.task:Detection",
}


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe's data is labelled for."""
    module, name = _TASKS["image-classification" if recipe.data.boxes is None else "object-detection"].split(":")
    task: Task = getattr(import_module(module), name)()
    return task
