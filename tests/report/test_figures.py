"""Figures from odd numbers and odd names: they are drawn, at the documented files, in both themes."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from kd_hf.report import figures, galleries
from kd_hf.report.attention import Gaze
from kd_hf.report.probe import STUDENT, Gains, Sample, confusions
from tests.report.conftest import run_lines, write_run
from tests.runs import TEACHER, recipe


def opened(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def check(picture, name):
    """A picture on white paper and the same on dark paper, not empty."""
    light, dark = opened(picture.light), opened(picture.dark)
    assert picture.name == name and light.shape == dark.shape and light.shape[1] == 450
    assert light[-1, 0].tolist() == [255, 255, 255] and dark[-1, 0].max() < 40
    assert min(len(np.unique(image.reshape(-1, 3), axis=0)) for image in (light, dark)) > 20


def test_charts_of_a_log(tmp_path):
    record = write_run(tmp_path, recipe(tmp_path, {"teacher": TEACHER, "baseline": 50.0}), *run_lines(71.0))
    for name in ("losses", "accuracy", "schedule"):
        check(getattr(figures, name)(record), name)


def test_no_numbers_no_charts(tmp_path):
    record = write_run(tmp_path, recipe(tmp_path), {"step": 0, "models": {}})
    assert [draw(record) for draw in (figures.losses, figures.accuracy, figures.schedule)] == [None] * 3


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    record = write_run(tmp_path, recipe(tmp_path))
    values = [1.0, float("nan"), 3.0, float("inf")]
    with (tmp_path / "log.jsonl").open("a") as file:
        for step, value in enumerate(values):
            file.write(f'{{"step": {step}, "loss": {str(value).replace("nan", "NaN").replace("inf", "Infinity")}}}\n')
    record = type(record).read(tmp_path)
    assert figures.series(record, "loss") == [(0, 1.0), (2, 3.0)]
    check(figures.losses(record), "losses")


def test_many_and_strange_names(tmp_path):
    parts = {f"_block_{index}$/{index}_{{x}}": 1.0 + index for index in range(40)}
    record = write_run(tmp_path, recipe(tmp_path), {"step": 1, "loss": 1.0, **parts}, {"step": 2, "loss": 0.0, **parts})
    check(figures.losses(record), "losses")


@pytest.mark.parametrize(("total", "against"), [(1, None), (10, "plain student"), (1000, "plain student")])
def test_classes_of_any_number(total, against):
    names = tuple(f"$x^{{{index}}}$ <b> 犬 {'long ' * 9}" for index in range(total))
    student = np.linspace(100.0, 0.0, total)
    other = np.full(total, 40.0) if against else None
    picture = figures.classes(Gains(names, np.full(total, 2), student, other, against))
    check(picture, "classes")
    assert opened(picture.light).shape[0] < 550
    assert "one image is about 50.0 points" in picture.caption


def test_similarity_with_holes_and_several_teachers():
    taps = {"a": ["block:0", "stage:1"], "b": [f"stage:{index}" for index in range(30)]}
    matrices = {"a": np.array([[0.5, np.nan]]), "b": np.full((1, 30), 1.0)}
    check(figures.similarity(matrices, ["pre_logits"], taps, 7), "cka")


def test_gazes_of_other_resolutions_and_flat_maps():
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 32, 32), np.uint8)
    maps = {"teacher": Gaze("attention", torch.rand(2, 7, 7)), STUDENT: Gaze("attention", torch.zeros(2, 1, 2))}
    maps["c"] = Gaze("energy", torch.full((2, 3, 3), float("nan")))
    picture = galleries.gazes(images, maps)
    check(picture, "attention")
    assert "teacher and student: attention; c: energy" in picture.caption


def disagreeing(count, classes=("犬 $1", "<b>")):
    pictures = {index: np.full((3, 8, 8), index, np.uint8) for index in range(count)}
    label = np.arange(count) % 3 - 1
    sure = np.full(count, 0.5)
    return Sample(classes, label, {STUDENT: np.zeros(count, int), "t": np.ones(count, int)},
                  {STUDENT: sure, "t": sure}, pictures=pictures)  # fmt: skip


@pytest.mark.parametrize("count", [1, 7])
def test_disagreements(count):
    sample = disagreeing(count)
    check(galleries.disagreements(sample, confusions(sample)), "disagreements")


def test_pairs_say_who_is_right():
    table = galleries.pair_table(disagreeing(7))
    assert table == [
        ("student says", "t says", "images", "student right", "t right"),
        ("犬 $1", "<b>", "7", "2", "2"),
    ]


def test_no_disagreement_no_picture():
    sample = disagreeing(0)
    assert galleries.disagreements(sample, confusions(sample)) is None
    assert len(galleries.pair_table(sample)) == 1


def square_font(path, family, letters):
    """A font in which each of some letters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, font = pen.glyph(), FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"uni{ord(letter):04X}" for letter in letters})
    font.setupGlyf(dict.fromkeys(names, square))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.fixture
def no_fonts(monkeypatch):
    """matplotlib as on a machine with its own fonts only; what is added is forgotten."""
    folder = matplotlib.get_data_path()
    own = [entry for entry in font_manager.fontManager.ttflist if entry.fname.startswith(folder)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def squares(picture):
    """How many places of its light half are 5 × 5 pixels of ink."""
    dark = (opened(picture.light).max(2) < 90).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(dark, (5, 5))
    return int(windows.all((2, 3)).sum())


@pytest.mark.parametrize(
    ("family", "letter"),
    [("WenQuanYi Zen Hei", "犬"), ("IPAGothic", "い"), ("Noto Sans CJK JP", "개")],
)
def test_letters_are_drawn_where_a_font_has_them(no_fonts, tmp_path, caplog, family, letter):
    names = (letter * 3, "cat")
    gains = Gains(names, np.full(2, 2), np.array([100.0, 0.0]), None, None)
    maps = {letter * 3: Gaze("attention", torch.rand(1, 3, 3))}  # its name is bold
    images = np.full((1, 3, 8, 8), 255, np.uint8)
    without = [squares(figures.classes(gains)), squares(galleries.gazes(images, maps))]
    square_font(tmp_path / "font.ttf", family, letter)
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    found = [squares(figures.classes(gains)), squares(galleries.gazes(images, maps))]
    assert all(more > less for more, less in zip(found, without, strict=True)), (found, without)
    assert not caplog.records


def test_a_long_name_is_cut_by_its_width():
    assert figures.short("a" * 26) == "a" * 26 and figures.short("犬" * 13) == "犬" * 13
    assert figures.short("a" * 27) == "a" * 25 + "…"
    assert figures.short("犬" * 14) == "犬" * 12 + "…"
    assert figures.short("ab 犬犬", 4) == "ab…"
