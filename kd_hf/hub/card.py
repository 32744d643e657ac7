"""The model card of a run: the README.md and the results that lie beside the weights in a Hub repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_hf.files import atomic_folder, write_text
from kd_hf.hub.metadata import BESIDE, card_data, in_billions, read_config, result_entries, student_metrics
from kd_hf.hub.programs import program
from kd_hf.layout import REPORT, RESOLVED
from kd_hf.recipe.resolved import dump_recipe, flat, recipe_hash
from kd_hf.run.lineage import (
    commit_of,
    dataset_id,
    distilling,
    exported_metrics,
    exported_step,
    hub_id,
    losses_of,
    network_name,
    only_body,
    origin,
    shown_path,
    span,
    weight_text,
)
from kd_hf.run.record import RunRecord
from kd_hf.tasks.score import RECALLS, best_by, in_percent, label_of
from kd_hf.text import markdown as md

README, RESULTS = "README.md", ".eval_results"
_MOST_CLASSES = 20  # names that the card lists
# what the report's pictures show, in the order of the card; others follow under their own names
_CAPTIONS = {
    "accuracy": "{score} on held-out images over training steps",
    "losses": "the loss and its parts over training steps",
    "schedule": "learning rate and weights of the losses over training steps",
    "classes": "top-1 by class",
    "cka": "how alike student and teacher see, layer by layer (centred kernel alignment)",
    "attention": "where teacher and student look",
    "disagreements": "images on which student and teacher disagree most",
    "detections": "what teacher and student find, beside what is there",
}
# these pictures hold images of the data, which may not be for everybody: `hub.data_pictures`
_OF_DATA = ("attention", "disagreements", "detections")


def model_card(record: RunRecord, repo_id: str | None = None) -> str:
    """The text of README.md, front matter included.

    Args:
        record: a run that has written its student.
        repo_id: ``user/name`` of the Hub repository that the card is for; else it speaks of the local folder.

    Raises:
        UserError: there is no student yet.
    """
    record.need()
    title = (repo_id or record.name).rpartition("/")[2]
    sections = (
        [f"# {md.plain(title)}", "", _about(record)],
        ["## Use", "", *_use(record.student, repo_id)],
        ["## Results", "", *_results(record)],
        ["## Lineage", "", *_lineage(record)],
        ["## Training", "", *_training(record), *_curves(record)],
        ["## Limits", "", *_limits(record)],
        ["## Recipe", "", *_recipe(record)],
    )
    body = "\n\n".join("\n".join(lines) for lines in sections)
    return f"---\n{card_data(record, repo_id).to_yaml()}\n---\n\n{body}\n"


def write_card(record: RunRecord, repo_id: str | None = None) -> None:
    """Write the card into the artefact: README.md, ``.eval_results/`` and the pictures it shows; safe to repeat.

    Raises:
        UserError: there is no student yet, or the disk is full or may not be written to.
    """
    import yaml

    student, text = record.need(), model_card(record, repo_id)
    _replace(student / REPORT, {path.name: path.read_bytes() for path in _pictures(record)})
    entries = {name: yaml.safe_dump(entry, sort_keys=False) for name, entry in result_entries(record).items()}
    _replace(student / RESULTS, {name: text.encode() for name, text in entries.items()})
    write_text(student / README, text)


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Have exactly these files in a folder; none of them, no folder."""
    if not files:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with atomic_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def _about(record: RunRecord) -> str:
    """One paragraph: what this is."""
    recipe, note = record.recipe, record.networks.get("student")
    size = f" ({note.parameters:,} parameters)" if note else ""
    teachers = [md.code(network_name(record, name)) for name in recipe.all_teachers()]
    methods = [md.code(name) for name in distilling(recipe)]
    how = f"distilled from {_and(teachers)}" if teachers else "trained"
    by = f" with {_and(methods)}" if methods else ""
    which = " in its body" if only_body(record, "student") else ""
    start = f" It began with pretrained weights{which}." if recipe.student.pretrained else ""
    return (
        f"{record.task.words.kind}: {md.code(network_name(record, 'student'))}{size}, {how}{by} on "
        f"{md.code(shown_path(recipe.data.path))}.{start}"
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _use(student: Path, repo_id: str | None) -> list[str]:
    """A whole program for each library that loads the artefact."""
    from kd_hf.hub.artefact import load_lines

    place, names = f'"{repo_id or student}"', _class_names(student)
    label = 'model.pretrained_cfg["label_names"][index]' if names else "index"
    lines, other = [], []
    for load in load_lines(student):
        if repo_id:
            load = load.replace(f"local-dir:{student}", f"hf-hub:{repo_id}").replace(f'"{student}"', place)
        known = program(load, place, label)
        if known is None:
            other.append(load)
            continue
        lines += [f"With {known.library}:", "", *md.fenced(known.text, "python"), ""]
        if known.trusts:
            lines += ["A Python file beside the weights defines the network; `trust_remote_code` lets it run.", ""]
    if other:
        lines += [*md.fenced("\n".join(other), "python"), ""]
    return [*lines, *_about_classes(names)]


def _about_classes(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f", … ({len(names)} in all, in `config.json`)" if len(names) > _MOST_CLASSES else ""
    return [f"Classes: {', '.join(md.code(name) for name in names[:_MOST_CLASSES])}{more}."]


def _class_names(student: Path) -> list[str]:
    config = read_config(student)
    return list(config.get("label_names") or config.get("id2label", {}).values())


def _results(record: RunRecord) -> list[str]:
    metrics = exported_metrics(record)
    if not metrics:
        return ["Nothing was measured on held-out images."]
    rows = _result_rows(record, metrics)
    keys = list(dict.fromkeys(key for *_, values in rows for key in values if key not in RECALLS))
    head = ["", "network", *(md.plain(label_of(key)) for key in keys), "parameters", "GMACs"]
    cells = [
        [name, md.code(network_name(record, network)), *(_value(key, values.get(key)) for key in keys),
         *_size(record, network)]
        for name, network, values in rows
    ]  # fmt: skip
    samples = f"{metrics['samples']:,.0f} images of " if "samples" in metrics else ""
    lines = [f"Measured on {samples}{_described(record, 'eval')}.", ""]
    lines += [*md.table(_without_empty_columns([head, *cells]), left=2), ""]
    if "agreement" in metrics:
        lines += ["Agreement: on how many of the images it chooses the same class as the teacher.", ""]
    if record.score.key not in metrics:
        goodness = record.task.words.goodness
        return [*lines, f"These images have no labels, so the {goodness} of the student is not known."]
    return [*lines, *_gain(record, metrics[record.score.key])]


def _result_rows(record: RunRecord, metrics: Mapping[str, float]) -> list[tuple[str, str, Mapping[str, float]]]:
    """(what it is, network of the recipe, metrics) of every row."""
    rows: list[tuple[str, str, Mapping[str, float]]] = [("**this model**", "student", student_metrics(record, metrics))]
    rows += [(text, "student", found) for name, text in BESIDE.items() if (found := _with_prefix(metrics, name))]
    if record.plain is not None:
        rows.append(("plain student", "student", student_metrics(record.plain, exported_metrics(record.plain))))
    elif record.plain_score is not None:
        rows.append(("plain student, as given", "student", {record.score.key: record.plain_score}))
    return rows + [(md.plain(name), name, _with_prefix(metrics, name)) for name in record.recipe.all_teachers()]


def _with_prefix(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    start = f"{name}_"
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}


def _value(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if in_percent(key) else f"{value:.4g}"


def _size(record: RunRecord, network: str) -> tuple[str, str]:
    """Parameters, and billions of multiply–accumulates per image."""
    facts = record.start.get("models", {}).get(network, {})
    return f"{facts['parameters']:,}" if "parameters" in facts else "", in_billions(record.macs(network))


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    return [[row[column] for column in kept] for row in rows]


def _gain(record: RunRecord, own: float) -> list[str]:
    score = record.score
    plain = exported_metrics(record.plain).get(score.key) if record.plain else record.plain_score
    if plain is None:
        return []
    alike = ", trained with the same data, seed and steps, on labelled images only" if record.plain else ""
    return [f"{score.beginning} against the plain student{alike}: {own - plain:+.2f} points."]


def _lineage(record: RunRecord) -> list[str]:
    from kd_hf.methods import get_method

    rows = [["", "network", "weights it began with", "commit"]]
    for name in ("student", *record.recipe.all_teachers()):
        commit = md.code(commit_of(record, name) or "")
        begun = _origin(record, name) + (", the body alone" if only_body(record, name) else "")
        rows.append([md.plain(name), md.code(network_name(record, name)), begun, commit])
    losses = [["loss", "weight", "paper", "options other than the paper's"]]
    for name, (block, weight) in losses_of(record.recipe).items():
        method = get_method(record.recipe.method_of(name), record.recipe.task)
        until = f", until {span(block.until)}" if block.until else ""
        changed = flat(method.Config.model_validate(block.options).model_dump(mode="json", exclude_defaults=True))
        options = ", ".join(md.code(f"{key}: {value}") for key, value in changed.items())
        paper = md.link(method.paper.title, method.paper.url)
        losses.append([md.code(name), md.plain(weight_text(weight) + until), paper, options])
    networks, weighted = (md.table(_without_empty_columns(found), left=4) for found in (rows, losses))
    return [*networks, "", "The loss is the weighted sum of:", "", *weighted]


def _origin(record: RunRecord, network: str) -> str:
    """Where a network's weights came from, with a link when that is the Hub."""
    if hub := hub_id(record, network):
        commit = commit_of(record, network)
        return md.link(hub, f"https://huggingface.co/{hub}" + (f"/tree/{commit}" if commit else ""))
    trained = record.trained_teacher(network) if network != "student" else None
    return f"trained by kd_hf, recipe {md.code(recipe_hash(trained.recipe))}" if trained else origin(record, network)


def _training(record: RunRecord) -> list[str]:
    """Data, procedure and cost, as a table of two columns."""
    rows = {
        "data": _described(record, "train"),
        "data revision": _data_revision(record),
        "preprocessing": md.plain(_preprocessing(record.student)),
        **{key: md.plain(value) for key, value in (_procedure(record) | _cost(record)).items()},
    }
    return md.table([["", ""], *([key, value] for key, value in rows.items() if value)], left=2)


def _data_revision(record: RunRecord) -> str:
    """The commit of the training data, with a link, and what the recipe calls it where that is another name."""
    commit, asked, hub = record.data_commit("train"), record.recipe.data.revision, dataset_id(record)
    if commit is None or hub is None:
        return md.code(asked or "")
    link = md.link(commit, f"https://huggingface.co/datasets/{hub}/tree/{commit}")
    return link if asked in (None, commit) else f"{link}, as {md.code(asked)}"


def _described(record: RunRecord, split: str) -> str:
    """What the log says about the data of a split: place, images, classes."""
    path = record.recipe.data.path
    return md.plain(str(record.start.get("data", {}).get(split, path)).replace(path, shown_path(path)))


def _preprocessing(student: Path) -> str:
    """How the network expects its images, from the artefact."""
    facts, path = read_config(student).get("pretrained_cfg"), student / "preprocessor_config.json"
    if facts is None and path.is_file():
        facts = _from_processor(json.loads(path.read_text(encoding="utf-8")))
    if not facts:
        return ""
    mean, std = (" ".join(f"{value:.4g}" for value in facts[key]) for key in ("mean", "std"))
    return f"{_pixels(facts)}, {facts['interpolation']}; mean {mean}, std {std}"


def _pixels(facts: Mapping[str, Any]) -> str:
    """Size of an image as the network is shown it, and the part of the image that it is."""
    if "crop_mode" not in facts:
        size = facts["size"]
        return f"the shortest side {size['shortest_edge']} pixels, the longest at most {size['longest_edge']}"
    side, squashed = facts["input_size"][-1], facts["crop_mode"] == "squash"
    part = "the whole image, squashed" if squashed else f"the central {facts['crop_pct']:.4g} of the image"
    return f"{side} × {side} pixels, {part}"


def _from_processor(found: Mapping[str, Any]) -> dict[str, Any]:
    """An image processor's facts under timm's names; what does not crop keeps its own name for sizes."""
    from PIL.Image import Resampling

    facts = {
        "mean": found["image_mean"],
        "std": found["image_std"],
        "interpolation": Resampling(found["resample"]).name.lower(),
    }
    if "crop_size" not in found:
        return {**facts, "size": found["size"]}
    crop_mode = "center" if found["do_center_crop"] else "squash"
    side = found["crop_size"]["height"]
    return {**facts, "input_size": [side], "crop_pct": found["crop_pct"], "crop_mode": crop_mode}


def _procedure(record: RunRecord) -> dict[str, str]:
    train, steps = record.recipe.train, _steps(record)
    every, best = record.start.get("steps_per_epoch"), exported_step(record)
    warmup = f", {span(train.warmup_steps)} of warm-up" if train.warmup_steps.amount else ""
    average = f"decay {train.ema.decay:g}, {'exported' if train.ema.export else 'not exported'}" if train.ema else ""
    return {
        "length": f"{steps:,} steps" + (f", {steps / every:.4g} epochs" if every else ""),
        "images per step": f"{record.start['global_batch']:,}" if "global_batch" in record.start else "",
        "optimiser": f"{train.optim}, learning rate {train.learning_rate:g} ({train.lr_scheduler_type}{warmup}), "
        f"weight decay {train.weight_decay:g}",
        "augmentation": ", ".join(f"{key} {value}" for key, value in record.task.augmentation().items()),
        "weight average": average,
        "precision": "bfloat16" if train.bf16 else "float16" if train.fp16 else "float32",
        "seed": str(train.seed),
        "exported weights": f"of step {best:,}, best by {best_by(train, record.score)[0]}" if best is not None else "",
    }


def _cost(record: RunRecord) -> dict[str, str]:
    start, seconds = record.start, record.last("train_seconds")
    return {
        "images seen": f"{_steps(record) * start['global_batch']:,}" if "global_batch" in start else "",
        "time": _duration(seconds) if seconds is not None else "",
        "machine": f"{start['processes']} × {start['device']}" if "device" in start else "",
        "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()),
    }


def _steps(record: RunRecord) -> int:
    return record.log[-1].get("step", 0) if record.log else 0


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _pictures(record: RunRecord) -> list[Path]:
    """The pictures of the report, those of the data where the recipe allows it."""
    order = {name: place for place, name in enumerate(_CAPTIONS)}
    kept_back = () if record.recipe.hub.data_pictures else _OF_DATA
    found = (path for path in record.report.glob("*.png") if path.stem not in kept_back)
    return sorted(found, key=lambda path: (order.get(path.stem, len(order)), path.name))


def _curves(record: RunRecord) -> list[str]:
    lines = []
    for path in _pictures(record):
        caption = _CAPTIONS.get(path.stem, path.stem.replace("_", " ")).replace("{score}", record.score.name)
        lines += [
            "",
            f"{md.plain(caption[0].upper() + caption[1:])}:",
            "",
            f"!{md.link(caption, f'{REPORT}/{path.name}')}",
        ]
    return lines


def _limits(record: RunRecord) -> list[str]:
    recipe, data = record.recipe, md.code(shown_path(record.recipe.data.path))
    lines = [f"- {record.task.words.limit.format(data=data)}"]
    if exported_metrics(record):
        split = "a sample of the evaluation split" if recipe.eval.max_samples else "the evaluation split"
        lines.append(f"- It was measured on {split} of {data} only; how it does on other images is not known.")
    lines.append(f"- The numbers are of one run, with seed {recipe.train.seed}; another seed gives others.")
    if recipe.data.num_labels:
        lines.append(f"- Only {recipe.data.num_labels:,} of the training images had a label.")
    if recipe.all_teachers():
        lines.append("- A student learns its teacher's errors and biases too.")
    lines.append(
        f"- The license ({md.plain(recipe.hub.license)}) is that of these weights; the data and the networks above "
        "have their own terms."
    )
    return lines


def _recipe(record: RunRecord) -> list[str]:
    return [
        f"Where the data and the teachers are at hand, {md.code(f'python -m kd_hf.train {RESOLVED}')} trains it again.",
        "",
        f"<details><summary>{RESOLVED}</summary>",
        "",
        *md.fenced(dump_recipe(record.recipe), "yaml"),
        "",
        "</details>",
    ]
