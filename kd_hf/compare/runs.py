"""The runs that are compared: their recipes, logs and numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, nearest
from kd_hf.tasks.score import greater_is_better

if TYPE_CHECKING:
    from kd_hf.run.record import RunRecord


@dataclass(frozen=True)
class Compared:
    """A run and what a comparison reads from it.

    Args:
        record: the run.
        name: what tells it from the others.
        metric: key of the log that is compared.
    """

    record: RunRecord
    name: str
    metric: str

    @property
    def series(self) -> list[tuple[int, float]]:
        """(step, value) of the metric."""
        return self.record.series(self.metric)

    @property
    def best(self) -> float | None:
        """The best value of the metric at any step."""
        choose = max if greater_is_better(self.metric) else min
        return choose((value for _, value in self.series), default=None)

    @property
    def last(self) -> float | None:
        """The newest value of the metric."""
        return self.series[-1][1] if self.series else None

    @property
    def value(self) -> float | None:
        """The metric of the exported weights."""
        return exported_value(self.record, self.metric)

    @property
    def plain(self) -> float | None:
        """The same of the plain student, trained beside this one or, for the task's own, given in the recipe.

        None for a loss: its parts are not those of the distilled student's.
        """
        if not self.metric.startswith("eval_"):
            return None
        if self.record.plain is not None:
            return exported_value(self.record.plain, self.metric)
        return self.record.plain_score if self.metric == self.record.score.logged else None

    @property
    def gain(self) -> float | None:
        """How much better the run's value is than the plain student's; negative when worse."""
        if self.value is None or self.plain is None:
            return None
        gain = self.value - self.plain
        return gain if greater_is_better(self.metric) else -gain

    @property
    def step(self) -> int:
        """The step the log has come to."""
        return max((line.get("step", 0) for line in self.record.log), default=0)

    @property
    def total_steps(self) -> int | None:
        """The steps the recipe asks for; None when the log does not say how long an epoch is."""
        train, every = self.record.recipe.train, self.record.start.get("steps_per_epoch")
        return train.max_steps or (max(1, round(train.num_train_epochs * every)) if every else None)

    @cached_property
    def finished(self) -> bool:
        """Whether the artefact of this very recipe is there."""
        from kd_hf.recipe.resolved import recipe_hash, trained_hash

        return trained_hash(self.record.student) == recipe_hash(self.record.recipe)

    @cached_property
    def same_recipe(self) -> str:
        """A key that runs share when they differ in their seed only."""
        from kd_hf.recipe.resolved import recipe_hash

        recipe = self.record.recipe
        seedless = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 0})})
        # the hash leaves the batch size per process out, for the sake of resuming on other machines
        return f"{recipe_hash(seedless)} {self.record.start.get('global_batch')} {recipe.baseline}"

    def facts(self) -> dict[str, Any]:
        """The row of the table, as plain values; None where nothing is known."""
        from kd_hf.run.lineage import distilling, network_name

        recipe, note = self.record.recipe, self.record.networks.get("student")
        return {
            "run": self.name,
            "student": network_name(self.record, "student"),
            "teacher": ", ".join(network_name(self.record, name) for name in recipe.all_teachers()) or None,
            "methods": ", ".join(distilling(recipe)) or None,
            "best": self.best,
            "last": self.last,
            "plain": self.plain,
            "gain": self.gain,
            "agreement": self.record.last("eval_agreement"),
            "parameters": note.parameters if note else None,
            "macs": self.record.macs("student"),
            "train_seconds": self.record.last("train_seconds"),
            "step": self.step,
            "total_steps": self.total_steps,
            "finished": self.finished,
        }


@dataclass(frozen=True)
class Spread:
    """Mean of a number over runs, and the sample's standard deviation (None for a single run)."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """The spread of some values; None when one of them is not known."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs of one recipe with different seeds, and the metric over them."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    value: Spread | None
    plain: Spread | None
    gain: Spread | None


def exported_value(record: RunRecord, metric: str) -> float | None:
    """A logged number at the step whose weights were exported."""
    from kd_hf.run.lineage import exported_step

    best = exported_step(record)
    values = [value for step, value in record.series(metric) if best is None or step == best]
    return values[-1] if values else None


def read_runs(folders: Sequence[str | Path], metric: str | None = None) -> list[Compared]:
    """Open runs and see that there is something to compare.

    Args:
        folders: run folders.
        metric: a key of their logs, with or without ``eval_``; by default the score of their task.

    Raises:
        UserError: no run folder, one without a log, one named twice, a number that none of them has logged, or none
            is named for runs of different tasks.
    """
    from kd_hf.layout import LOG
    from kd_hf.run.record import RunRecord

    records = [RunRecord.read(folder) for folder in folders]
    for folder, record in zip(folders, records, strict=True):
        if not record.log:
            raise UserError(f"'{folder}' holds no {LOG} yet; start its training first")
    places = Counter(record.path.resolve() for record in records)
    if twice := [record for record in records if places[record.path.resolve()] > 1]:
        raise UserError(f"'{twice[0].path}' is given twice")
    names = Counter(record.name for record in records)
    called = [record.name if names[record.name] == 1 else str(record.path) for record in records]
    found = _logged_key(records, metric) if metric else _common_score(records)
    return [Compared(record, name, found) for record, name in zip(records, called, strict=True)]


def _logged_key(records: Sequence[RunRecord], metric: str) -> str:
    """The key of the logs that a person means."""
    logged = _logged(records)
    found = next((key for key in (metric, f"eval_{metric}") if key in logged), None)
    if found is None:
        who = f"'{records[0].path}' has not" if len(records) == 1 else "none of these runs has"
        raise UserError(f"--metric: {who} logged '{metric}'.{nearest(metric, logged)}")
    return found


def _logged(records: Sequence[RunRecord]) -> set[str]:
    """Names of the numbers in the logs that change over a run."""
    lines = (line for record in records for line in record.log if "models" not in line)
    return {key for line in lines for key, value in line.items() if _is_number(value)} - {"step", "epoch"}


def _common_score(records: Sequence[RunRecord]) -> str:
    """Key of the log that all of them are judged by."""
    scores = sorted({record.score.logged for record in records})
    if len(scores) > 1:
        raise UserError(f"--metric: the runs are of different tasks, measured by {' and '.join(scores)}; name a number")
    if scores[0] not in (logged := _logged(records)):
        places = [f"'{record.path}' (step {progress(Compared(record, record.name, scores[0]))})" for record in records]
        who = f"{places[0]} has no" if len(places) == 1 else f"none of {', '.join(places)} has an"
        others = f"; --metric can name what is there: {', '.join(sorted(logged))}" if logged else ", nor other numbers"
        raise UserError(f"{who} {scores[0]} in its log, which evaluations write there{others}")
    return scores[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def difference(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The recipe keys in which runs differ, dotted, with each run's value.

    None stands where a run has no such key; one that only some runs have counts when it is not at its default there.
    ``train.output_dir`` is left out: the runs are called by it.
    """
    recipes = [_flat_recipe(run.record) for run in runs]
    said = {key for run in runs for key in _flat_recipe(run.record, exclude_defaults=True)}
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key != "train.output_dir")
    rows = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {
        key: row
        for key, row in rows.items()
        if any(value != row[0] for value in row) and (None not in row or key in said)
    }


def _flat_recipe(record: RunRecord, exclude_defaults: bool = False) -> dict[str, Any]:
    """Dotted names → values, with the weight of every loss even where the recipe leaves it to the paper."""
    from kd_hf.methods import get_method
    from kd_hf.recipe.resolved import flat
    from kd_hf.run.lineage import losses_of, weight_text

    values = record.recipe.model_dump(mode="json", exclude_defaults=exclude_defaults)
    own = {"until", "teacher", "method"}
    values["methods"] = {
        name: {
            "weight": weight if isinstance(weight, float) else weight_text(weight),
            **block.model_dump(mode="json", include=own, exclude_defaults=exclude_defaults),
            **get_method(record.recipe.method_of(name), record.recipe.task)
            .Config.model_validate(block.options)
            .model_dump(mode="json", exclude_defaults=exclude_defaults),
        }
        for name, (block, weight) in losses_of(record.recipe).items()
    }
    return flat(values)


def seed_groups(runs: Iterable[Compared]) -> list[SeedGroup]:
    """Finished runs gathered by recipe without the seed; empty unless two of them share one."""
    gathered: dict[str, list[Compared]] = {}
    for run in runs:
        if run.finished and run.value is not None:
            gathered.setdefault(run.same_recipe, []).append(run)
    if all(len(group) < 2 for group in gathered.values()):
        return []
    return [
        SeedGroup(
            tuple(run.name for run in group),
            tuple(run.record.recipe.train.seed for run in group),
            Spread.of([run.value for run in group]),
            Spread.of([run.plain for run in group]),
            Spread.of([run.gain for run in group]),
        )
        for group in gathered.values()
    ]


def progress(run: Compared) -> str:
    """The steps of a finished run, or how far another one is."""
    if run.finished:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}, not finished"
