"""The page of a detector: precision instead of accuracy, and what each network finds."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from kd_hf.hub.artefact import load_lines
from kd_hf.report.build import write_report
from kd_hf.report.closing import closing_text
from kd_hf.report.detections import side_by_side
from kd_hf.report.facts import outcome, tiles
from tests.detection.runs import MODEL, SIZES, detector_run
from tests.report.test_page import pictures_of, read_page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of a detector."""
    folder = tmp_path_factory.mktemp("detector")
    teacher = detector_run(folder / "teacher", seed=1)
    block = {"model": str(teacher.path), "gate": {"enabled": False}}
    return detector_run(folder / "run", {"teacher": block, "baseline": 40.0}, eval_teacher_ap=50.125)


def test_the_page_shows_what_the_networks_find(run):
    path = write_report(run)
    assert pictures_of(path.parent) == {"accuracy", "losses", "detections"}
    words = read_page(path).words
    assert "reaches 41.5 AP, 1.5 points above the plain one and 8.6 below its teacher" in words
    assert "What they find" in words and "are for classifiers only" in words
    assert "missing" not in words and "top-1" not in words


def test_closing_text_and_its_line_that_loads(run):
    text = closing_text(run)
    assert text.splitlines()[1].split() == ["network", "AP", "parameters", "train", "s"]
    assert ("41.50", "AP of the distilled student") in tiles(run) and outcome(run).startswith("The distilled student")
    (line,) = load_lines(run.student)
    names = {"transformers": transformers}
    exec(line, names)
    found = names["model"].eval()(torch.rand(1, 3, 64, 96))
    assert found.pred_boxes.shape == (1, SIZES["num_queries"], 4)


def test_networks_of_other_classes_are_left_out_of_the_picture(run):
    source = run.task.open_images("eval")
    networks = {"student": run.task.load(str(run.student), pretrained=True)}
    alone, _ = side_by_side(networks, source, run.recipe, "cpu")
    networks["teacher"] = run.task.load(MODEL, kwargs=SIZES, num_classes=7)
    drawn, others = side_by_side(networks, source, run.recipe, "cpu")
    assert others == ["teacher"] and drawn.light == alone.light
    pixels = np.asarray(Image.open(io.BytesIO(drawn.light)).convert("RGB"), np.int16)
    reds = (pixels[..., 0] > 200) & (pixels[..., 1:].max(-1) < 60)
    assert reds.any()  # the first of a scene's rectangles: images with objects are preferred
