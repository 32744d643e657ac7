"""The tasks there are, by the Hub's pipeline tags, and where each is defined; nothing of a task is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from kd_hf.errors import UserError, nearest

ENTRY_POINTS = "kd_hf.tasks"
DEFAULT = "image-classification"


@dataclass(frozen=True)
class TaskEntry:
    """What must be known of a task to read a recipe.

    Args:
        place: ``module:Class`` of its :class:`kd_hf.tasks.base.Task`.
        loss: the method that the block `task` of a recipe means: its ordinary loss on labels.
        methods: its own methods, name → module. Empty where the methods of :mod:`kd_hf.methods` serve it.
        unlabelled: whether training images may lack labels.
    """

    place: str
    loss: str = "task"
    methods: Mapping[str, str] = field(default_factory=dict)
    unlabelled: bool = True


BUILT_IN: Mapping[str, TaskEntry] = {
    DEFAULT: TaskEntry("kd_hf.tasks.classification:Classification"),
    "object-detection": TaskEntry(
        "kd_hf.detection.task:Detection",
        "detection",
        {
            "detection": "kd_hf.detection.methods.detection",
            "vidt_tokens": "kd_hf.detection.methods.token_matching",
            "vkd_tokens": "kd_hf.detection.methods.token_matching",
            "detr_tokens": "kd_hf.detection.methods.detr_tokens",
            "detr_kd": "kd_hf.detection.methods.detr_kd",
        },
        unlabelled=False,
    ),
}


def task_names() -> tuple[str, ...]:
    """Names of all tasks: ours, and those other packages register."""
    return tuple(sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))}))


@cache
def task_entry(name: str) -> TaskEntry:
    """Look a task up.

    Raises:
        UserError: there is none of that name, with the nearest; another package's does not load; or another package
            takes a name that is there without it.
    """
    registered = sorted(entry_points(group=ENTRY_POINTS, name=name), key=_package)
    if registered and name in BUILT_IN:
        raise UserError(
            f"the task '{name}' is kd_hf's own, but the package {_package(registered[0])} registers another one "
            f"({registered[0].value}) in the entry points {ENTRY_POINTS}; rename it there, or uninstall the package"
        )
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not registered:
        raise UserError(f"task: unknown task '{name}'.{nearest(name, task_names())}")
    if len(registered) > 1:
        packages = " and ".join(_package(entry) for entry in registered[:2])
        raise UserError(f"two packages register a task '{name}': {packages}; uninstall one")
    return _loaded(registered[0])


def _loaded(entry: EntryPoint) -> TaskEntry:
    """The entry of another package's class, which says the rest itself."""
    try:
        kind: Any = entry.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the entry point '{entry.name}' of group {ENTRY_POINTS} ({entry.value}) does not load: {error}"
        ) from error
    # the Task class itself lies rooms above, so it is known by what it says
    says = all(hasattr(kind, name) for name in ("pipeline_tag", "loss", "methods", "unlabelled"))
    if not says or kind.pipeline_tag != entry.name:
        raise UserError(
            f"the entry point '{entry.name}' of group {ENTRY_POINTS} ({entry.value}) is no Task class whose "
            f"pipeline_tag is '{entry.name}'"
        )
    return TaskEntry(entry.value, kind.loss, kind.methods, kind.unlabelled)


def _package(entry: EntryPoint) -> str:
    return f"'{entry.dist.name if entry.dist else entry.module}'"
