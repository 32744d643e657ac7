"""A training run under FSDP2 on CPU processes, and what each of them holds of it.

accelerate keeps FSDP for GPUs and turns CPU processes into DDP without a word. Told that these are GPUs, it runs its
FSDP2 code on them: ``accelerate launch --config_file accelerate_configs/8gpu_fsdp2.yaml --num_processes 2
-m tests.programs.fsdp_on_cpu RECIPE …``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_hf.recipe.read import load_recipe
from kd_hf.train.trainer import DistillTrainer


def share(tensors: Iterable[Tensor]) -> float:
    """How much of some sharded tensors this process holds."""
    held = [(tensor.to_local().numel(), tensor.numel()) for tensor in tensors if isinstance(tensor, DTensor)]
    return sum(own for own, _ in held) / sum(all_ for _, all_ in held)


def main(recipes: list[str]) -> None:
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    for path in recipes:
        trainer = DistillTrainer(load_recipe(path))
        trainer.evaluate()  # the student alone runs before the module that holds it
        counters = [buffer for buffer in trainer.trained.plain.buffers() if not buffer.is_floating_point()]
        for counter in counters:
            counter += trainer.accelerator.process_index  # a difference that the first step has to undo
        trainer.train()
        moments = [value for state in trainer.trained.optimizer.state.values() for value in state.values()]
        shares = {
            "plain": [p.numel() for p in trainer.trained.plain.parameters() if not isinstance(p, DTensor)],
            "module": share(trainer.trained.plain.parameters()),
            "average": share(trainer.trained.ema.module.parameters()),
            "optimizer": share(moments),
            "counters": [counter.item() for counter in counters],
        }
        name = f"shares-{trainer.accelerator.process_index}.json"
        (Path(trainer.args.output_dir) / name).write_text(json.dumps(shares))


if __name__ == "__main__":
    main(sys.argv[1:])
