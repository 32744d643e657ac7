"""What a run shows a person: the closing text of the command line, and a page of numbers and pictures.

``report/`` of a run folder holds ``index.html``, which needs no other file, and its pictures as files of their own:
``losses.png``, ``accuracy.png``, ``schedule.png``, ``classes.png``, ``cka.png``, ``attention.png`` and
``disagreements.png``, for detectors ``detections.png`` in place of the last four, as far as the run gives them.
``python -m kd_hf.report RUN`` writes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kd_hf.hub.artefact import load_lines
from kd_hf.layout import PAGE
from kd_hf.report.facts import about_labels
from kd_hf.report.rows import networks
from kd_hf.run.record import RunRecord
from kd_hf.text.terminal import table

if TYPE_CHECKING:
    from kd_hf.recipe.config import Recipe


def finish_report(recipe: Recipe) -> str:
    """The closing text of the run that a recipe just made."""
    return closing_text(RunRecord.read(recipe.train.output_dir))


def closing_text(record: RunRecord) -> str:
    """Table of the networks, where the report and the student lie, and the lines that load the student."""
    lines = ["", *table(networks(record)), ""]
    if record.recipe.data.num_labels:
        lines += [about_labels(record), ""]
    finished = (record.student / "config.json").is_file()
    if not finished:
        from kd_hf.report.facts import state

        lines += [*state(record), ""]
    page = record.report / PAGE
    written = page if page.is_file() else f"python -m kd_hf.report {record.path}"
    lines.append(f"report    {written}")
    if finished:
        lines += [f"student   {record.student}", "load it with"]
        lines += [f"  {line}" for line in load_lines(record.student)]
    return "\n".join(lines)
