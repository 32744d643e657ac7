"""Checks in processes of their own, several side by side, each with its time; results are written as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kd_hf.train.trainer", "tests.programs.gpu.checks", "tests.programs.gpu.speed"])
START = time.monotonic()


@dataclass(frozen=True)
class Bench:
    """Where a check runs and where its results go."""

    out: Path
    device: str
    tiny: bool

    def report(self, check: str, status: str, **values: Any) -> None:
        """Append a result; one write, so that processes do not mix theirs."""
        row = {"check": check, "status": status, **values}
        with (self.out / "rows.jsonl").open("ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())

    @property
    def lock(self) -> Path:
        """Held shared by who uses the device, alone by who times."""
        return self.out / ".device"


@dataclass(frozen=True)
class Check:
    """A function of the bench, and the seconds it may take."""

    run: Callable[..., None]
    seconds: float
    arguments: tuple[Any, ...] = ()


def _run(name: str, check: Check, bench: Bench) -> None:
    """In the fork: the check, or one line about why it failed."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    started = time.monotonic()
    log = os.open(bench.out / "logs" / f"{name.replace('/', '-')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        check.run(bench, *check.arguments)
    except BaseException as error:
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")[:300]
        bench.report(name, f"FAILED {type(error).__name__}: {first}", seconds=round(time.monotonic() - started, 1))


def run_checks(checks: Mapping[str, Check], bench: Bench, workers: int, deadline: float) -> None:
    """Start checks in order, `workers` at a time; end those whose time is up, and all at the deadline."""
    waiting, running = dict(checks), {}
    while waiting or running:
        while waiting and len(running) < workers and time.monotonic() < deadline:
            name = next(iter(waiting))
            check = waiting.pop(name)
            process = SERVER.Process(target=_run, args=(name, check, bench))
            process.start()
            running[name] = process, time.monotonic() + check.seconds
        if not running:
            break
        connection.wait([process.sentinel for process, _ in running.values()], timeout=0.5)
        for name, (process, end) in list(running.items()):
            late = time.monotonic() > min(end, deadline)
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
                bench.report(name, "TIME UP")
            elif process.exitcode:
                bench.report(name, f"FAILED exit code {process.exitcode}")
            process.join()
            del running[name]
            write_table(bench)
            print(f"{time.monotonic() - START:6.1f} s  {name}", flush=True)
    for name in waiting:
        bench.report(name, "NOT STARTED")
    write_table(bench)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The results of a folder; of a check that was run again, the newest."""
    lines = (out / "rows.jsonl").read_text().splitlines() if (out / "rows.jsonl").is_file() else []
    return list({row["check"]: row for row in map(json.loads, lines)}.values())


def write_table(bench: Bench) -> None:
    """``table.md``: one row a result, failures first."""
    rows = read_rows(bench.out)
    order = sorted(rows, key=lambda row: row["status"] == "ok")
    lines = ["| check | status | values |", "|---|---|---|"]
    for row in order:
        values = ", ".join(f"{key} {_shown(value)}" for key, value in row.items() if key not in ("check", "status"))
        lines.append(f"| {row['check']} | {row['status'].replace('|', '/')} | {values.replace('|', '/')} |")
    bad = sum(row["status"] != "ok" for row in rows)
    text = "\n".join([*lines, "", f"{len(rows) - bad} ok, {bad} not"]) + "\n"
    temporary = bench.out / ".table.md"
    temporary.write_text(text)
    temporary.replace(bench.out / "table.md")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + " ".join(_shown(item) for item in value) + "]"
    return str(value)
