"""Names that mean something outside a run: Hub ids, losses and their weights."""

import json

import pytest

from kd_hf.files import write_text
from kd_hf.layout import LOG, RESOLVED
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.lineage import (
    dataset_id,
    dataset_kind,
    distilling,
    hub_id,
    network_name,
    only_body,
    origin,
    shown_path,
    weight_text,
)
from kd_hf.run.record import RunRecord
from tests.runs import recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def record(folder, *blocks, models=None, train=""):
    """A run folder that holds a recipe and the first line of a log."""
    write_text(folder / RESOLVED, dump_recipe(recipe(folder, *blocks)))
    write_text(folder / LOG, json.dumps({"step": 0, "models": models or {}, "data": {"train": train}}) + "\n")
    return RunRecord.read(folder)


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [
        ("resnet18", COMMIT, "timm/resnet18.a1_in1k"),  # the weights that timm means by the bare name
        ("timm/resnet50.a2_in1k", COMMIT, "timm/resnet50.a2_in1k"),
        ("hf-hub:org/name@v1", COMMIT, "org/name"),
        ("org/name", COMMIT, "org/name"),
        ("runs/name", None, None),  # a folder, gone or not
        ("runs/name", "main", None),
        ("../name", COMMIT, None),
    ],
)
def test_hub_ids_of_teachers(tmp_path, model, revision, expected):
    note = {"name": model, "parameters": 1, "architecture": "x", "revision": revision}
    run = record(tmp_path, {"teacher": {"model": model}}, models={"teacher": note})
    assert hub_id(run, "teacher") == expected


def test_weights_that_were_not_read_have_no_origin_on_the_hub(tmp_path):
    note = {"name": "org/name", "parameters": 1, "architecture": "vit", "revision": COMMIT}
    run = record(tmp_path, {"student": {"model": "org/name", "pretrained": False}}, models={"student": note})
    assert (hub_id(run, "student"), origin(run, "student")) == (None, "random weights")
    given = record(tmp_path, {"student": {"model": "given:mine"}}, models={"student": note})
    assert (origin(given, "student"), network_name(given, "student")) == ("handed over in Python", "vit")


@pytest.mark.parametrize(
    ("source", "revision", "expected", "alone"),
    [
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", COMMIT, "timm/swin_tiny_patch4_window7_224.ms_in1k", True),
        ("org/detector", COMMIT, "org/detector", False),  # of which all was read, so the body's own were not
        ("bodies/swin", None, None, False),
    ],
)
def test_a_detector_that_began_with_a_body(tmp_path, source, revision, expected, alone):
    """What was read is what the log says."""
    body = "timm/swin_tiny_patch4_window7_224.ms_in1k"
    note = {"name": "x", "source": source, "parameters": 1, "architecture": "kd_hf_vidt", "revision": revision}
    blocks = {"student": {"model": "kd_hf/vidt_tiny", "body": body}, "data": {"boxes": {}}}
    run = record(tmp_path, blocks, models={"student": note})
    assert (hub_id(run, "student"), only_body(run, "student")) == (expected, alone)


@pytest.mark.parametrize(
    ("path", "described", "expected", "kind"),
    [
        ("org/set", "org/set, split train (3 images, 2 classes)", "org/set", "org/set"),
        ("photos/birds", "photos/birds/train (3 images, 2 classes)", None, "imagefolder"),
        ("/data/x", "/data/x, split train (3 images)", None, "imagefolder"),
        ("builtin:digits", "builtin:digits (train, 1078 images, 10 classes)", None, "digits"),
    ],
)
def test_hub_ids_of_data(tmp_path, path, described, expected, kind):
    run = record(tmp_path, {"data": {"path": path}}, train=described)
    assert (dataset_id(run), dataset_kind(run)) == (expected, kind)


def test_a_folder_is_no_data_set_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = record(tmp_path / "run", {"data": {"path": "org/set"}}, train="org/set, split train (3 images)")
    assert dataset_id(run) == "org/set"
    (tmp_path / "org" / "set").mkdir(parents=True)
    assert dataset_id(run) is None


def test_paths_are_told_by_their_last_part():
    assert [shown_path(path) for path in ("/home/me/photos", "org/set", "builtin:digits")] == [
        "photos", "org/set", "builtin:digits"]  # fmt: skip


def test_losses_without_weight_are_left_out(tmp_path):
    methods = {"task": {"weight": 0}, "kd": {}, "second": {"method": "kd"}, "nkd": {"weight": 0}}
    assert distilling(recipe(tmp_path, {"teacher": {"model": "x"}, "methods": methods})) == ["kd"]


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (0.5, "0.5"),
        ({"warmup": [0, 1, "5 epochs"]}, "0 → 1 over 5 epochs, linear"),
        ({"cosine": [1, 0.1, 0.25]}, "1 → 0.1 over 0.25 of the run, cosine"),
        ({"one_minus": "kd"}, "1 − kd"),
    ],
)
def test_weights_in_words(tmp_path, weight, text):
    made = recipe(tmp_path, {"methods": {"task": {"weight": weight}, "kd": {}}, "teacher": {"model": "x"}})
    assert weight_text(made.methods["task"].weight) == text
