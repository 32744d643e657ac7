"""The closing table of a run: its networks and what each reached."""

from __future__ import annotations

from dataclasses import dataclass

from kd_hf.run.record import RunRecord
from kd_hf.tasks.score import best_by


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
    found.append(_student_row(record, student_name(record)))
    published = record.recipe.published
    if published is None:
        return found
    # authors report the last epoch or the best one, and do not always say which
    best = Row(student_name(record), "at its best evaluation", best_score(record), None, None)
    return [*found, best, Row(student_name(record), f"as published by {published.source}", published.score, None, None)]


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


def best_score(record: RunRecord) -> float | None:
    """The highest score of all evaluations."""
    return max((value for _, value in record.series(record.score.logged)), default=None)


def student_score(record: RunRecord) -> float | None:
    """The score of the exported weights: of the last evaluation, or of the best one if the recipe says so."""
    train = record.recipe.train
    if not train.load_best_model_at_end:
        return record.last(record.score.logged)
    metric, greater = best_by(train, record.score)
    lines = [line for line in record.log if line.get(metric) is not None]
    choose = max if greater else min
    return choose(lines, key=lambda line: line[metric]).get(record.score.logged) if lines else None
