"""The program for GPUs does its work, on a CPU and tiny networks."""

from __future__ import annotations

import json

from tests.programs.gpu.checks import TINY
from tests.runs import run


def test_every_kind_of_check_runs_and_writes_what_it_found(tmp_path):
    done = run("tests.programs.gpu", "--out", str(tmp_path), "--tiny", "--device", "cpu", "--workers", "1")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert done.returncode == 0, [row for row in rows if row["status"] != "ok"]
    names = {row["check"] for row in rows}
    for name in ("setting", *TINY, "speed/eager/tiny", "loader/crop"):
        assert any(found.startswith(name) for found in names), name
    assert f"{len(names)} ok, 0 not" in (tmp_path / "table.md").read_text()
