"""What a run may begin with: its own checkpoints, whole ones, in a folder that nobody else uses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.layout import ENDING, LOG, REPORT, RESOLVED, STUDENT
from kd_hf.run.checkpoint import save_checkpoint
from kd_hf.run.folder import OtherRun, RunFolder, is_trained
from kd_hf.run.ownership import check_own
from kd_hf.run.state import CheckpointState
from tests.runs import recipe

TENSORS = {"module": {"weight": torch.arange(6.0)}}


class Images:
    """Of which only facts are asked."""

    class_names, revision, rows = ("a", "b"), None, "0f"

    def __len__(self) -> int:
        return 9

    def fingerprint(self) -> str:
        return self.rows


def folder_of(path: Path, *blocks, batch: int = 8, **images) -> RunFolder:
    """A run that begins, with images of other facts."""
    data = Images()
    vars(data).update(images)
    return RunFolder(recipe(path, *blocks), batch, {"train": data, "eval": Images()}, {})


def write(run: RunFolder, *steps: int, **state) -> None:
    """Checkpoints, as of a run that was killed."""
    run.write_recipe()
    for step in steps:
        save_checkpoint(run.checkpoint_of(step), CheckpointState(step, run.identity, **state), TENSORS, {})


def finish(run: RunFolder, step: int = 4) -> None:
    """A student with its card."""
    run.student.mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        (run.student / name).write_text(name)
    shutil.copy(run.path / RESOLVED, run.student)
    run.end(step, described=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_it_begins_at_the_first_step_or_at_the_newest_checkpoint(tmp_path):
    run = folder_of(tmp_path)
    assert run.begin(None).step == 0
    write(run, 2, 10)
    assert run.begin(None).checkpoint == run.checkpoint_of(10)
    assert run.begin(str(run.checkpoint_of(2))).step == 2
    finish(run)
    assert run.begin(None).whole and is_trained(run.recipe)
    assert not run.begin(True).whole  # a checkpoint is demanded


def test_one_that_is_demanded_and_not_there(tmp_path):
    for resume in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(UserError, match=r"there is no checkpoint in|is not a kd_hf checkpoint"):
            folder_of(tmp_path).begin(resume)


@pytest.mark.parametrize("name", ["module.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(tmp_path, name):
    run = folder_of(tmp_path)
    write(run, 2, 4)
    flip(run.checkpoint_of(4) / name)
    start = run.begin(None)
    assert start.step == 2
    (note,) = start.notes
    assert "checkpoint-4 is " in note and note.endswith("; the one before it is taken")
    with pytest.raises(UserError, match="checkpoint-4 is "):
        run.begin(str(run.checkpoint_of(4)))
    flip(run.checkpoint_of(2) / name)
    with pytest.raises(UserError, match=r"checkpoint-4 is .*; .*checkpoint-2 is .*; start over with .*=false"):
        run.begin(None)


@pytest.mark.parametrize("damage", ["gone", "bit"])
def test_the_best_checkpoint_is_forgotten_when_it_is_no_more(tmp_path, damage):
    run = folder_of(tmp_path, {"train": {"load_best_model_at_end": True}})
    write(run, 2, 4, best_step=2, best_metric=9.0)
    assert run.begin(None).state.best_step == 2
    if damage == "gone":
        shutil.rmtree(run.checkpoint_of(2))
    else:
        flip(run.checkpoint_of(2) / "module.safetensors")
    start = run.begin(None)
    assert start.step == 4 and (start.state.best_step, start.state.best_metric) == (None, None)
    assert "it was the best so far, the best of the evaluations to come is exported instead" in start.notes[0]
    with pytest.raises(UserError, match="the same command exports the last weights instead"):
        run.whole_checkpoint(2)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": {"seed": 1}}, "train.seed was 0 and is 1"),
        ({"rows": "1e"}, "the training images have other labels or another order"),
        ({"class_names": ("a", "c")}, "'b' is gone, 'c' is new"),
        ({"batch": 16}, "a step took 8 images and takes 16"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, change, told, ended):
    run = folder_of(tmp_path)
    write(run, 2)
    if ended:
        finish(run)
    other = folder_of(tmp_path, change) if "train" in change else folder_of(tmp_path, **change)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OtherRun, match="belongs to another run: ") as error:
        other.begin(None)
    assert told in str(error.value) and str(error.value).endswith("start over with train.resume_from_checkpoint=false")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert other.begin(False).step == 0  # the advice


def test_start_over_removes_what_runs_write_and_nothing_else(tmp_path):
    run = folder_of(tmp_path)
    write(run, 2)
    finish(run)
    for name in (LOG, f"{REPORT}/index.html", ".unfinished/x", ".push/x", ".fetch/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    mine = ["notes.md", "student/onnx/model.onnx", "report/table.csv"]
    mine += ["checkpoints/best.pth", "checkpoints/checkpoint-7/x"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    run.begin(False)
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(mine)


def test_a_killed_process_is_tidied_up_after(tmp_path):
    run = folder_of(tmp_path)
    write(run, 2)
    left = [".tmp-student/a", ".gone-student/b", ".tmp-log.jsonl", ".push/a", ".unfinished/c"]
    left += ["checkpoints/.tmp-checkpoint-4/m", "checkpoints/.gone-checkpoint-1/state.json"]
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".tmp-mine").write_text("")
    run.begin(None)
    kept = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(kept) == [".tmp-mine", "checkpoints/checkpoint-2/module.safetensors",
                            "checkpoints/checkpoint-2/state.json", RESOLVED]  # fmt: skip


def test_a_student_that_was_being_replaced_comes_back(tmp_path):
    """Killed between the two renames of a system that cannot exchange names."""
    run = folder_of(tmp_path)
    write(run, 2)
    finish(run)
    run.student.rename(tmp_path / ".old-student")
    assert run.begin(None).whole


# ------------------------------------------------------------------------------------------------ whose it is


@pytest.mark.parametrize("name", ["report/page.html", "student/homework.md", "checkpoints/epoch1.pth", LOG, RESOLVED])
def test_what_somebody_else_wrote_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"step": 1}\n')
    for resume in (None, False, True):
        with pytest.raises(UserError, match=rf"holds '{name.partition('/')[0]}', which kd_hf did not write"):
            folder_of(tmp_path).begin(resume)
    assert (tmp_path / name).read_text() == '{"step": 1}\n'


def test_other_files_and_empty_folders_are_nobodys_business(tmp_path):
    for name in ("report", "student", "src"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.py").write_text("")
    check_own(tmp_path)
    run = folder_of(tmp_path)
    write(run, 2)
    shutil.copytree(run.checkpoints, tmp_path / "copy" / "checkpoints")  # of a checkpoint, to go on elsewhere
    check_own(tmp_path / "copy")


def test_the_folder_of_a_student_is_no_run_folder(tmp_path):
    run = folder_of(tmp_path)
    write(run, 2)
    finish(run)
    with pytest.raises(UserError, match="is the folder of a student"):
        folder_of(tmp_path / STUDENT).begin(None)


def test_only_a_whole_student_of_the_recipe_is_trained(tmp_path):
    run = folder_of(tmp_path)
    assert not is_trained(run.recipe)
    write(run, 4)
    finish(run)
    assert is_trained(run.recipe) and not is_trained(recipe(tmp_path, {"train": {"seed": 1}}))
    run.end(4, described=False)
    assert not is_trained(run.recipe)
    (tmp_path / ENDING).unlink()
    assert is_trained(run.recipe)  # as a version wrote it that kept no ending
    flip(run.student / "README.md")
    assert is_trained(run.recipe)  # people edit cards
    run.end(4, described=True)
    flip(run.student / "model.safetensors")
    assert not is_trained(run.recipe)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "identity": 3}', "[" * 100_000])
def test_a_damaged_ending_is_none(tmp_path, text):
    run = folder_of(tmp_path)
    write(run, 4)
    finish(run)
    (tmp_path / ENDING).write_text(text)
    assert run.begin(None).whole  # the student speaks for itself


def test_the_state_of_a_checkpoint_survives_the_way_through_a_file(tmp_path):
    run = folder_of(tmp_path)
    write(run, 2, ended=True, corrupt=(1,))
    assert run.begin(None).state == replace(CheckpointState(2, run.identity), ended=True, corrupt=(1,))
