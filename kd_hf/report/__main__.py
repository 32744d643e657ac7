"""Report: ``python -m kd_hf.report RUN`` → ``RUN/report/index.html``, the picture of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kd_hf.errors import UserError, run_command
from kd_hf.report import SAMPLES


def main(argv: Sequence[str]) -> int:
    """Parse the command line, write the page, say where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.report",
        description="Write the page of a run: what was learned, where student and teacher look, where they differ.",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder (train.output_dir), finished or not")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"evaluation images to look at (default: {SAMPLES})"
    )
    parser.add_argument("--use-cpu", action="store_true", help="leave the GPU alone")
    args = parser.parse_args(argv)
    if args.samples < 1:
        raise UserError(f"--samples: expected at least 1 image (got {args.samples})")

    from kd_hf.report.build import write_report
    from kd_hf.report.closing import closing_text
    from kd_hf.run.record import RunRecord

    record = RunRecord.read(args.run)
    write_report(record, device=_device(args.use_cpu), samples=args.samples, progress=True)
    print(closing_text(record))
    return 0


def _device(use_cpu: bool) -> str:
    import torch

    found = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


if __name__ == "__main__":
    run_command(main)
