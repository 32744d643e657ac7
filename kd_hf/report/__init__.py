"""What a run shows a person: the closing text of the command line, and a page of numbers and pictures.

``report/`` of a run folder holds ``index.html``, which needs no other file, and its pictures as files of their own:
``losses.png``, ``accuracy.png``, ``schedule.png``, ``classes.png``, ``cka.png``, ``attention.png`` and
``disagreements.png``, for detectors ``detections.png`` in place of the last four, as far as the run gives them.
``python -m kd_hf.report RUN`` writes it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.record import RunRecord

if TYPE_CHECKING:
    import torch

    from kd_hf.config import Recipe
    from kd_hf.data.source import Source
    from kd_hf.models.handle import ModelHandle

PAGE = "index.html"
SAMPLES = 2000  # evaluation images that the networks are shown


def write_report(
    record: RunRecord,
    *,
    teachers: Mapping[str, ModelHandle] | None = None,
    source: Source | None = None,
    device: str | torch.device = "cpu",
    samples: int = SAMPLES,
    progress: bool = False,
) -> Path:
    """Write ``report/`` of a run, finished or not, and return the page's path; an older one is replaced as a whole.

    Args:
        record: the run.
        teachers: its teachers by name, whole (not sharded), on any device; they are left as they are. When None
            they are loaded as the recipe says.
        source: the evaluation images; opened as the recipe says when None.
        device: where the networks that are loaded here run.
        samples: look at this many images, spread over the set; CKA uses 512 of them at most.
        progress: show a bar.

    What cannot be had (an unfinished student, a teacher or data that are gone) is named on the page, which then
    holds the rest.

    Raises:
        UserError: the folder cannot be written.
    """
    from kd_hf.report.build import build_report

    return build_report(record, teachers, source, device, samples, progress)


@dataclass(frozen=True)
class Row:
    """One network of the closing table; None where it was not measured."""

    name: str
    model: str
    score: float | None
    parameters: int | None
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.name,
            self.model,
            "" if self.score is None else f"{self.score:.2f}",
            "" if self.parameters is None else f"{self.parameters:,}",
            "" if self.seconds is None else f"{self.seconds:.0f}",
        )


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


def about_labels(record: RunRecord) -> str:
    """One sentence about a run that had few labels."""
    data = record.recipe.data
    text = f"Labels of {data.num_labels} training images were used"
    if record.recipe.all_teachers() and data.unlabelled == "keep":
        return f"{text}; the distilled student also had the teacher's outputs on the others."
    return f"{text}."


def load_lines(student: Path) -> list[str]:
    """Lines of Python that load an artefact without this package."""
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    trust = ", trust_remote_code=True" if "auto_map" in config else ""  # the network's code travels with it
    detects = any(name.endswith("ForObjectDetection") for name in config.get("architectures") or ())
    kind = "ObjectDetection" if detects else "ImageClassification"
    lines = [f'model = transformers.AutoModelFor{kind}.from_pretrained("{student}"{trust})']
    if "pretrained_cfg" in config:
        lines.insert(0, f'model = timm.create_model("local-dir:{student}", pretrained=True)')
    return lines


def networks(record: RunRecord) -> list[tuple[str, ...]]:
    """The closing table as text, its head first."""
    return [("", "network", record.score.label, "parameters", "train s"), *(row.cells() for row in rows(record))]


def rows(record: RunRecord) -> list[Row]:
    """Teachers, plain student (when there is one) and student of a run, in this order."""
    found = [_teacher_row(record, name) for name in record.recipe.all_teachers()]
    if record.plain is not None:
        found.append(_student_row(record.plain, "plain student"))
    elif record.plain_score is not None:
        found.append(Row("plain student", "as published", record.plain_score, None, None))
    return [*found, _student_row(record, student_name(record))]


def student_name(record: RunRecord) -> str:
    """What the student of this run is called: nothing is distilled without a teacher."""
    return "distilled student" if record.recipe.all_teachers() else "student"


def _student_row(record: RunRecord, name: str) -> Row:
    note = record.networks.get("student")
    seconds = record.last("train_seconds")
    return Row(name, note.name if note else "?", student_score(record), note.parameters if note else None, seconds)


def _teacher_row(record: RunRecord, name: str) -> Row:
    note, own = record.networks.get(name), record.trained_teacher(name)
    trained = own.networks.get("student") if own else None
    model = trained.name if trained else note.name if note else "?"
    seconds = own.last("train_seconds") if own else None
    return Row(name, model, record.last(f"eval_{name}_{record.score.key}"), note.parameters if note else None, seconds)


def student_score(record: RunRecord) -> float | None:
    """The score of the exported weights: of the last evaluation, or of the best one if the recipe says so."""
    train = record.recipe.train
    if not train.load_best_model_at_end:
        return record.last(record.score.logged)
    metric = f"eval_{train.metric_for_best_model.removeprefix('eval_')}"
    lines = [line for line in record.log if line.get(metric) is not None]
    choose = max if train.greater_is_better else min
    return choose(lines, key=lambda line: line[metric]).get(record.score.logged) if lines else None


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned columns, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
