"""What a finished run shows a person: a small table, a curve, and the lines that load the student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.callbacks import read_log

if TYPE_CHECKING:
    from kd_hf.config import Recipe


@dataclass(frozen=True)
class Row:
    """One network of the table; None where it was not measured."""

    name: str
    model: str
    top1: float | None
    parameters: int | None
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.name,
            self.model,
            "" if self.top1 is None else f"{self.top1:.2f}",
            "" if self.parameters is None else f"{self.parameters:,}",
            "" if self.seconds is None else f"{self.seconds:.0f}",
        )


HEAD = ("", "network", "top-1 %", "parameters", "train s")


def finish_report(recipe: Recipe) -> str:
    """Draw ``report/curve.png`` and return the closing text of a run."""
    from kd_hf.assemble import plain_twin, teacher_recipes

    folder = Path(recipe.train.output_dir)
    log = read_log(folder)
    twin = Path(plain_twin(recipe).train.output_dir) if recipe.baseline == "train" else None
    trained = {name: Path(other.train.output_dir) for name, other in teacher_recipes(recipe).items()}
    teachers = [_teacher_row(name, log, trained.get(name)) for name in recipe.all_teachers()]
    rows = [*teachers]
    if twin is not None:
        rows.append(_student_row("plain student", read_log(twin)))
    elif isinstance(recipe.baseline, float):
        rows.append(Row("plain student", "as published", recipe.baseline, None, None))
    rows.append(_student_row("distilled student" if recipe.all_teachers() else "student", log))
    picture = draw_curve(folder, log, read_log(twin) if twin else [], teachers)
    student = folder / "student"
    lines = ["", *table([HEAD, *(row.cells() for row in rows)]), ""]
    if recipe.data.num_labels:
        lines += [_about_labels(recipe), ""]
    lines.append(f"curve     {picture}")
    if (student / "config.json").is_file():
        lines += [f"student   {student}", "load it with", *(f"  {line}" for line in load_lines(student))]
    return "\n".join(lines)


def _about_labels(recipe: Recipe) -> str:
    text = f"Labels of {recipe.data.num_labels} training images were used"
    if recipe.all_teachers() and recipe.data.unlabelled == "keep":
        return f"{text}; the distilled student also had the teacher's outputs on the others."
    return f"{text}."


def load_lines(student: Path) -> list[str]:
    """Lines of Python that load an artefact without this package."""
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    trust = ", trust_remote_code=True" if "auto_map" in config else ""  # the network's code travels with it
    lines = [f'model = transformers.AutoModelForImageClassification.from_pretrained("{student}"{trust})']
    if "pretrained_cfg" in config:
        lines.insert(0, f'model = timm.create_model("local-dir:{student}", pretrained=True)')
    return lines


def _network(log: Sequence[dict[str, Any]], name: str) -> tuple[str, int | None]:
    started: dict[str, Any] = next((line for line in reversed(log) if "models" in line), {"models": {}})
    facts = started["models"].get(name, {})
    return facts.get("name", "?"), facts.get("parameters")


def _last(log: Sequence[dict[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(log) if line.get(key) is not None), None)


def _student_row(name: str, log: Sequence[dict[str, Any]]) -> Row:
    model, parameters = _network(log, "student")
    return Row(name, model, _last(log, "eval_top1"), parameters, _last(log, "train_seconds"))


def _teacher_row(name: str, log: Sequence[dict[str, Any]], trained: Path | None) -> Row:
    model, parameters = _network(log, name)
    own = read_log(trained) if trained else []
    if own:
        model = _network(own, "student")[0]
    return Row(name, model, _last(log, f"eval_{name}_top1"), parameters, _last(own, "train_seconds"))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned columns, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def draw_curve(
    folder: Path, log: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]], teachers: Sequence[Row]
) -> Path:
    """``report/curve.png``: top-1 over steps (student, plain twin, teachers) and the loss parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for lines, label, style in ((log, "distilled" if teachers else "student", "o-"), (plain, "plain", "s--")):
        points = [(line["step"], line["eval_top1"]) for line in lines if line.get("eval_top1") is not None]
        if points:
            left.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    for row in teachers:
        if row.top1 is not None:
            left.axhline(row.top1, color="0.4", linestyle=":", label=f"{row.name} ({row.model})")
    left.set(xlabel="step", ylabel="top-1 %", title="held-out accuracy")
    keys = {key for line in log for key in line if "/" in key and not key.startswith("weight/")}
    for key in sorted(keys):
        points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
        right.plot(*zip(*points, strict=True), label=key)
    right.set(xlabel="step", ylabel="mean since the last log", title="loss parts, before their weights", yscale="log")
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "report" / "curve.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
