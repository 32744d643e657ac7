"""What will be trained, in a few lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_hf.distillation.assembly import Assembly
    from kd_hf.distillation.choices import Choice


def shown_size(facts: Mapping[str, Any]) -> str:
    """A network's image size in words, from its entry in a plan's `networks`."""
    return f"{facts['image_size']} px" if "image_size" in facts else f"{facts['shortest_side']} px shortest side"


def announce(parts: Assembly, data: Mapping[str, str], notes: Mapping[str, str], steps: str) -> list[str]:
    """The first lines of a run: what will be trained, on what, for how long.

    Args:
        parts: what was built.
        data: a line about the images of each split, `train` and `eval`.
        notes: by the same names, what was left out or changed in reading them, where anything was.
        steps: a line about the length.
    """
    recipe, train, views = parts.recipe, parts.recipe.train, parts.views()
    networks = {"student": parts.student.info, **{name: handle.info for name, handle in parts.teachers.items()}}
    losses = (f"{choice.name} × {_weight_text(choice)}" for choice in parts.choices)
    saved = {"epoch": "every epoch", "steps": f"every {train.save_steps} steps", "no": "not saved"}[train.save_strategy]
    lines = [
        *(
            f"{name:8} {info.name} ({info.parameters / 1e6:.2f} M parameters"
            + (f", {shown_size(parts.task.size_of(views[name]))})" if name in views else ")")
            for name, info in networks.items()
        ),
        *(f"{name:8} {teacher.describe()}" for name, teacher in parts.stored.items()),
        f"losses   {', '.join(losses)}",
        f"data     {data['train']}",
        *(f"{'':8} {notes[split]}" for split in ("train",) if split in notes),
        f"random   {', '.join(parts.task.drawn(parts.needs_strong)) or 'nothing'}",
        f"held out {data['eval']}",
        *(f"{'':8} {notes[split]}" for split in ("eval",) if split in notes),
        f"steps    {steps}",
        f"optim    {train.optim}, learning rate {train.learning_rate:g}, {train.lr_scheduler_type}",
        f"folder   {train.output_dir}, checkpoints {saved}",
    ]
    if recipe.hub.push_to_hub:
        lines.append(f"hub      {recipe.hub.hub_model_id or 'your account'}, strategy {recipe.hub.hub_strategy}")
    return lines


def _weight_text(choice: Choice) -> str:
    return f"{choice.weight:g}" if isinstance(choice.weight, float) else "a schedule"
