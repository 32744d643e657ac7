"""The closing text of a run, and the sentence about its outcome."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers

from kd_hf.hub.artefact import load_lines, save_student
from kd_hf.models.load import load_model
from kd_hf.report.closing import closing_text, finish_report
from kd_hf.report.facts import outcome, state, tiles
from kd_hf.report.rows import student_score
from kd_hf.text.terminal import table
from tests.report.conftest import run_lines, write_run
from tests.runs import TEACHER, recipe


def rows_of(text):
    return {line.split("  ")[0]: line.split() for line in text.splitlines() if line}


def test_table_is_aligned():
    lines = table([("", "name", "number"), ("a", "long name", "1.5"), ("bbb", "x", "100.25")])
    assert lines == [
        "     name       number",
        "---  ---------  ------",
        "a    long name     1.5",
        "bbb  x          100.25",
    ]


def test_distilled_student_beside_its_teacher(tmp_path):
    made = recipe(tmp_path, {"teacher": TEACHER, "baseline": 66.6})
    record = write_run(tmp_path, made, *run_lines(71.234, eval_teacher_top1=80.5))
    rows = rows_of(finish_report(made))
    assert rows["teacher"][1:] == ["test_resnet", "80.50", "1,234,567"]
    assert rows["plain student"][-1] == "66.60"
    assert rows["distilled student"][2:] == ["test_vit", "71.23", "371,234", "12"]
    text = closing_text(record)
    assert "load it with" not in text  # there is no student yet
    assert "The training has not ended (step 4): the student is not there yet" in text
    assert f"python -m kd_hf.report {tmp_path}" in text
    assert ("+4.63", "points over the plain student") in tiles(record)


def test_what_was_published_stands_beside_what_was_measured(tmp_path):
    made = recipe(tmp_path, {"teacher": TEACHER, "published": {"score": 72.5, "source": "them"}})
    earlier = {"step": 1, "eval_top1": 73.25}
    write_run(tmp_path, made, *run_lines(71.234)[:1], earlier, *run_lines(71.234)[1:])
    rows = [row for row in finish_report(made).splitlines() if row.startswith("distilled student")]
    measured = [[part for part in row.split("  ") if part.strip()][1:3] for row in rows]
    assert [[cell.strip() for cell in row] for row in measured] == [
        ["test_vit", "71.23"],
        ["at its best evaluation", "73.25"],
        ["as published by them", "72.50"],
    ]


def test_twin_and_trained_teacher_are_read_from_their_own_runs(tmp_path):
    started = {"step": 0, "models": {"student": {"name": "big_net", "parameters": 9}}}
    write_run(tmp_path / "teacher", recipe(tmp_path / "teacher"), started, {"step": 1, "train_seconds": 77})
    made = recipe(tmp_path / "run", {"teacher": {"model": str(tmp_path / "teacher")}, "baseline": "train"})
    write_run(tmp_path / "run" / "plain", recipe(tmp_path / "run" / "plain"), *run_lines(60.0, seconds=3.0))
    rows = rows_of(closing_text(write_run(tmp_path / "run", made, *run_lines(71.0, eval_teacher_top1=80.5))))
    assert rows["teacher"][1:3] == ["big_net", "80.50"]
    assert rows["teacher"][-1] == "77"
    assert rows["plain student"][2:] == ["test_vit", "60.00", "371,234", "3"]


def test_without_a_teacher_nothing_is_called_distilled(tmp_path):
    text = closing_text(write_run(tmp_path, recipe(tmp_path, {"data": {"num_labels": 50}}), *run_lines(71.0)))
    assert "distilled" not in text
    assert "Labels of 50 training images were used." in text


@pytest.mark.parametrize(("unlabelled", "also"), [("keep", True), ("drop", False)])
def test_few_labels_are_explained(tmp_path, unlabelled, also):
    made = recipe(tmp_path, {"teacher": TEACHER, "data": {"num_labels": 50, "unlabelled": unlabelled}})
    text = closing_text(write_run(tmp_path, made, *run_lines(71.0)))
    assert ("teacher's outputs on the others" in text) is also


def test_the_lines_that_are_shown_load_the_student(tmp_path):
    record = write_run(tmp_path, recipe(tmp_path))
    save_student(load_model("test_vit", num_classes=3, image_size=32), tmp_path / "student")
    text = closing_text(record)
    lines = load_lines(tmp_path / "student")
    assert len(lines) == 2 and all(f"  {line}" in text.splitlines() for line in lines)
    for line in lines:
        names = {"timm": timm, "transformers": transformers}
        exec(line, names)
        output = names["model"].eval()(torch.ones(1, 3, 32, 32))
        assert getattr(output, "logits", output).shape == (1, 3)


def test_top1_is_that_of_the_exported_weights(tmp_path):
    lines = [{"step": step, "eval_top1": top1} for step, top1 in ((1, 50.0), (2, 70.0), (3, 60.0))]
    last = write_run(tmp_path / "last", recipe(tmp_path / "last"), *lines)
    made = recipe(tmp_path / "best", {"train": {"load_best_model_at_end": True}})
    assert (student_score(last), student_score(write_run(tmp_path / "best", made, *lines))) == (60.0, 70.0)


@pytest.mark.parametrize(
    ("blocks", "measured", "expected"),
    [
        ({}, {}, "The student is at 91.2 % top-1."),
        ({"baseline": 90.2}, {}, "The student is at 91.2 % top-1, 1.0 point above the plain one."),
        (
            {"teacher": TEACHER, "baseline": 80.0},
            {"eval_teacher_top1": 92.0},
            "The distilled student is at 91.2 % top-1, 11.2 points above the plain one and 0.8 below its teacher, "
            "with 30 % of the teacher's parameters.",
        ),
        (
            {"teachers": {"a": TEACHER, "b": TEACHER}, "baseline": 91.2},
            {"eval_a_top1": 92.0, "eval_b_top1": 91.0},
            "The distilled student is at 91.2 % top-1, level with the plain one, 0.8 below teacher 'a' and "
            "0.2 above teacher 'b'.",
        ),
    ],
)
def test_outcome_in_words(tmp_path, blocks, measured, expected):
    record = write_run(tmp_path, recipe(tmp_path, blocks), *run_lines(91.2, **measured))
    assert outcome(record) == expected


def test_a_run_that_went_wrong_says_so(tmp_path):
    start = {"step": 0, "models": {}, "total_steps": 9}
    record = write_run(tmp_path, recipe(tmp_path), start, {"step": 7, "error": "kd/soft is not finite"})
    assert outcome(record) == "The student has not been evaluated yet."
    assert state(record)[0] == "The run stopped at step 7: kd/soft is not finite."
    assert "has not ended (step 7 of 9)" in state(record)[1]
