"""Everything that only a GPU can show: ``python -m tests.programs.gpu --out DIR [--minutes 8] [--only NAME …]``.

A list of checks, the most valuable first, each in a process of its own that is ended when its time is up. What they
find is written at once: a line of ``DIR/rows.jsonl`` for each result, ``DIR/table.md`` after each check. The program
may be stopped at any moment. ``--tiny --device cpu`` runs the same code on tiny networks, to see that it works.

Correctness comes first, several checks side by side; then speed, where networks are built and compiled side by side
and timed one after the other, while nothing else runs on the device.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.programs.gpu.schedule import START, Bench, read_rows, run_checks

COMPILING = 3  # checks side by side


def setting(bench: Bench) -> dict[str, str]:
    """The machine and its versions."""
    import torch

    from kd_hf.process import device_name, versions

    shown = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {"device": device_name(torch.device(bench.device)), "date": str(datetime.date.today()), "versions": shown}


def write_page(rows: Sequence[Mapping[str, Any]]) -> None:
    """Renew the section about GPUs in the page of benchmarks."""
    from kd_hf.files import write_text
    from tests.programs.benchmark_table import FILE, page
    from tests.programs.gpu.page import section

    write_text(FILE, page(section(rows), "gpu", FILE.read_text(encoding="utf-8")))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks. Returns 1 when one was not ok."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all (default: 8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--write", action="store_true", help="put what DIR holds into recipes/benchmarks.md, and end")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and few steps")
    parser.add_argument("--workers", type=int, help="checks side by side (default: half the cores)")
    args = parser.parse_args(argv)
    if args.write:
        write_page(read_rows(args.out))
        return 0
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    bench = Bench(args.out.resolve(), args.device, args.tiny)
    bench.lock.touch()
    workers = args.workers or max(1, (os.cpu_count() or 2) // 2)

    from tests.programs.gpu.checks import correctness
    from tests.programs.gpu.speed import speed

    bench.report("setting", "ok", **setting(bench))
    deadline = START + 60 * args.minutes
    chosen = [
        {name: check for name, check in group.items() if not args.only or name.startswith(tuple(args.only))}
        for group in (correctness(bench), *speed(bench))
    ]
    for group in chosen:
        if group:
            # one that compiles takes several cores: six side by side on sixteen were not done in three minutes
            compiles = any(name.startswith("speed/compiled") for name in group)
            run_checks(group, bench, min(workers, COMPILING) if compiles else workers, deadline)
    print((bench.out / "table.md").read_text())
    return int(any(row["status"] != "ok" for row in read_rows(bench.out)))


if __name__ == "__main__":
    sys.exit(main())
