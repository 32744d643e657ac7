"""Peak memory of a step: a fresh process for each case, ``python -m kd_hf.bench.memory RECIPE step|bare``.

On a CPU it is the largest resident size of the whole process, libraries and weights included; on a GPU the most that
tensors took. What the optimiser keeps, which the bare pair has not, is counted by itself.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.errors import UserError, run_command
from kd_hf.recipe.config import Recipe

if TYPE_CHECKING:
    from kd_hf.bench.clock import Work

STEPS = 3
CASES = ("step", "bare")


def peak_bytes(recipe: Recipe, num_classes: int) -> dict[str, int]:
    """Peak memory in bytes of three steps by case: the trainer's, and the bare pair's; and the optimiser's share.

    Raises:
        UserError: a process did not survive.
    """
    from kd_hf.files import write_text
    from kd_hf.recipe.resolved import dump_recipe

    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        write_text(file, dump_recipe(recipe))
        for case in CASES:
            command = [sys.executable, "-m", __name__, str(file), case, str(num_classes)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = "".join(done.stderr.strip().splitlines()[-1:])
                raise UserError(f"--memory: the process of the case '{case}' ended with {done.returncode}: {last}")
            found |= json.loads(done.stdout.splitlines()[-1])
    return found


def _run(recipe: Recipe, case: str, num_classes: int) -> dict[str, int]:
    """Take the steps of a case."""
    import torch

    from kd_hf.bench.photos import Photos
    from kd_hf.bench.work import BarePair, TrainerStep
    from kd_hf.distillation.assembly import assemble
    from kd_hf.process import build_accelerator, set_cpu_threads

    batch = recipe.train.per_device_train_batch_size
    if case == "step":
        step = TrainerStep(recipe, Photos(batch, num_classes))
        _repeat(step.whole)
        states = step.trainer.trained.optimizer.state.values()
        kept = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        found = {"optimiser": sum(value.nbytes for value in kept)}
    else:
        set_cpu_threads(recipe.train.cpu_threads, 1)
        accelerator = build_accelerator(recipe.train)
        views = assemble(recipe, num_classes, device="meta").views()
        sizes = {name: (batch, 3, view.image_size, view.image_size) for name, view in views.items()}
        images = {name: torch.randn(size, device=accelerator.device) for name, size in sizes.items()}
        labels = torch.zeros(batch, dtype=torch.long, device=accelerator.device)
        _repeat(BarePair(recipe, images, labels, num_classes, accelerator))
        found = {}
    return {case: _peak(), **found}


def _repeat(work: Work) -> None:
    from kd_hf.bench.clock import ignore

    for _ in range(STEPS):
        work(ignore)


def _peak() -> int:
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says on Linux begins with the size of the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str]) -> int:
    """Run a case and print its bytes as JSON."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from kd_hf.recipe.read import load_recipe

    file, case, num_classes = argv
    print(json.dumps(_run(load_recipe(file), case, int(num_classes))))
    return 0


if __name__ == "__main__":
    run_command(main)
