"""Every recipe's smoke run: ``python -m tests.programs.smoke_recipes [NAME …]`` prints a row for each."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.runs import ROOT, command, environment


def main(names: list[str]) -> int:
    """Run the named recipes, or all."""
    files = [ROOT / "recipes" / name for name in names] or sorted((ROOT / "recipes").glob("*.yaml"))
    failed = 0
    for file in files:
        start = time.perf_counter()
        done = subprocess.run(
            command("kd_hf.train", str(file), "--smoke"),
            env=environment(), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        failed += done.returncode != 0
        verdict = "ok" if done.returncode == 0 else "FAILED"
        print(f"{file.name:48}  {time.perf_counter() - start:5.0f} s  {verdict}  {''.join(last)}", flush=True)
    print(f"{len(files) - failed} ok, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
