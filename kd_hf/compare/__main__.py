"""Compare runs: ``python -m kd_hf.compare RUN [RUN …] [--markdown] [--json FILE] [--plot FILE] [--metric eval_nll]``.

Prints a table of the runs, the recipe keys in which they differ, and, where finished runs differ in nothing but
`train.seed`, mean ± standard deviation over the seeds. A run's value of the metric is that of the weights it exported:
the best evaluation's under `load_best_model_at_end`, else the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_hf.errors import run_command


def main(argv: Sequence[str]) -> int:
    """Parse the command line, print the tables, write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.compare", description="Compare the runs of some folders.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (train.output_dir)")
    parser.add_argument("--markdown", action="store_true", help="print GitHub tables, e.g. for a paper's ablation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the metric over steps, e.g. plot.png")
    parser.add_argument("--metric", help="a number of the logs (default: eval_top1, of detectors eval_ap)")
    args = parser.parse_args(argv)
    from kd_hf.compare.runs import read_runs
    from kd_hf.compare.tables import as_json, compare, draw

    runs = read_runs(args.runs, args.metric)
    if args.plot:
        draw(runs, args.plot)
    if args.json:
        from kd_hf.files import write_text

        write_text(args.json, as_json(runs))
    print(compare(runs, args.markdown))
    return 0


if __name__ == "__main__":
    run_command(main)
