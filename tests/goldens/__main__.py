"""Command line of the check: ``python -m tests.goldens [DIR] [--option NAME]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.goldens.check import LIMIT, Row, check_file, failed, passed, runs_with
from tests.goldens.options import OPTIONS, PLAIN


def main(argv: Sequence[str] | None = None) -> int:
    """Check a folder and print one row per file. Returns 0 when all passed, 1 when a file
    failed or is not understood, 2 when there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument(
        "--option", choices=OPTIONS, help="run the methods in this way; the bounds stay, trainings are left out"
    )
    args = parser.parse_args(argv)
    option = OPTIONS[args.option] if args.option else PLAIN
    # a folder of methods, or the folder of one
    found = sorted(args.folder.glob("*/*.safetensors")) or sorted(args.folder.glob("*.safetensors"))
    files = [file for file in found if runs_with(file, option)]
    if not files:
        print(f"tests.goldens: no [<method>/]<case>.safetensors in '{args.folder}'", file=sys.stderr)
        return 2
    widths = [max(map(len, names)) for names in ([f.parent.name for f in files], [f.stem for f in files])]
    rows = []
    for file in files:
        row = check_file(file, option)
        rows.append(row)
        error = "-" if row.error is None else f"{row.error:.1e}"
        remark = f" ({'; '.join(row.exceptions)})" if row.exceptions else ""
        print(f"{row.method:{widths[0]}}  {row.case:{widths[1]}}  {error:>8}  {row.status}{remark}", flush=True)
    print(_summary(rows))
    return int(not all(passed(row) for row in rows))


def _summary(rows: Sequence[Row]) -> str:
    others = [row for row in rows if not passed(row) and not failed(row)]
    named = f" ({', '.join(f'{row.method}/{row.case}' for row in others)})" if others else ""
    return (
        f"{sum(map(passed, rows))} ok (relative error at most {LIMIT:g}), {sum(map(failed, rows))} failed, "
        f"{len(others)} not covered{named}"
    )


if __name__ == "__main__":
    sys.exit(main())
