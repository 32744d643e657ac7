"""What the page says in words and numbers; all of it from the log and the recipe."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import yaml

from kd_hf.hub.metadata import in_billions
from kd_hf.report.rows import Row, rows, student_name
from kd_hf.run.record import RunRecord
from kd_hf.tasks.score import PRECISIONS, RECALLS

_METRICS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "agreement": "agreement with the teacher %",
    **PRECISIONS,
    **RECALLS,
    "samples": "images",
}


def outcome(record: RunRecord) -> str:
    """The result of a run in one sentence."""
    table = {row.name: row for row in rows(record)}
    student = table[student_name(record)]
    if student.score is None:
        return "The student has not been evaluated yet."
    reached = "reaches" if is_finished(record) else "is at"
    text = f"The {student.name} {reached} {record.score.text(student.score, 1)} {record.score.name}"
    plain = table.get("plain student")
    parts = []
    if plain is not None and plain.score is not None:
        parts.append(_beside(student.score, plain.score, "the plain one"))
    teachers = [row for name in record.recipe.all_teachers() if (row := table[name]).score is not None]
    for row in teachers:
        name = "its teacher" if len(record.recipe.all_teachers()) == 1 else f"teacher '{row.name}'"
        parts.append(_beside(student.score, row.score or 0.0, name, unit=not parts))
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{text}{', ' + listed if listed else ''}{_smaller(student, teachers)}."


def _beside(own: float, other: float, name: str, unit: bool = True) -> str:
    points = round(own - other, 1)
    if points == 0:
        return f"level with {name}"
    noun = (" point" if abs(points) == 1 else " points") if unit else ""
    return f"{abs(points):.1f}{noun} {'above' if points > 0 else 'below'} {name}"


def _smaller(student: Row, teachers: Iterable[Row]) -> str:
    """The student's share of its teacher's parameters, where it is the smaller one."""
    sizes = [row.parameters for row in teachers if row.parameters]
    if len(sizes) != 1 or not student.parameters or student.parameters >= sizes[0]:
        return ""
    share = 100 * student.parameters / sizes[0]
    return f", with {share:.0f} % of the teacher's parameters" if share >= 1 else ""


def is_finished(record: RunRecord) -> bool:
    """Whether the artefact is there."""
    return (record.student / "config.json").is_file()


def state(record: RunRecord) -> list[str]:
    """Sentences about what went wrong or is not there yet."""
    errors = [line for line in record.log if "error" in line]
    found = [f"The run stopped at step {line['step']}: {line['error']}." for line in errors[-1:]]
    if not is_finished(record):
        step = max((line.get("step", 0) for line in record.log), default=0)
        place = f"step {step} of {record.start['total_steps']}" if "total_steps" in record.start else f"step {step}"
        found.append(f"The training has not ended ({place}): the student is not there yet, nor are its pictures.")
    corrupt = record.last("corrupt_images")
    if corrupt:
        found.append(f"{corrupt} unreadable training images were replaced by their neighbours.")
    return found


def tiles(record: RunRecord) -> list[tuple[str, str]]:
    """The few numbers to read first: (number, what it is)."""
    table = {row.name: row for row in rows(record)}
    student = table[student_name(record)]
    plain, agreement = table.get("plain student"), record.last("eval_agreement")
    found = []
    if student.score is not None:
        found.append((record.score.text(student.score, 2), f"{record.score.name} of the {student.name}"))
    if student.score is not None and plain is not None and plain.score is not None:
        found.append((f"{student.score - plain.score:+.2f}".replace("-", "−"), "points over the plain student"))
    if agreement is not None:
        found.append((f"{agreement:.2f} %", "agreement with the teacher"))
    if student.parameters:
        found.append((_large(student.parameters), "parameters of the student"))
    if student.seconds is not None:
        found.append((_duration(student.seconds), "training of the student"))
    return found


def _large(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def metrics(record: RunRecord) -> list[tuple[str, str]]:
    """The newest evaluation, (name, value)."""
    values, score = record.metrics(), record.score
    ordered = [*(name for name in _METRICS if name in values), *(name for name in values if name not in _METRICS)]
    return [
        (_METRICS.get(name, name.replace(f"_{score.key}", f" {score.label}")), _number(name, values[name]))
        for name in ordered
    ]


def _number(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "samples" else f"{value:,.2f}"


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """How the run was made, (what, value)."""
    start, recipe = record.start, record.recipe
    data = start.get("data", {})
    found = [("losses", methods_line(record))]
    found += [(f"{split} images", str(data[split])) for split in ("train", "eval") if split in data]
    if commit := record.data_commit("train"):
        found.append(("data revision", commit))
    if recipe.data.num_labels:
        found.append(("labels", about_labels(record)))
    steps = max((line.get("step", 0) for line in record.log), default=0)
    if "global_batch" in start:
        found.append(("steps", f"{steps:,} of {start['global_batch']:,} images"))
    if "processes" in start:
        found.append(("machine", f"{start['processes']} process(es) on {start.get('device', '?')}"))
    rates = [value for _, value in record.series("images_per_second")]
    if rates:
        found.append(("speed", f"{statistics.median(rates):,.0f} images a second (median)"))
    for name, note in record.networks.items():
        revision = f", revision {note.revision}" if note.revision else ""
        macs = f", {in_billions(count)} billion MACs an image" if (count := record.macs(name)) else ""
        found.append((name, f"{note.name} ({note.library} {note.architecture}{revision}){macs}"))
    versions = start.get("versions", {})
    if versions:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [*found, ("folder", str(record.path.resolve()))]


def methods_line(record: RunRecord) -> str:
    """The losses of a run."""
    return " + ".join(record.weights() or record.recipe.methods or ["task"])


def beyond_defaults(record: RunRecord) -> str:
    """What the recipe says that is not a default, as YAML."""
    values = record.recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def about_labels(record: RunRecord) -> str:
    """One sentence about a run that had few labels."""
    data = record.recipe.data
    text = f"Labels of {data.num_labels} training images were used"
    if record.recipe.all_teachers() and data.unlabelled != "drop":
        return f"{text}; the distilled student also had the teacher's outputs on the others."
    return f"{text}."
