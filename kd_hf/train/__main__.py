"""Train: ``python -m kd_hf.train RECIPE [key=value …]``, also under ``accelerate launch -m`` and ``torchrun -m``.

``python -m kd_hf.train --push RUN_FOLDER [hub.key=value …]`` pushes the student of a finished run to the Hub.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kd_hf.errors import is_main_process, run_command
from kd_hf.text.terminal import say
from kd_hf.train.chain import train_recipe


def main(argv: Sequence[str]) -> int:
    """Parse the command line, train, and show the result."""
    parser = argparse.ArgumentParser(prog="python -m kd_hf.train", description="Distil a student as a recipe says.")
    parser.add_argument("recipe", help="a recipe file, e.g. recipes/quickstart.yaml; with --push, a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.learning_rate=1e-3")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--smoke", action="store_true", help="two steps on noise with random weights, export and reload; keeps nothing"
    )
    instead.add_argument(
        "--push", action="store_true", help="push the student of a finished run, e.g. --push RUN hub.hub_model_id=me/x"
    )
    args = parser.parse_intermixed_args(argv)  # options may stand among overrides
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a busy machine

    if args.push:
        if is_main_process():
            from kd_hf.hub.publisher import push_run

            print(f"pushed to {push_run(args.recipe, args.overrides)}")
        return 0

    from kd_hf.recipe.read import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.smoke:
        from kd_hf.train.smoke import smoke

        with tempfile.TemporaryDirectory() as folder:
            say(smoke(recipe, Path(folder)))
        return 0
    output = train_recipe(recipe)
    if is_main_process() and not output.stopped_by:
        from kd_hf.report.closing import finish_report

        say(finish_report(recipe))
    return output.exit_code


if __name__ == "__main__":
    run_command(main)
