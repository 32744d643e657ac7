"""Gathering a report: the log, the networks over evaluation images, the figures, the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from kd_hf import __version__
from kd_hf.assemble import load_network
from kd_hf.data.source import Source, open_source
from kd_hf.errors import UserError
from kd_hf.files import atomic_folder
from kd_hf.models.handle import ModelHandle
from kd_hf.models.load import load_model
from kd_hf.record import RunRecord
from kd_hf.report import HEAD, PAGE, figures, galleries, load_lines, rows
from kd_hf.report import facts as words
from kd_hf.report.attention import gaze
from kd_hf.report.page import Page, render
from kd_hf.report.probe import PLAIN, STUDENT, Sample, class_gains, confusions, linear_cka, look


def build_report(
    record: RunRecord,
    teachers: Mapping[str, ModelHandle] | None,
    source: Source | None,
    device: str | torch.device,
    samples: int,
    progress: bool,
) -> Path:
    """Write the page and its pictures; see :func:`kd_hf.report.write_report`."""
    page = Page(record.name, words.outcome(record), notes=words.state(record), version=__version__)
    page.tiles, page.metrics = words.tiles(record), words.metrics(record)
    page.networks = [HEAD, *(row.cells() for row in rows(record))]
    page.facts, page.recipe = words.facts(record), words.beyond_defaults(record)
    for draw in (figures.accuracy, figures.losses, figures.schedule):
        with _noted(page, "A chart of the log is missing"):
            _add(page, draw(record))
    if words.is_finished(record):
        page.load = load_lines(record.student)
        with _noted(page, "The pictures of the networks are missing"):
            networks = _open_networks(record, teachers, device, page)
            images = source or open_source(record.recipe.data, "eval")
            sample = look(networks, images, samples=samples, progress=progress)
            _add_networks(page, networks, replace(sample, classes=_in_words(record, sample.classes)))
    return _write(page, record.report)


@contextmanager
def _noted(page: Page, missing: str) -> Iterator[None]:
    """Name a part that fails on the page: a report must not end a training that went well."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        page.notes.append(f"{missing}: {' '.join(what.split())[:400]}")


def _add(page: Page, picture: figures.Picture | None) -> None:
    if picture is not None:
        page.pictures.append(picture)


def _open_networks(
    record: RunRecord, teachers: Mapping[str, ModelHandle] | None, device: str | torch.device, page: Page
) -> dict[str, ModelHandle]:
    """Student, teachers and plain twin by name; who cannot be had is noted."""
    trust = record.recipe.student.trust_remote_code
    networks = {STUDENT: load_model(str(record.student), pretrained=True, trust_remote_code=trust, device=device)}
    if teachers is not None:
        networks |= teachers
    else:
        for name, cfg in record.recipe.all_teachers().items():
            with _noted(page, f"Comparisons with the teacher '{name}' are missing, it cannot be opened"):
                networks[name] = load_network(cfg, record.recipe, cfg.num_classes, device)
    if record.plain is not None:
        with _noted(page, "The comparison with the plain student is missing, it cannot be opened"):
            networks[PLAIN] = load_model(
                str(record.plain.need()), pretrained=True, trust_remote_code=trust, device=device
            )
    return networks


def _in_words(record: RunRecord, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as people know them: the first words of the artefact's descriptions, where it has some."""
    config = json.loads((record.student / "config.json").read_text(encoding="utf-8"))
    descriptions = config.get("label_descriptions") or {}
    return tuple(str(descriptions.get(name, name)).partition(",")[0] for name in classes)


def _add_networks(page: Page, networks: Mapping[str, ModelHandle], sample: Sample) -> None:
    with _noted(page, "The gains by class are missing"):
        gains = class_gains(sample)
        if gains is None:
            raise UserError("the evaluation images have no labels")
        _add(page, figures.classes(gains))
    teachers = [name for name in networks if name not in (STUDENT, PLAIN)]
    if teachers:
        with _noted(page, "The comparison of features is missing"):
            _add(page, _similarity(sample, teachers))
    with _noted(page, "The pictures of attention are missing"):
        _add(page, _attention(page, networks, sample, [*teachers, STUDENT]))
    with _noted(page, "The disagreements are missing"):
        pairs = confusions(sample)
        _add(page, galleries.disagreements(sample, pairs))
        page.pairs = galleries.pair_table(sample)
        if not pairs:
            other = sample.reference or "labels"
            page.notes.append(f"Student and {other} agree on all {len(sample.label)} images looked at.")


def _similarity(sample: Sample, teachers: list[str]) -> figures.Picture:
    own = sample.features[STUDENT]
    unknown = [name for name in (STUDENT, *teachers) if not sample.features[name]]
    if unknown:
        raise UserError(f"no stages or blocks are known of {unknown[0]}")
    matrices = {name: linear_cka(own.values(), sample.features[name].values()) for name in teachers}
    depths = {name: list(sample.features[name]) for name in teachers}
    images = len(next(iter(own.values())))
    return figures.similarity(matrices, list(own), depths, images)


def _attention(
    page: Page, networks: Mapping[str, ModelHandle], sample: Sample, names: list[str]
) -> figures.Picture | None:
    found = {name: gaze(networks[name], sample.inputs[name]) for name in names}
    for name in (name for name, seen in found.items() if seen is None):
        page.notes.append(f"Where {name} looks is not shown: it has neither a class token nor feature maps.")
    shown = {name: seen for name, seen in found.items() if seen is not None}
    return galleries.gazes(sample.gallery, shown) if shown else None


def _write(page: Page, folder: Path) -> Path:
    with atomic_folder(folder) as temporary:
        for picture in page.pictures:
            (temporary / f"{picture.name}.png").write_bytes(picture.light)
        (temporary / PAGE).write_text(render(page), encoding="utf-8")
    return folder / PAGE
