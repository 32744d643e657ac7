"""The page of whole runs: complete, self-contained, escaped, and there when something is missing."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.report.build import write_report
from kd_hf.report.page import Page, render
from kd_hf.run.record import RunRecord
from tests.report.conftest import run_lines, write_run
from tests.runs import TEACHER, recipe, run

PICTURES = {"losses", "accuracy", "schedule", "classes", "cka", "attention", "disagreements"}


class Reader(HTMLParser):
    """Tags that are open and closed in order, and every attribute."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def read_page(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w+\.|url\(|@import|<script|<link", text)
    reader = Reader(text)
    for tag, name, value in reader.attributes:
        if name in ("src", "srcset", "href"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:50])
    return reader


def pictures_of(folder):
    return {path.stem for path in folder.glob("*.png")}


def sources(reader):
    return [base64.b64decode(value.partition(",")[2]) for tag, name, value in reader.attributes if name == "src"]


def test_command_writes_the_whole_page(copied):
    done = run("kd_hf.report", str(copied), "--samples", "200", "--use-cpu")
    assert done.returncode == 0, done.stderr
    assert f"report    {copied}/report/index.html" in done.stdout
    folder = copied / "report"
    assert pictures_of(folder) == PICTURES
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in PICTURES} | {"index.html"}
    page = read_page(folder / "index.html")
    embedded = sources(page)
    assert sorted(embedded) == sorted(path.read_bytes() for path in folder.glob("*.png"))
    assert "The distilled student reaches" in page.words and "points" in page.words
    assert "student says" in page.words and "class-token attention" in page.words
    assert "feature energy of stage" in page.words  # the teacher is a CNN
    assert 'class="notes"' not in (folder / "index.html").read_text()  # nothing is missing


def test_wrong_arguments_are_one_line(tmp_path):
    from kd_hf.report.__main__ import main

    with pytest.raises(UserError, match="no run folder"):
        main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="--samples"):
        main([str(tmp_path), "--samples", "0"])


def test_a_teacher_that_is_gone_costs_one_sentence(copied):
    record = RunRecord.read(copied)
    recipe_with = record.recipe.model_copy(
        update={"teacher": record.recipe.teacher.model_copy(update={"model": "./gone"})}
    )
    page = read_page(write_report(RunRecord(copied, recipe_with, record.log), samples=40))
    assert "Comparisons with the teacher 'teacher' are missing" in page.words and "./gone" in page.words
    assert pictures_of(copied / "report") >= {"losses", "accuracy", "classes", "attention", "disagreements"}
    assert "cka" not in pictures_of(copied / "report")


def test_data_that_is_gone_leaves_the_log(copied):
    record = RunRecord.read(copied)
    data = record.recipe.data.model_copy(update={"path": "/no/such/folder"})
    changed = RunRecord(copied, record.recipe.model_copy(update={"data": data}), record.log)
    (copied / "report").mkdir(exist_ok=True)
    (copied / "report" / "cka.png").write_bytes(b"of an older report")
    page = read_page(write_report(changed))
    assert "The pictures of the networks are missing: data.path: the folder" in page.words
    assert pictures_of(copied / "report") == {"losses", "accuracy", "schedule"} & pictures_of(copied / "report")
    assert "cka" not in pictures_of(copied / "report")


def test_handles_and_source_that_are_given_are_used(copied):
    from kd_hf.data.opening import open_source
    from kd_hf.recipe.config import DataConfig

    shutil.rmtree(copied / "plain")
    teacher = load_model("test_resnet", num_classes=10, image_size=32)
    teacher.network.to(torch.bfloat16)
    record = RunRecord.read(copied)
    data = record.recipe.data.model_copy(update={"path": "/no/such/folder"})
    changed = RunRecord(copied, record.recipe.model_copy(update={"data": data}), record.log)
    source = open_source(DataConfig(path="builtin:digits"), "eval")
    page = read_page(write_report(changed, teachers={"teacher": teacher}, source=source, samples=40))
    assert pictures_of(copied / "report") == PICTURES
    assert "student minus" not in page.words and "the teacher's accuracy → the student's" in page.words
    assert next(teacher.network.parameters()).dtype == torch.bfloat16


def test_an_unfinished_run_is_reported_from_its_log(tmp_path):
    record = write_run(tmp_path, recipe(tmp_path, {"teacher": TEACHER}), *run_lines(71.0))
    page = read_page(write_report(record))
    assert "The training has not ended (step 4): the student is not there yet" in page.words
    assert pictures_of(tmp_path / "report") == {"losses", "accuracy", "schedule"}
    assert "Load the student" not in page.words


def test_a_run_that_measured_nothing(tmp_path):
    page = read_page(write_report(write_run(tmp_path, recipe(tmp_path))))
    assert "has not been evaluated yet" in page.words and not pictures_of(tmp_path / "report")


def test_what_fails_inside_a_network_does_not_end_a_run(copied):
    config = copied / "student" / "config.json"
    values = json.loads(config.read_text())
    values["architecture"] = "no_such_network"
    config.write_text(json.dumps(values))
    page = read_page(write_report(RunRecord.read(copied)))
    assert "The pictures of the networks are missing" in page.words and "no_such_network" in page.words


def test_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\""
    handle = load_model("test_efficientnet", num_classes=10, image_size=32)
    handle.label_names = tuple(f"{index} {evil}" for index in range(10))
    folder = tmp_path / "<b>run"
    record = write_run(folder, recipe(folder, {"student": {"model": "test_efficientnet"}}), *run_lines(71.0))
    save_student(handle, record.student)
    values = json.loads((record.student / "config.json").read_text())
    values["label_descriptions"] = {str(index): f"{index} {evil}" for index in range(10)}
    (record.student / "config.json").write_text(json.dumps(values))
    page = read_page(write_report(record, samples=60))
    assert evil in page.words and "<b>run" in page.words  # as text, where a class is named in the table


def test_a_page_with_nothing_in_it_is_well_formed():
    assert Reader(render(Page("t", "$x ${y}"))).words.startswith("t t $x ${y}")
