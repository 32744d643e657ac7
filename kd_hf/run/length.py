"""How long a run is."""

from __future__ import annotations

from dataclasses import dataclass

from kd_hf.errors import UserError
from kd_hf.recipe.config import TrainConfig


@dataclass(frozen=True)
class RunLength:
    """How long a run is; `global_batch` is images per optimiser step over all processes."""

    global_batch: int
    steps_per_epoch: int
    total_steps: int

    def __str__(self) -> str:
        return f"{self.total_steps} of {self.global_batch} images, {self.steps_per_epoch} an epoch"


def run_length(args: TrainConfig, images: int, processes: int) -> RunLength:
    """The length that a `train` block gives a run on so many images and processes.

    Raises:
        UserError: a step needs more images than there are.
    """
    global_batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    steps_per_epoch = images // global_batch
    if steps_per_epoch == 0:
        raise UserError(
            f"train.per_device_train_batch_size: the global batch of {global_batch} images is larger than the "
            f"{images} training images"
        )
    total = args.max_steps or max(1, round(args.num_train_epochs * steps_per_epoch))
    return RunLength(global_batch, steps_per_epoch, total)
