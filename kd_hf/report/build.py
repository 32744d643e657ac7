"""Gathering a report: the log, the networks over evaluation images, the figures, the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.distillation.assembly import load_network
from kd_hf.errors import UserError
from kd_hf.files import atomic_folder
from kd_hf.hub.artefact import load_lines
from kd_hf.layout import PAGE
from kd_hf.report import SAMPLES, figures, galleries
from kd_hf.report import facts as words
from kd_hf.report.attention import gaze
from kd_hf.report.page import Page, render
from kd_hf.report.probe import PLAIN, STUDENT, Sample, class_gains, confusions, linear_cka, look
from kd_hf.report.rows import networks as table_of_networks
from kd_hf.run.record import RunRecord
from kd_hf.version import __version__

if TYPE_CHECKING:
    import torch

    from kd_hf.data.source import Source
    from kd_hf.models.handle import ModelHandle


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
    page = Page(record.name, words.outcome(record), notes=words.state(record), version=__version__)
    page.tiles, page.metrics = words.tiles(record), words.metrics(record)
    page.networks = table_of_networks(record)
    page.facts, page.recipe = words.facts(record), words.beyond_defaults(record)
    for draw in (figures.accuracy, figures.losses, figures.schedule):
        with _noted(page, "A chart of the log is missing"):
            _add(page, draw(record))
    if words.is_finished(record):
        page.load = load_lines(record.student)
        with _noted(page, "The pictures of the networks are missing"):
            networks = _open_networks(record, teachers, device, page)
            images = source or record.task.open_images("eval")
            if record.task.pictures is not None:
                module, name = record.task.pictures.split(":")
                draw = getattr(import_module(module), name)
                draw(page, record, networks, images, device, samples, progress)
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
    options = {"pretrained": True, "trust_remote_code": record.recipe.student.trust_remote_code, "device": device}
    networks = {STUDENT: record.task.load(str(record.student), **options)}
    if teachers is not None:
        networks |= teachers
    else:
        for name, cfg in record.recipe.all_teachers().items():
            with _noted(page, f"Comparisons with the teacher '{name}' are missing, it cannot be opened"):
                networks[name] = load_network(cfg, record.task, cfg.num_classes, device)
    if record.plain is not None:
        with _noted(page, "The comparison with the plain student is missing, it cannot be opened"):
            networks[PLAIN] = record.task.load(str(record.plain.need()), **options)
    return networks


def add_classifiers(
    page: Page,
    record: RunRecord,
    networks: Mapping[str, ModelHandle],
    source: Source,
    device: str | torch.device,
    samples: int,
    progress: bool,
) -> None:
    """Pictures of what classifiers say, hold alike and look at."""
    sample = look(networks, source, samples=samples, progress=progress)
    _add_networks(page, networks, replace(sample, classes=_in_words(record, sample.classes)))


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
    with atomic_folder(folder, lambda name: name == PAGE or name.endswith(".png")) as temporary:
        for picture in page.pictures:
            (temporary / f"{picture.name}.png").write_bytes(picture.light)
        (temporary / PAGE).write_text(render(page), encoding="utf-8")
    return folder / PAGE
