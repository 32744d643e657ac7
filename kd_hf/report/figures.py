"""Charts of a run: one style, colours that colour-blind people tell apart, each drawn for light and dark pages."""

from __future__ import annotations

import io
import logging
import math
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from kd_hf.report.rows import rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kd_hf.report.probe import Gains
    from kd_hf.run.record import RunRecord

DPI = 150
WIDTH = 9.0  # inches
LONGEST_NAME = 26
# matplotlib's own font has no Chinese, Japanese or Korean letters: after it comes the first of each that is installed
FONTS = (
    ("Noto Sans CJK SC", "Noto Sans CJK TC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans TC", "Source Han Sans SC",
     "Source Han Sans CN", "Source Han Sans", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti",
     "Microsoft YaHei", "Microsoft JhengHei", "SimHei", "SimSun", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
     "Droid Sans Fallback", "AR PL UMing CN", "Arial Unicode MS"),
    ("Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "Source Han Sans", "Hiragino Sans",
     "Hiragino Kaku Gothic ProN", "Yu Gothic", "Meiryo", "MS Gothic", "IPAexGothic", "IPAGothic", "TakaoGothic",
     "VL Gothic"),
    ("Noto Sans CJK KR", "Noto Sans CJK JP", "Noto Sans KR", "Source Han Sans KR", "Source Han Sans K",
     "Apple SD Gothic Neo", "AppleGothic", "Malgun Gothic", "NanumGothic", "UnDotum", "Baekmuk Dotum"),
)  # fmt: skip
MARKED = 40  # a line of at most so many points shows each of them
SHOWN_CLASSES = 15  # at either end, where not all fit
ALL_CLASSES = 40
_PLAIN_NUMBERS = FuncFormatter(lambda value, place: f"{value:g}")  # the default writes formulas, which are turned off


@dataclass(frozen=True)
class Theme:
    """Colours of a page; `cycle` is Okabe and Ito's palette, lightened for dark paper."""

    paper: str
    ink: str
    faint: str
    grid: str
    cycle: tuple[str, ...]

    @property
    def student(self) -> str:
        """Colour of the student."""
        return self.cycle[0]

    @property
    def teacher(self) -> str:
        """Colour of the teacher."""
        return self.cycle[1]

    @property
    def plain(self) -> str:
        """Colour of the plain student."""
        return self.cycle[2]

    def settings(self) -> dict[Any, Any]:
        """matplotlib's settings for it."""
        settings: dict[Any, Any] = {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
        }
        settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), self.ink)
        settings |= {"xtick.color": self.faint, "ytick.color": self.faint, "axes.edgecolor": self.grid}
        settings |= {"xtick.labelcolor": self.ink, "ytick.labelcolor": self.ink, "grid.color": self.grid}
        settings |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
        settings |= {"font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.fontsize": 9}
        return settings


LIGHT = Theme(
    "#ffffff", "#1c2128", "#6a737d", "#dde2e8",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#6a737d"),
)  # fmt: skip
DARK = Theme(
    "#161a20", "#e8ebef", "#9aa4b0", "#333a44",
    ("#56b4e9", "#f0894a", "#2fc79a", "#e3a3c6", "#e6c84a", "#9ad6ff", "#b79ad6", "#9aa4b0"),
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure of the page: PNG bytes for light and dark paper, and its words."""

    name: str  # of its file, without .png
    title: str
    caption: str
    light: bytes
    dark: bytes


def picture(name: str, title: str, caption: str, draw: Callable[[Theme], Figure]) -> Picture:
    """Draw a figure on both papers."""
    return Picture(name, title, caption, _png(draw, LIGHT), _png(draw, DARK))


def _png(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(theme.settings()), any_letters():
        draw(theme).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


@contextmanager
def any_letters() -> Iterator[None]:
    """Draw the names that users give as they are written; silent about letters that no installed font has."""
    installed = set(font_manager.get_font_names())
    found = (next((name for name in names if name in installed), None) for names in FONTS)
    # a class may be called $ or _, which formulas are made of
    settings: dict[Any, Any] = {"font.family": ["DejaVu Sans", *dict.fromkeys(filter(None, found))],
                                "text.parse_math": False}  # fmt: skip
    log = logging.getLogger(font_manager.__name__)  # many of these fonts have no bold letters
    quiet = logging.Filter("no logger's name")  # so that nothing passes
    log.addFilter(quiet)
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.removeFilter(quiet)


def short(name: str, limit: int = LONGEST_NAME) -> str:
    """A name that fits into a picture, whose width is counted in Latin letters; a Chinese one has that of two."""
    ends = list(accumulate(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name))
    return name if not ends or ends[-1] <= limit else name[: bisect_right(ends, limit - 1)].rstrip() + "…"


def _label(name: str) -> str:
    """A name for a legend, which leaves out those that begin with an underscore."""
    return f" {short(name)}" if name.startswith("_") else short(name)


def _axes(count: int = 1, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.grid(axis="y", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
    return figure, axes


def _steps(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _line(axis: Axes, points: Sequence[tuple[int, float]], **style: Any) -> None:
    marker = style.pop("marker", "o") if len(points) <= MARKED else ""
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, **{"marker": marker, "markersize": 4, "linewidth": 1.8, **style})


def _legend_below(figure: Figure) -> None:
    handles, labels = figure.axes[1].get_legend_handles_labels()
    columns = max(1, min(len(labels), 110 // (6 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower right", ncols=columns)


def series(record: RunRecord, key: str) -> list[tuple[int, float]]:
    """(step, value) of a logged number, where it is finite."""
    return [(step, value) for step, value in record.series(key) if math.isfinite(value)]


# --- from the log -------------------------------------------------------------------------------------------------


def losses(record: RunRecord) -> Picture | None:
    """``losses.png``: the total, and every part before its weight."""
    total = series(record, "loss")
    parts = {name: points for name in record.parts() if (points := series(record, name))}
    if not total and not parts:
        return None

    def draw(theme: Theme) -> Figure:
        figure, axes = _axes(2 if parts else 1)
        if total:
            _line(axes[0], total, color=theme.ink)
        _steps(axes[0], "total loss (weighted sum)")
        for index, (name, points) in enumerate(parts.items()):
            dashes = ("-", "--", ":", "-.")[index // len(theme.cycle) % 4]
            color = theme.cycle[index % len(theme.cycle)]
            _line(axes[1], points, color=color, linestyle=dashes, label=_label(name))
        if parts:
            _steps(axes[1], "parts, before their weights")
            _legend_below(figure)
        for axis, lines in zip(axes, ([total], parts.values()), strict=False):
            _log_scale_where_it_helps(axis, [value for points in lines for _, value in points])
        return figure

    caption = (
        "Each point is the mean since the point before. A loss against soft targets may keep their entropy, so it need "
        "not fall to zero."
    )
    return picture("losses", "Losses", caption, draw)


def _log_scale_where_it_helps(axis: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_PLAIN_NUMBERS)
        axis.yaxis.set_minor_formatter(NullFormatter())


def accuracy(record: RunRecord) -> Picture | None:
    """``accuracy.png``: the student over steps, beside its plain twin and its teachers."""
    score = record.score
    own = series(record, score.logged)
    plain = series(record.plain, score.logged) if record.plain is not None else []
    teachers = [row for row in rows(record) if row.name in record.recipe.all_teachers() and row.score is not None]
    if not own and not plain:
        return None

    def draw(theme: Theme) -> Figure:
        figure, (axis,) = _axes(height=3.6)
        if own:
            label = "distilled student" if record.recipe.all_teachers() else "student"
            _line(axis, own, color=theme.student, label=label)
        if plain:
            _line(axis, plain, color=theme.plain, marker="s", label="plain student", linestyle="--")
        elif record.plain_score is not None:
            axis.axhline(record.plain_score, color=theme.plain, linestyle="--", label="plain student, as published")
        for index, row in enumerate(teachers):
            color = theme.cycle[1] if index == 0 else theme.cycle[2 + index % (len(theme.cycle) - 2)]
            axis.axhline(row.score or 0.0, color=color, linestyle=":", linewidth=1.8, label=_label(row.name))
        _steps(axis, f"{score.name} on held-out images" + (", %" if score.sign else ""))
        axis.legend(loc="lower right")
        return figure

    caption = f"{score.beginning} on the evaluation images over training"
    caption += "; the gap between the two students is what distilling gave." if own and plain else "."
    return picture("accuracy", score.title, caption, draw)


def schedule(record: RunRecord) -> Picture | None:
    """``schedule.png``: learning rate and weights of the losses over steps."""
    rate = series(record, "lr")
    weights = {name: points for name in record.weights() if (points := series(record, f"weight/{name}"))}
    if not rate:
        return None

    def draw(theme: Theme) -> Figure:
        figure, axes = _axes(2 if weights else 1, height=2.8)
        _line(axes[0], rate, color=theme.ink)
        axes[0].set_ylim(bottom=0)
        axes[0].yaxis.set_major_formatter(_PLAIN_NUMBERS)
        _steps(axes[0], "learning rate")
        for index, (name, points) in enumerate(weights.items()):
            # wide below narrow, so that equal weights all show
            width = 1.8 + 2.2 * (len(weights) - 1 - index)
            color = theme.cycle[index % len(theme.cycle)]
            _line(axes[1], points, color=color, linewidth=width, marker="", label=_label(name))
        if weights:
            axes[1].set_ylim(bottom=min(0.0, axes[1].get_ylim()[0]))
            _steps(axes[1], "weights of the losses")
            _legend_below(figure)
        return figure

    return picture("schedule", "Schedule", "What the optimiser and the balance of the losses did at each step.", draw)


# --- from the networks --------------------------------------------------------------------------------------------


def classes(gains: Gains) -> Picture:
    """``classes.png``: gain over the plain twin or the teacher by class, the best and worst of many classes."""
    total = len(gains.names)
    everything = total <= ALL_CLASSES
    picked = list(range(total))
    if not everything:
        picked = [*range(SHOWN_CLASSES), *range(total - SHOWN_CLASSES, total)]
    # a free row between the two ends
    heights = [-float(row) - (not everything and row >= SHOWN_CLASSES) for row in range(len(picked))]

    def draw(theme: Theme) -> Figure:
        figure, (axis,) = _axes(height=1.1 + 0.27 * len(picked))
        values = gains.difference[picked]
        colors = [theme.student if value >= 0 else theme.teacher for value in values]
        axis.barh(heights, values, color=colors, height=0.72)
        axis.axvline(0.0, color=theme.faint, linewidth=1)
        axis.grid(False, axis="y")
        axis.grid(True, axis="x", linewidth=0.8)
        axis.spines["left"].set_visible(False)
        axis.set_yticks(heights, [short(gains.names[index]) for index in picked])
        axis.set_ylim(min(heights) - 0.7, 0.7)
        _write_beside_bars(axis, gains, picked, heights, theme)
        against = f"student minus {gains.against}, points" if gains.against else "accuracy of the student, %"
        axis.set_title(against if everything else f"{against}: the {SHOWN_CLASSES} best and worst of {total} classes")
        return figure

    return picture("classes", "Class by class", _class_caption(gains), draw)


def _write_beside_bars(axis: Axes, gains: Gains, picked: Sequence[int], heights: Sequence[float], theme: Theme) -> None:
    """The accuracies themselves, in a column to the right."""
    for index, height in zip(picked, heights, strict=True):
        text = f"{gains.student[index]:.0f} %"
        if gains.other is not None:
            text = f"{gains.other[index]:.0f} → {text}"
        axis.annotate(
            text, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=theme.faint
        )


def _class_caption(gains: Gains) -> str:
    least, most = int(gains.counts.min()), int(gains.counts.max())
    number = f"{least}" if least == most else f"{least} to {most}"
    weight = 100.0 / max(1.0, float(np.median(gains.counts)))
    text = f"Top-1 by class over {number} labelled images each: one image is about {weight:.1f} points"
    if gains.against is None:
        return f"{text}. There is nothing to compare the student with."
    return f"{text}. To the right, the {gains.against}'s accuracy → the student's."


def similarity(matrices: Mapping[str, np.ndarray], student: Sequence[str], teachers: Mapping[str, Sequence[str]],
               images: int) -> Picture:  # fmt: skip
    """``cka.png``: CKA of every depth of the student with every depth of each teacher.

    Args:
        matrices: by teacher, ``[student taps, teacher taps]``.
        student: its taps.
        teachers: taps by teacher.
        images: that the features are of.
    """

    def draw(theme: Theme) -> Figure:
        count = len(matrices)
        height = 1.5 + min(4.5, max(1.2, 0.36 * len(student)))
        figure, axes = _axes(count, height)
        colours = matplotlib.colormaps["viridis"].with_extremes(bad=theme.grid)
        for axis, (name, values) in zip(axes, matrices.items(), strict=True):
            axis.grid(False)
            drawn = axis.imshow(values, cmap=colours, vmin=0.0, vmax=1.0, origin="lower", aspect="auto")
            _depth_ticks(axis, student, teachers[name])
            axis.set_xlabel(f"{short(name)}: input → output")
            axis.set_ylabel("student: input → output")
            if values.size <= 200:
                _write_cells(axis, values)
        figure.colorbar(drawn, ax=axes, label="CKA", fraction=0.03, pad=0.02).outline.set_visible(False)
        return figure

    caption = (
        f"Linear CKA over {images} images, from 0 (nothing in common) to 1 (the same up to rotation and scale). "
        "A bright diagonal means that the student builds its features in the order the teacher does."
    )
    return picture("cka", "How alike the features are", caption, draw)


def _depth_ticks(axis: Axes, student: Sequence[str], teacher: Sequence[str]) -> None:
    for side, taps in ((axis.yaxis, student), (axis.xaxis, teacher)):
        every = math.ceil(len(taps) / 14)
        side.set_ticks(range(0, len(taps), every), [tap.replace(":", " ") for tap in taps[::every]])
    if len(teacher) > 5:
        axis.tick_params(axis="x", labelrotation=90)


def _write_cells(axis: Axes, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            color = "#1c2128" if value > 0.6 else "#ffffff"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
