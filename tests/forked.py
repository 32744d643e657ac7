"""``python -m …`` in a process forked from one that has imported what runs need, which takes seconds each time.

For tests of what a command does; how an interpreter or a launcher starts one is the subject of `tests.runs.run` and
`tests.test_two_processes.accelerate_launch`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

from tests.runs import ROOT, environment

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kd_hf.train.trainer", "kd_hf.metrics.measure", "kd_hf.report.build", "datasets"])


def _run(command: tuple[str, ...], folder: Path, variables: Mapping[str, str], output: tuple[str, ...]) -> None:
    """In the fork: what ``python -m …`` does after its start."""
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


class Fork:
    """``python -m …``, started in `folder`; `variables` are added to its environment."""

    def __init__(self, *command: str, folder: Path = ROOT, **variables: str) -> None:
        self.command, self.kept = command, tempfile.TemporaryDirectory()
        self.output = tuple(str(Path(self.kept.name) / name) for name in ("out", "err"))
        args = (command, folder, environment() | variables, self.output)
        self.process = SERVER.Process(target=_run, args=args)
        with mock.patch.dict(os.environ, environment(), clear=True):  # not what a test has changed
            forkserver.ensure_running()
        self.process.start()

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for it; what it wrote."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.command, timeout)
        out, err = (Path(path).read_text() if Path(path).exists() else "" for path in self.output)
        self.kept.cleanup()
        return subprocess.CompletedProcess(self.command, self.process.exitcode, out, err)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m …`` to its end."""
    return Fork(*command).end()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(count: int, **others: str) -> list[dict[str, str]]:
    """The variables that a launcher sets for each of several processes; `others` in place of those for one machine."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world = meet | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | others for rank in range(count)]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m …`` in two processes that know each other; one that fails ends the other."""
    both = [Fork(*command, **variables) for variables in ranks(2)]
    connection.wait([one.process.sentinel for one in both], timeout=300)
    if any(one.process.exitcode for one in both):
        for one in both:
            one.process.kill()
    done = [one.end() for one in both]
    out, err = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, max(abs(one.returncode) for one in done), out, err)
