"""What detectors find in some images, side by side, for the report and the model card."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from kd_hf.data.pixels import decode
from kd_hf.detection.data.categories import is_matched
from kd_hf.detection.data.loader import eval_loader
from kd_hf.detection.data.source import BoxSource
from kd_hf.detection.data.stage import BoxStage, Images
from kd_hf.detection.metrics.evaluator import BoxSubject, Finder, Predicted, Run
from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.detection.networks.info import DetectorInfo
from kd_hf.models.handle import ModelHandle
from kd_hf.recipe.config import BoxAugment, Recipe
from kd_hf.report.figures import WIDTH, Picture, Theme, picture, short
from kd_hf.report.page import Page
from kd_hf.report.probe import STUDENT, shadow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kd_hf.run.record import RunRecord

TRUTH = "annotated"
SHOWN = 4  # images
LOOKED = 2 * SHOWN  # images that are looked at
SURE = 0.3  # detections below this score are not drawn
MOST = 20  # detections drawn in an image
LONGEST = 800  # pixels of an image in the picture
NAME = 16  # letters of a class


@dataclass(frozen=True, eq=False)
class Found:
    """Boxes drawn in one image: left, top, right, bottom in its pixels, classes and scores (None: annotated)."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Shown:
    """An image, and what is in it by the annotations and by each network, in the order of the columns."""

    image: Image.Image
    found: Mapping[str, Found]


def add_detectors(
    page: Page,
    record: RunRecord,
    networks: Mapping[str, ModelHandle],
    source: BoxSource,
    device: str | torch.device,
    samples: int,
    progress: bool,
) -> None:
    """The picture of what detectors find, on a report's page."""
    drawn, others = side_by_side(networks, source, record.recipe, device, samples)
    if drawn is not None:
        page.pictures.append(drawn)
    for name in others:
        page.notes.append(f"What {name} finds is not shown: its classes are not the data's.")
    page.notes.append("Gains by class, likeness of features, attention and disagreements are for classifiers only.")


def side_by_side(
    networks: Mapping[str, ModelHandle],
    source: BoxSource,
    recipe: Recipe,
    device: str | torch.device,
    samples: int = LOOKED,
) -> tuple[Picture | None, list[str]]:
    """``detections.png``, and the names of networks that cannot be in it: their classes are not the data's.

    Args:
        networks: by name, on `device`; they are left as they are. The student is drawn last.
        source: the images.
        recipe: says how large images are shown.
        device: where the networks are.
        samples: look at this many images at most; those with objects are drawn first.
    """
    ordered = [*(name for name in networks if name != STUDENT), STUDENT]
    matched = [name for name in ordered if is_matched(source.class_names, networks[name].info.num_classes)]
    subjects = {name: BoxSubject(_runner(networks[name]), networks[name].info.preprocessing) for name in matched}
    augment = recipe.data.boxes.augment if recipe.data.boxes is not None else None
    seen = look(subjects, source, torch.device(device), min(samples, LOOKED), augment)
    shown = sorted(seen, key=lambda item: len(item.found[TRUTH].boxes) == 0)[:SHOWN]
    return detections(shown, source.class_names), [name for name in ordered if name not in matched]


def _runner(handle: ModelHandle) -> Run:
    """A copy that shares its weights, in eval mode and without gradient."""
    model = TappedDetector(shadow(handle), cast(DetectorInfo, handle.info)).eval()

    def run(images: Images) -> Predicted:
        with torch.no_grad():
            predicted: Predicted = model(images)
        return predicted

    return run


def look(
    subjects: Mapping[str, BoxSubject],
    source: BoxSource,
    device: torch.device,
    count: int = SHOWN,
    augment: BoxAugment | None = None,
    least: float = SURE,
) -> list[Shown]:
    """Run detectors on `count` images, taken evenly from all of a set.

    Args:
        subjects: detectors by name, in the order of the columns.
        source: the images.
        device: where the detectors are.
        count: of the images.
        augment: their sizes.
        least: score of a detection that is kept.
    """
    views = {name: subject.view for name, subject in subjects.items()}
    stage, finders = BoxStage(views), {name: Finder(source) for name in subjects}
    shown = []
    for batch in eval_loader(source, views, augment=augment, batch_size=1, max_samples=count):
        truth = batch.truth[0]
        if truth is None:
            continue
        images, _ = stage(batch.to(device))
        found = {TRUTH: Found(truth.boxes, truth.classes)}
        for name, subject in subjects.items():
            seen = finders[name].find(subject.run(images[name]), batch.size.to(device))
            scores, classes, boxes = (part[0].cpu().numpy() for part in (seen.scores, seen.classes, seen.boxes))
            best = np.argsort(-scores, kind="stable")[:MOST]
            best = best[(scores[best] >= least) & (classes[best] >= 0)]
            found[name] = Found(boxes[best], classes[best], scores[best])
        shown.append(Shown(decode(source.read(int(batch.row[0]))[0]), found))
    return shown


def detections(shown: Sequence[Shown], class_names: Sequence[str], least: float = SURE) -> Picture | None:
    """``detections.png``: images from above to below, what is annotated and what each network finds from left to right.

    Args:
        shown: the images, with the same networks for each.
        class_names: by number.
        least: score of a detection that was kept, for the caption.
    """
    if not shown:
        return None
    columns = list(shown[0].found)

    def draw(theme: Theme) -> Figure:
        cell = WIDTH / len(columns)
        heights = [cell * item.image.height / item.image.width for item in shown]
        close = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout=close)
        grid = figure.subplots(len(shown), len(columns), squeeze=False, height_ratios=heights)
        others = itertools.cycle(theme.cycle[1:])  # the teacher's colour first
        known = {TRUTH: theme.faint, "student": theme.student}
        colors = {name: known.get(name) or next(others) for name in columns}
        for axes, item in zip(grid, shown, strict=True):
            for axis, name in zip(axes, columns, strict=True):
                _draw_image(axis, item, item.found[name], class_names, (colors[name], theme.paper))
        for axis, name in zip(grid[0], columns, strict=True):
            axis.set_title(short(name), weight="bold", loc="center")
        return figure

    caption = (
        f"What is annotated, and what the networks find with a score of at least {100 * least:.0f} %: no more than "
        f"{MOST} detections of an image. Numbers are scores in percent."
    )
    return picture("detections", "What they find", caption, draw)


def _draw_image(axis: Axes, item: Shown, found: Found, class_names: Sequence[str], colors: tuple[str, str]) -> None:
    color, paper = colors
    small = item.image.copy()
    small.thumbnail((LONGEST, LONGEST))
    scale = small.width / item.image.width
    axis.imshow(np.asarray(small))
    axis.set(xticks=[], yticks=[], xlim=(0, small.width), ylim=(small.height, 0))
    for spine in axis.spines.values():
        spine.set_visible(False)
    scores = [None] * len(found.classes) if found.scores is None else found.scores.tolist()
    for box, number, score in zip(found.boxes * scale, found.classes.tolist(), scores, strict=True):
        left, top, right, bottom = box.tolist()
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.4))
        words = short(class_names[number], NAME) + ("" if score is None else f" {100 * score:.0f}")
        label = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        axis.text(left, max(top, 0), words, fontsize=5.5, color=paper, va="bottom", bbox=label, clip_on=True)
