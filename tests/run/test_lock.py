"""One run in a folder: who has it, who waits, and that the dead have nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_hf.errors import UserError
from kd_hf.layout import LOCK
from kd_hf.run.lock import RunLock, locked
from tests.runs import environment

HOLD = """
import os, sys, time
from pathlib import Path
from kd_hf.run.lock import RunLock
answer = RunLock(Path(sys.argv[1])).acquire()
if os.fork() == 0:  # as a worker process, which outlives a parent that is killed
    os.close(1)
    time.sleep(30)
print(answer, flush=True)
time.sleep(30)
"""


class Holder:
    """Another process that has a lock."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLD, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), process_group=0)
        assert self.process.stdout is not None
        self.answer = self.process.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path):
    """One that has the lock of ``run``; its children are ended with it."""
    held = Holder(tmp_path / "run")
    assert held.answer == "None"
    yield held
    os.killpg(held.process.pid, signal.SIGKILL)
    held.process.wait()


def test_a_second_process_is_told_who_is_there(tmp_path, holder):
    told = RunLock(tmp_path / "run").acquire()
    assert told is not None and told.startswith(f"process {holder.process.pid} on {os.uname().nodename}, since 20")
    with pytest.raises(UserError, match=rf"is in use by process {holder.process.pid} on .* or choose another folder"):
        locked(RunLock(tmp_path / "run")).__enter__()


def test_a_dead_owner_has_nothing_though_its_children_live(tmp_path, holder):
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.wait()
    lock = RunLock(tmp_path / "run")
    assert lock.acquire() is None
    lock.release()


def test_the_patient_wait_until_it_is_free(tmp_path, holder, monkeypatch, capsys):
    def sleep(seconds: float) -> None:
        os.kill(holder.process.pid, signal.SIGKILL)
        holder.process.wait()

    monkeypatch.setattr(time, "sleep", sleep)
    with locked(RunLock(tmp_path / "run"), patient=True):
        assert (tmp_path / "run" / LOCK).is_file()
    assert capsys.readouterr().out.startswith(f"waiting for process {holder.process.pid} on ")


def test_it_is_one_for_a_process_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    outer, inner = RunLock(folder), RunLock(folder)
    assert outer.acquire() is None and inner.acquire() is None
    inner.release()
    assert Holder(folder).answer.startswith(f"process {os.getpid()} on ")  # the outer one has it still
    outer.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_stays(tmp_path):
    lock = RunLock(tmp_path / "a" / "b")
    lock.acquire()
    (tmp_path / "a" / "mine").write_text("")
    lock.release()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("name", "told"), [("x" * 300, "File name too long"), ("file/run", "Not a directory"), ("file", "File exists")]
)
def test_a_folder_that_cannot_be_is_one_line(tmp_path, name, told):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write .*: {told}"):
        RunLock(tmp_path / name).acquire()
