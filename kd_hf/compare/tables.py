"""Comparisons as tables, JSON and a plot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.compare.runs import difference, progress, seed_groups
from kd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kd_hf.compare.runs import Compared, SeedGroup, Spread

_UNKNOWN = "–"


def runs_table(runs: Sequence[Compared]) -> list[list[str]]:
    """The table of the runs as text, head first; columns in which nothing is known are left out."""
    from kd_hf.hub.metadata import in_billions

    metric = runs[0].metric
    head = {
        "run": "run",
        "student": "student",
        "teacher": "teacher",
        "methods": "methods",
        "best": f"best {_label(metric)}",
        "last": "last",
        "plain": "plain",
        "gain": "gain",
        "agreement": "agreement %",
        "parameters": "parameters",
        "macs": "GMACs",
        "train_seconds": "train s",
        "step": "steps",
    }
    rows = []
    for run in runs:
        facts = run.facts()
        shown = {key: facts[key] or "" for key in ("run", "student", "teacher", "methods")}
        shown |= {key: _number(facts[key], metric) for key in ("best", "last", "plain")}
        shown |= {"gain": _number(facts["gain"], metric, "+"), "agreement": _number(facts["agreement"], "top1")}
        shown["macs"] = in_billions(facts["macs"])
        shown |= {key: "" if facts[key] is None else f"{facts[key]:,.0f}" for key in ("parameters", "train_seconds")}
        rows.append({**shown, "step": progress(run)})
    kept = [key for key in head if any(row[key] for row in rows)]
    return [[head[key] for key in kept], *([row[key] or _UNKNOWN for key in kept] for row in rows)]


def difference_table(runs: Sequence[Compared]) -> list[list[str]]:
    """The recipe keys that differ, a column for each run, head first."""
    found = difference(runs)
    rows = [[key, *(_UNKNOWN if value is None else str(value) for value in row)] for key, row in found.items()]
    return [["recipe", *(run.name for run in runs)], *rows]


def seeds_table(runs: Sequence[Compared], groups: Sequence[SeedGroup]) -> list[list[str]]:
    """Mean ± standard deviation over the seeds of each recipe, head first."""
    metric = runs[0].metric
    head = ["finished runs", "seeds", _label(metric), "plain", "gain", "n"]
    rows = [
        [
            ", ".join(group.runs),
            ", ".join(str(seed) for seed in group.seeds),
            _spread(group.value, metric),
            _spread(group.plain, metric),
            _spread(group.gain, metric, "+"),
            str(len(group.runs)),
        ]
        for group in groups
    ]
    return [head, *rows]


def _label(metric: str) -> str:
    from kd_hf.tasks.score import label_of

    return label_of(metric.removeprefix("eval_"))


def _in_percent(metric: str) -> bool:
    from kd_hf.tasks.score import in_percent

    return in_percent(metric.removeprefix("eval_"))


def _number(value: float | None, metric: str, sign: str = "") -> str:
    if value is None:
        return ""
    return format(value, f"{sign}.2f" if _in_percent(metric) else f"{sign}.4g")


def _spread(spread: Spread | None, metric: str, sign: str = "") -> str:
    if spread is None:
        return _UNKNOWN
    return _number(spread.mean, metric, sign) + (f" ± {_number(spread.std, metric)}" if spread.std is not None else "")


def draw(runs: Sequence[Compared], path: Path) -> None:
    """Plot the metric over steps; runs that differ in their seed only share a colour.

    Raises:
        UserError: the file cannot be written, or its name ends in no format that matplotlib knows.
    """
    from matplotlib.figure import Figure

    from kd_hf.files import writing
    from kd_hf.report.figures import any_letters

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ending, kinds = path.suffix.lstrip(".").lower(), figure.canvas.get_supported_filetypes()
    if ending not in kinds:
        raise UserError(f"--plot: '{path}' does not end as a picture does.{nearest(ending, kinds)}")
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with any_letters(), writing(path):
            _plot(runs, figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, dpi=150)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plot(runs: Sequence[Compared], figure: Figure) -> None:
    axis = figure.subplots()
    colours = {recipe: f"C{index % 10}" for index, recipe in enumerate(dict.fromkeys(r.same_recipe for r in runs))}
    marks = Counter[str]()
    for run in runs:
        if run.series:
            mark = "os^Dvx"[marks[colours[run.same_recipe]] % 6]
            marks[colours[run.same_recipe]] += 1
            label = f" {run.name}"  # a legend leaves out what begins with an underscore
            axis.plot(*zip(*run.series, strict=True), f"{mark}-", color=colours[run.same_recipe], label=label, ms=4)
    axis.set(xlabel="step", ylabel=_label(runs[0].metric))
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def compare(runs: Sequence[Compared], markdown: bool = False) -> str:
    """The tables as text for a terminal or as GitHub Markdown.

    Args:
        runs: see :func:`read_runs`.
        markdown: whether to write Markdown.
    """
    tables = [(runs_table(runs), 4)]
    groups = seed_groups(runs)
    if groups:
        tables.append((seeds_table(runs, groups), 2))
    if len(runs) > 1:
        tables.append((difference_table(runs), 1))
    texts = ["\n".join(_rendered(rows, left, markdown)) for rows, left in tables if len(rows) > 1]
    if len(runs) > 1 and len(tables[-1][0]) == 1:
        texts.append("The recipes do not differ.")
    return "\n\n".join(texts)


def _rendered(rows: Sequence[Sequence[str]], left: int, markdown: bool) -> list[str]:
    from kd_hf.text import markdown as md
    from kd_hf.text.terminal import table

    if not markdown:
        return table(rows)
    return md.table([rows[0], *([md.plain(cell) for cell in row] for row in rows[1:])], left)


def as_json(runs: Sequence[Compared]) -> str:
    """Everything that is compared, as JSON."""
    names = [run.name for run in runs]
    values = {
        "metric": runs[0].metric,
        "runs": [run.facts() for run in runs],
        "seeds": [asdict(group) for group in seed_groups(runs)],
        "recipe": {key: dict(zip(names, row, strict=True)) for key, row in difference(runs).items()},
    }
    return json.dumps(values, indent=1) + "\n"
