"""Write a store and train from it in one process of several:

``accelerate launch --config_file accelerate_configs/2cpu.yaml -m tests.programs.write_and_train RECIPE STORE READ
[OPTION …]``
"""

from __future__ import annotations

import sys

from kd_hf.cache.__main__ import main
from kd_hf.recipe.read import load_recipe
from kd_hf.train.trainer import DistillTrainer


def write_and_train(file: str, store: str, read: str, options: list[str]) -> None:
    """Run the command with its options, then train from where the store can be read."""
    assert main([file, "-o", store, *options]) == 0
    DistillTrainer(load_recipe(file, [f"teacher.store={read}"])).train()


if __name__ == "__main__":
    write_and_train(*sys.argv[1:4], sys.argv[4:])
