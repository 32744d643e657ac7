"""Store what teachers say about every training image: ``python -m kd_hf.cache RECIPE [key=value …] -o FOLDER``.

``teacher.store: FOLDER`` then trains from it without the teacher. Under ``accelerate launch -m`` the processes take
files in turn; what is written does not depend on their number. A command that was killed continues where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from kd_hf.cache import SHARD_ROWS, TOP_K, VERIFIED
from kd_hf.errors import UserError, is_main_process, run_command
from kd_hf.text.terminal import say


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more (got {number})")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.cache",
        description="Write what a recipe's teachers say about every training image, so that training needs no teacher.",
    )
    add = parser.add_argument
    add("recipe", help="a recipe file, e.g. recipes/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="e.g. train.num_train_epochs=10")
    add("-o", "--output", metavar="FOLDER", help="where the store goes; by default the recipe's teacher.store")
    add("--epochs", type=_positive, help="how many; by default those of the recipe")
    add("--top-k", type=_positive, default=TOP_K, help="classes kept of an image; all where there are fewer (100)")
    add("--taps", action="store_true", help="write tensors that methods read, also where they make the store large")
    add("--processes", type=_positive, help="how many processes will train; by default as many as write")
    add("--shard-rows", type=_positive, default=SHARD_ROWS, help="rows of a file, about (100000)")
    add("--verify", type=_positive, nargs="?", const=VERIFIED, metavar="N",
        help="instead of writing, compare N random images of a finished store with the teacher (64)")  # fmt: skip
    add("--push", metavar="USER/NAME", help="instead of writing, upload a finished store to the Hub")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse the command line, and write, verify or push."""
    args = _parser().parse_intermixed_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a busy machine

    from kd_hf.recipe.read import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    stores = {cfg.store for cfg in recipe.all_teachers().values() if cfg.store}
    place = args.output or (stores.pop() if len(stores) == 1 else None)
    if place is None:
        raise UserError("-o: where is the store? Give -o FOLDER, or teacher.store in the recipe")
    if args.verify is None and args.push is None:
        from kd_hf.cache.write import write_store

        write_store(
            recipe,
            Path(place).expanduser(),
            epochs=args.epochs,
            top_k=args.top_k,
            taps=args.taps,
            processes=args.processes,
            shard_rows=args.shard_rows,
        )
    if args.verify is not None:
        from kd_hf.cache.verify import verify_store

        if found := verify_store(recipe, place, args.verify, args.processes):
            say(f"{place} differs from the teacher: {found}")
            return 1
        say(f"{place}: {args.verify} random images agree with the teacher")
    if args.push is not None and is_main_process():
        from kd_hf.cache.publish import push_store
        from kd_hf.store.format import open_store

        say(f"pushed to {push_store(open_store(place), args.push)}")
    return 0


if __name__ == "__main__":
    run_command(main)
