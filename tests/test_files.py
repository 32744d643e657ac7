"""Atomic writing: a folder or file is the old one or the new one, never a mixture."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.files import atomic_folder, write_text, writing


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("kd_hf.files._exchange", lambda first, second: False)
    for names in (("a", "b"), ("c",)):
        with atomic_folder(tmp_path / "target") as folder:
            for name in names:
                (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "old").write_text("")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "target") as folder:
        (folder / "new").write_text("")
        _ = 1 / 0
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".tmp-target").mkdir()
    (tmp_path / ".tmp-target" / "half").write_text("")
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["whole"]


def test_text_is_replaced_in_one_step(tmp_path):
    write_text(tmp_path / "a" / "file", "one")
    write_text(tmp_path / "a" / "file", "two")
    assert (tmp_path / "a" / "file").read_text() == "two"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (RuntimeError("[enforce fail] No space left on device"), "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write .*x: Permission denied"),
    ],
)
def test_system_errors_become_one_line(tmp_path, error, message):
    with pytest.raises(UserError, match=message), writing(tmp_path / "x"):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="interrupted"), writing(tmp_path / "x"):
        raise OSError(errno.EINTR, "interrupted")


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_full_disk_behind_torchs_writer(size):
    """torch reports only what its archive writer noticed; the system's word is further up the chain."""
    with (
        pytest.raises(UserError, match="no space left on the disk"),
        writing(Path("/dev/full")),
        Path("/dev/full").open("wb") as file,
    ):
        torch.save({"weight": torch.zeros(size)}, file)
