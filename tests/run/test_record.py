"""Reading run folders."""

import pytest

from kd_hf.errors import UserError
from kd_hf.files import write_text
from kd_hf.layout import RESOLVED
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.log import JsonLines
from kd_hf.run.record import NetworkNote, RunRecord
from tests.runs import TEACHER, recipe

STUDENT = {"name": "test_vit", "parameters": 3, "library": "timm", "architecture": "test_vit", "revision": None}


def make_run(folder, *lines, **blocks):
    write_text(folder / RESOLVED, dump_recipe(recipe(folder, blocks)))
    log = JsonLines(folder, 0)
    for line in lines:
        log.write(line)
    return folder


def test_a_run_is_read_with_its_numbers(tmp_path):
    run = make_run(
        tmp_path / "run",
        {"step": 0, "models": {"student": STUDENT}, "macs": {"student": 7}, "data_revision": {"train": "c0"}},
        {"step": 1, "loss": 3.0, "task/ce": 2.0, "kd/soft": None, "weight/kd": 0.5},
        {"step": 2, "loss": None, "task/ce": 1.0, "weight/kd": 0.25},
        {"step": 2, "eval_top1": 40.0, "eval_teacher_top1": 90.0},
        {"step": 4, "eval_top1": 50.0},
        teacher=TEACHER,
        methods={"kd": {}},
        baseline=45.0,
    )
    record = RunRecord.read(run)
    assert record.name == "run"
    assert record.networks == {"student": NetworkNote(**STUDENT)}
    assert (record.macs("student"), record.macs("teacher")) == (7, None)
    assert (record.data_commit("train"), record.data_commit("eval")) == ("c0", None)
    assert record.series("task/ce") == [(1, 2.0), (2, 1.0)]
    assert record.series("loss") == [(1, 3.0)]
    assert record.last("loss") == 3.0
    assert record.metrics() == {"top1": 50.0, "teacher_top1": 90.0}
    assert record.parts() == ["kd/soft", "task/ce"]
    assert record.weights() == ["kd"]
    assert record.plain_score == 45.0
    assert record.trained_teacher("teacher") is None


def test_plain_twin_and_trained_teacher_are_runs_of_their_own(tmp_path):
    make_run(tmp_path / "teacher", {"step": 1, "train_seconds": 7.0})
    run = make_run(tmp_path / "run", teacher={**TEACHER, "model": str(tmp_path / "teacher")}, baseline="train")
    make_run(run / "plain", {"step": 3, "eval_top1": 33.0})
    record = RunRecord.read(run)
    assert record.plain_score == 33.0
    assert record.trained_teacher("teacher").last("train_seconds") == 7.0


def test_what_is_no_run_folder_is_told_with_the_nearest_name(tmp_path):
    make_run(tmp_path / "distilled")
    with pytest.raises(UserError, match=r"no run folder '.*distiled'\. Did you mean 'distilled'"):
        RunRecord.read(tmp_path / "distiled")
    with pytest.raises(UserError, match=r"is no run folder: it holds no recipe\.resolved\.yaml"):
        RunRecord.read(tmp_path)
    with pytest.raises(UserError, match=r"holds no student yet \(its training has not ended\)"):
        RunRecord.read(tmp_path / "distilled").need()


def test_a_run_of_another_version_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / RESOLVED
    path.write_text(path.read_text() + "lottery: true\n")
    with pytest.raises(UserError, match=r"written by another version of kd_hf: .*lottery"):
        RunRecord.read(run)
