"""Pictures made of evaluation images: where the networks look, and what they disagree about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch.nn import functional as F

from kd_hf.report.figures import WIDTH, Picture, Theme, picture, short
from kd_hf.report.probe import STUDENT, Confusion, Sample, confusions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kd_hf.report.attention import Gaze

COLUMNS = 6  # of the disagreements
TILES = 24
TILES_A_PAIR = 4
LINE = 24  # letters that fit below a tile
LINE_HEIGHT = 0.145  # inches


def gazes(images: np.ndarray, found: Mapping[str, Gaze]) -> Picture:
    """``attention.png``: the images, and below them where each network looks.

    Args:
        images: uint8 ``[G, 3, S, S]``.
        found: maps ``[G, h, w]`` by network, teachers first.
    """

    def draw(theme: Theme) -> Figure:
        count = len(images)
        cell = WIDTH / (count + 1.1)
        close = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.015, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=(WIDTH, cell * (len(found) + 1) + 0.15), layout=close)
        grid = figure.subplots(len(found) + 1, count + 1, squeeze=False, width_ratios=[1.1, *[1.0] * count])
        for row, (name, seen) in enumerate([("image", None), *found.items()]):
            _row_name(grid[row][0], name, seen, theme)
            for axis, image, place in zip(grid[row][1:], images, range(count), strict=True):
                _image(axis, image if seen is None else _grey(image))
                if seen is not None:
                    heat = _stretched(seen.maps[place], images.shape[-1])
                    axis.imshow(heat, cmap="inferno", alpha=0.65, vmin=0.0, vmax=1.0)
        return figure

    kinds = {
        seen.kind: [short(other) for other, same in found.items() if same.kind == seen.kind] for seen in found.values()
    }
    shown = "; ".join(f"{' and '.join(names)}: {kind}" for kind, names in kinds.items())
    caption = f"Bright is where a network looks, each map on a scale of its own. Shown for {shown}."
    return picture("attention", "Where they look", caption, draw)


def _row_name(axis: Axes, name: str, seen: Gaze | None, theme: Theme) -> None:
    axis.axis("off")
    axis.text(1.0, 0.5, short(name, 16), ha="right", va="center", weight="bold", transform=axis.transAxes)
    if seen is not None:
        height, width = seen.maps.shape[1:]
        place: dict[str, Any] = {"ha": "right", "va": "center", "transform": axis.transAxes}
        axis.text(1.0, 0.3, f"{height} × {width} cells", fontsize=7.5, color=theme.faint, **place)


def _image(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image.transpose(1, 2, 0), interpolation="nearest" if image.shape[-1] < 64 else "auto")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.broadcast_to(image.mean(0).astype(np.uint8), image.shape)


def _stretched(values: torch.Tensor, side: int) -> np.ndarray:
    """A map from its least to its greatest value as 0 to 1, at the image's size."""
    values = torch.nan_to_num(values.double())
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp_min(1e-12)
    return F.interpolate(scaled[None, None], side, mode="bilinear", align_corners=False)[0, 0].numpy()


def disagreements(sample: Sample, pairs: Sequence[Confusion]) -> Picture | None:
    """``disagreements.png``: images on which the student differs from its teacher (or the label), pair by pair."""
    chosen = [index for pair in pairs for index in pair.images[:TILES_A_PAIR]][:TILES]
    if not chosen:
        return None

    lines = 2 * (1 + (sample.reference is not None)) + 1

    def draw(theme: Theme) -> Figure:
        count, side = -(-len(chosen) // COLUMNS), 0.94 * WIDTH / COLUMNS
        words = LINE_HEIGHT * (lines + 1.2)
        figure = Figure(figsize=(WIDTH, count * (side + words)))
        # a place of its own for everything: automatic layouts make the pictures smaller for longer names
        axes = figure.subplots(count, COLUMNS, squeeze=False).ravel()
        figure.subplots_adjust(0.0, words / (count * (side + words)), 1.0, 1.0, wspace=0.06, hspace=words / side)
        for axis, index in zip(axes, chosen, strict=False):
            _image(axis, sample.pictures[index])
            _words(axis, sample, index, theme, LINE_HEIGHT / side)
        for axis in axes[len(chosen) :]:
            axis.axis("off")
        return figure

    other = short(sample.reference) if sample.reference else "label"
    caption = (
        f"Images on which student and {other} differ, the most frequent pairs first, the surest choices first within "
        "a pair. Percent are the probabilities each network gives its own choice; ✓ and ✗ say who is right."
    )
    return picture("disagreements", "The largest disagreements", caption, draw)


def _words(axis: Axes, sample: Sample, index: int, theme: Theme, line_height: float) -> None:
    """Student's and teacher's choice and the label, below a tile."""
    label = int(sample.label[index])
    networks = [(STUDENT, theme.student), *([(sample.reference, theme.teacher)] if sample.reference else [])]
    lines: list[tuple[str, str]] = []
    for name, color in networks:
        choice, sure = int(sample.choice[name][index]), float(sample.confidence[name][index])
        sign = "" if label < 0 else " ✓" if choice == label else " ✗"
        lines.append((f"{short(name, LINE - 8)} {100 * sure:.0f} %{sign}", color))
        lines.append((short(sample.classes[choice], LINE), color))
    lines.append((f"label: {short(sample.classes[label], LINE - 7)}" if label >= 0 else "no label", theme.ink))
    style: dict[str, Any] = {"transform": axis.transAxes, "fontsize": 7.5, "ha": "center", "va": "top"}
    for row, (text, color) in enumerate(lines):
        axis.text(0.5, -(row + 0.35) * line_height, text, color=color, **style)


def pair_table(sample: Sample) -> list[tuple[str, ...]]:
    """The ten most frequent pairs as rows of text below a head."""
    other = sample.reference or "label"
    head = ("student says", f"{other} says", "images", "student right", f"{other} right")
    lines: list[tuple[str, ...]] = [head]
    for pair in confusions(sample)[:10]:
        labels = sample.label[list(pair.images)]
        known = bool((labels >= 0).any())
        right = (int((labels == pair.student).sum()), int((labels == pair.other).sum()))
        counts = (str(count) if known else "" for count in right)
        lines.append((sample.classes[pair.student], sample.classes[pair.other], str(len(pair.images)), *counts))
    return lines
