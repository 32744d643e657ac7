"""The card of a detector: its task for the Hub's machines, its precision, and a program that finds objects."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from kd_hf.detection.metrics.evaluator import BoxSubject
from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.hub.card import model_card, write_card
from kd_hf.report.detections import look
from tests.detection.runs import detector_run
from tests.detection.scenes import NAMES, scene
from tests.hub.test_card import cells, sections


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of a detector, and the plain one as given."""
    folder = tmp_path_factory.mktemp("detector")
    teacher = detector_run(folder / "teacher", seed=1)
    block = {"model": str(teacher.path), "gate": {"enabled": False}}
    return detector_run(folder / "run", {"teacher": block, "baseline": 40.0}, eval_teacher_ap=50.125)


def test_front_matter_is_of_a_detector(run):
    data = ModelCard(model_card(run)).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "object-detection")
    assert data.tags[:2] == ["object-detection", "knowledge-distillation"]
    assert data.metrics == ["mean_average_precision"]
    results = {result.metric_name: result for result in data.eval_results}
    assert {result.task_type for result in results.values()} == {"object-detection"}
    assert (results["AP"].metric_type, results["AP"].metric_value) == ("mean_average_precision", 41.5)
    assert results["AR100"].metric_value == 55.0


def test_precision_stands_beside_teacher_and_plain_student(run):
    parts = sections(model_card(run))
    head, *rows = cells(parts["Results"])
    assert head[2:6] == ["AP", "AP50", "AP small", "parameters"]
    found = {row[0]: row[2:5] for row in rows[1:]}
    assert found == {
        "this model": ["41.50", "60.25", "20.00"],
        "plain student, as given": ["40.00", "–", "–"],
        "teacher": ["50.12", "–", "–"],
    }
    assert "AP against the plain student: +1.50 points." in parts["Results"]
    training = {row[0]: row[1] for row in cells(parts["Training"])}
    assert training["preprocessing"].startswith("the shortest side 64 pixels, the longest at most 160, bilinear; mean")
    assert training["augmentation"].startswith("hflip 0.5, crop 0.0")
    assert "An object detector" in model_card(run) and "classifier" not in model_card(run)


def test_the_program_finds_what_the_evaluation_finds(run, tmp_path, monkeypatch):
    image = scene(1)
    (tmp_path / "image.jpg").write_bytes(image.data)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", model_card(run), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    said = [(name, [float(number) for number in rest]) for name, *rest in map(str.split, out.getvalue().splitlines())]
    handle = run.task.load(str(run.student), pretrained=True)
    subjects = {"student": BoxSubject(torch.no_grad()(TappedDetector(handle, handle.info).eval()),
                                      handle.info.preprocessing)}  # fmt: skip
    source, augment = run.task.open_images("eval"), run.recipe.data.boxes.augment
    shown = look(subjects, source, torch.device("cpu"), len(source), augment)[1]
    assert shown.image.tobytes() == image.image.tobytes()
    seen = shown.found["student"]
    assert len(seen.boxes) > 3 and len(said) >= len(seen.boxes)
    for number, score, box in zip(seen.classes, seen.scores, seen.boxes, strict=True):
        near = [values for name, values in said if name == NAMES[number]]
        assert any(
            values == [pytest.approx(score, abs=0.01), *(pytest.approx(side, abs=1.5) for side in box)]
            for values in near
        )


def test_pictures_of_the_data_stay_at_home(run):
    run.report.mkdir(exist_ok=True)
    for name in ("accuracy", "detections"):
        Image.new("RGB", (2, 2)).save(run.report / f"{name}.png")
    write_card(run)
    assert [path.name for path in (run.student / "report").iterdir()] == ["accuracy.png"]
    assert "AP on held-out images over training steps" in (run.student / "README.md").read_text()
    hub = run.recipe.hub.model_copy(update={"data_pictures": True})
    write_card(replace(run, recipe=run.recipe.model_copy(update={"hub": hub})))
    assert len(list((run.student / "report").iterdir())) == 2
    assert "What teacher and student find, beside what is there:" in (run.student / "README.md").read_text()
