"""Checkpoints: whole or absent, checked when read, pruned last."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.run import checkpoint as ckpt

TENSORS = {"module": {"weight": torch.arange(6.0).view(2, 3).t(), "count": torch.tensor(3)}}
OBJECTS = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}


def write(folder: Path, step: int) -> Path:
    path = folder / f"{ckpt.PREFIX}{step}"
    ckpt.save_checkpoint(path, {"step": step}, TENSORS, OBJECTS)
    return path


def test_reads_back_what_was_written(tmp_path):
    path = write(tmp_path, 7)
    assert ckpt.read_state(path)["step"] == 7
    loaded = ckpt.load_tensors(path, "module")
    assert all(loaded[key].equal(value) for key, value in TENSORS["module"].items())
    assert ckpt.load_objects(path, "optimizer")["param_groups"] == [{"lr": 0.1}]


def test_shared_memory_is_saved(tmp_path):
    weight = torch.ones(3)
    ckpt.save_checkpoint(tmp_path / "checkpoint-1", {"step": 1}, {"module": {"a": weight, "b": weight}}, {})
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
    assert ckpt.read_state(before)["step"] == 1


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


@pytest.mark.parametrize("damage", ["missing", "short", "other_format", "no_state"])
def test_damage_is_noticed(tmp_path, damage):
    path = write(tmp_path, 1)
    target = path / "module.safetensors"
    if damage == "missing":
        target.unlink()
    elif damage == "short":
        target.write_bytes(target.read_bytes()[:-4])
    elif damage == "other_format":
        (path / ckpt.STATE).write_text((path / ckpt.STATE).read_text().replace('"format": 1', '"format": 99'))
    else:
        (path / ckpt.STATE).write_text("{")
    with pytest.raises(UserError, match=r"damaged|another version|not a kd_hf checkpoint"):
        ckpt.read_state(path)


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


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    assert [ckpt.step_of(path) for path in ckpt.list_checkpoints(tmp_path)] == [3, 20, 100]
