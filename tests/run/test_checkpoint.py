"""Checkpoints: whole or absent, checked when read, pruned last."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.run import checkpoint as ckpt
from kd_hf.run.identity import DataFacts, Identity
from kd_hf.run.state import FORMAT, CheckpointState

TENSORS = {"module": {"weight": torch.arange(6.0).view(2, 3).t(), "count": torch.tensor(3)}}
OBJECTS = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}
DATA = {"train": DataFacts(4, ("a", "ü"), None, "0f"), "eval": DataFacts(2, ("a", "ü"), "main", "1e")}
RUN = Identity("0123456789ab", 8, {"train": {"learning_rate": 1e-4}}, DATA, {"teacher": "ff"})


def state(step: int) -> CheckpointState:
    """With a value of every kind."""
    kept = {"EarlyStopping": {"counter": 1, "by number": {1: 0.1}}}
    return CheckpointState(step, RUN, 2, 3, 0.1 + 0.2, 1, (3, 5), 1.5, kept, True)


def write(folder: Path, step: int) -> Path:
    path = folder / f"{ckpt.PREFIX}{step}"
    ckpt.save_checkpoint(path, state(step), TENSORS, OBJECTS)
    return path


def test_reads_back_what_was_written(tmp_path):
    path = write(tmp_path, 7)
    read = ckpt.read_state(path)
    assert read == replace(state(7), callbacks={"EarlyStopping": {"counter": 1, "by number": {"1": 0.1}}})
    ckpt.check_files(path)
    loaded = ckpt.load_tensors(path, "module")
    assert all(loaded[key].equal(value) for key, value in TENSORS["module"].items())
    assert ckpt.load_objects(path, "optimizer")["param_groups"] == [{"lr": 0.1}]


def test_shared_memory_is_saved(tmp_path):
    weight = torch.ones(3)
    ckpt.save_checkpoint(tmp_path / "checkpoint-1", state(1), {"module": {"a": weight, "b": weight}}, {})
    assert ckpt.load_tensors(tmp_path / "checkpoint-1", "module")["b"].equal(weight)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, number):
    before = write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        write(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]
    assert ckpt.read_state(before).step == 1


def test_a_crash_while_writing_leaves_no_checkpoint_of_that_name(tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1)
    assert ckpt.list_checkpoints(tmp_path) == []


def test_unfinished_folder_of_a_killed_process_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".tmp-checkpoint-3").mkdir()
    (tmp_path / "checkpoint-2").mkdir()  # no state.json
    assert ckpt.list_checkpoints(tmp_path) == []
    write(tmp_path, 3)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [3]


def test_no_permission_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file", 1)


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.pt"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [("missing", "is missing"), ("short", "another size"), ("bit", "another checksum"), ("folder", "cannot be read")],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, told):
    path = write(tmp_path, 1)
    target = path / name
    if damage == "short":
        target.write_bytes(target.read_bytes()[:-4])
    elif damage == "bit":
        flip(target, -1)
    else:
        target.unlink()
    if damage == "folder":
        target.mkdir()
        told = "another size|cannot be read"
    with pytest.raises(UserError, match=rf"checkpoint-1 is damaged: {name} .*({told})"):
        ckpt.check_files(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "{}", '{"format": 2}', '{"format": 2, "files": {}}', '{"format": 2, "files": [1]}',
     '{"format": 1, "files": {}}', '{"format": 1, "files": {"a": "b"}, "recipe_hash": "x", "global_batch": 8}',
     '{"format": 1, "files": {}, "recipe_hash": 1, "global_batch": [], "step": "x"}', "[" * 100_000],
)  # fmt: skip
def test_a_state_that_is_none_is_refused_in_a_line(tmp_path, text):
    path = write(tmp_path, 1)
    (path / ckpt.STATE).write_text(text)
    with pytest.raises(UserError, match=r"is damaged: |is not a kd_hf checkpoint"):
        ckpt.read_state(path)
        ckpt.check_files(path)


def test_a_changed_state_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    text = (path / ckpt.STATE).read_text()
    (path / ckpt.STATE).write_text(text.replace('"best_step": 1', '"best_step": 2'))
    with pytest.raises(UserError, match=r"state\.json is not as it was written"):
        ckpt.read_state(path)


def test_a_state_of_a_later_version_is_refused(tmp_path):
    path = write(tmp_path, 1)
    content = json.loads((path / ckpt.STATE).read_text())
    del content["sum"]
    content["format"] = FORMAT + 1
    (path / ckpt.STATE).write_text(json.dumps(content | {"sum": ckpt._sum_of(content)}))
    with pytest.raises(UserError, match=r"another version of kd_hf \(format 3; this one reads 1 to 2\)"):
        ckpt.read_state(path)


def test_the_version_before_is_read(tmp_path):
    """As it wrote: the recipe's hash and the sizes of files, neither sums nor what the data was."""
    path = write(tmp_path, 4)
    sizes = {name: (path / name).stat().st_size for name in ckpt.files_of(path)}
    old = {"step": 4, "processes": 2, "cpu_threads": 1, "best_metric": 9.5, "best_step": 2, "corrupt": [7],
           "seconds": 2.5, "callbacks": {}, "recipe_hash": "0123456789ab", "global_batch": 16,
           "format": 1, "files": sizes}  # fmt: skip
    (path / ckpt.STATE).write_text(json.dumps(old))
    read = ckpt.read_state(path)
    assert read == CheckpointState(4, Identity("0123456789ab", 16), 2, 1, 9.5, 2, (7,), 2.5)
    ckpt.check_files(path)
    (path / "module.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="another size"):
        ckpt.check_files(path)


def test_only_plain_values_are_unpickled(tmp_path):
    path = write(tmp_path, 1)
    torch.save({"state": Path("x")}, path / "optimizer.pt")
    with pytest.raises(UserError, match=r"cannot read optimizer\.pt"):
        ckpt.load_objects(path, "optimizer")


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, [4, 5]), (2, 1, [1, 4, 5]), (None, None, [1, 2, 3, 4, 5])]
)
def test_prune_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        write(tmp_path, step)
    ckpt.prune(tmp_path, keep, best)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == left


def test_a_kill_while_pruning_leaves_nothing(tmp_path, monkeypatch):
    for step in range(1, 4):
        write(tmp_path, step)

    def killed(path, **options):
        (path / ckpt.STATE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        ckpt.prune(tmp_path, 1, None)
    monkeypatch.undo()
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [2, 3]
    ckpt.tidy_checkpoints(tmp_path)
    ckpt.prune(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_is_no_checkpoint_of_ours_is_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-7 (copy)", "checkpoint-²", "checkpoint-1.5"):
        shutil.copytree(write(tmp_path, 1), tmp_path / name)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")  # of transformers
    others = sorted(path.name for path in tmp_path.iterdir() if path.name != "checkpoint-1")
    with pytest.raises(UserError, match="checkpoint-2 is in the way"):
        write(tmp_path, 2)
    write(tmp_path, 3)
    ckpt.prune(tmp_path, 1, None)
    ckpt.tidy_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "checkpoint-3"])


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [3, 20, 100]
