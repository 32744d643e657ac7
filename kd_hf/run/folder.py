"""The run folder: which checkpoint to continue from, and what may be continued."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.files import write_text
from kd_hf.layout import LOG, REPORT, RESOLVED, STUDENT
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.resolved import dump_recipe, recipe_hash, trained_hash
from kd_hf.run import checkpoint as ckpt


class RunFolder:
    """``recipe.resolved.yaml``, ``log.jsonl``, ``checkpoints/``, ``student/`` and ``report/`` of one run.

    Args:
        recipe: the run; its ``train.output_dir`` is the folder.
        global_batch: images per optimiser step over all processes.
    """

    def __init__(self, recipe: Recipe, global_batch: int) -> None:
        self.path = Path(recipe.train.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / STUDENT
        self.recipe = recipe
        self.hash = recipe_hash(recipe)
        self.global_batch = global_batch

    @property
    def is_finished(self) -> bool:
        """Whether the artefact of this very recipe is there."""
        return trained_hash(self.student) == self.hash

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something on this machine to continue from."""
        return bool(ckpt.list_checkpoints(self.checkpoints))

    def find_checkpoint(self, wanted: str | bool | None) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to continue from and its state; None to start at step 0.

        Args:
            wanted: the recipe's ``resume_from_checkpoint``.

        Raises:
            UserError: none there though demanded, damaged, of another recipe, or of another global batch.
        """
        if wanted is False:
            return None
        found = [Path(wanted)] if isinstance(wanted, str) else ckpt.list_checkpoints(self.checkpoints)
        if not found:
            if wanted is True:
                raise UserError(f"train.resume_from_checkpoint: there is no checkpoint in {self.checkpoints}")
            self._refuse_other_recipe(trained_hash(self.student), self.path)
            return None
        state = ckpt.read_state(found[-1])
        self._refuse_other_recipe(trained_hash(found[-1].parents[1]) or state["recipe_hash"], found[-1])
        if state["global_batch"] != self.global_batch:
            raise UserError(
                f"{found[-1]} was trained with {state['global_batch']} images per step, this run has "
                f"{self.global_batch}: keep processes × train.per_device_train_batch_size × "
                "train.gradient_accumulation_steps the same"
            )
        return found[-1], state

    def _refuse_other_recipe(self, found: str | None, where: Path) -> None:
        if found not in (None, self.hash):
            raise UserError(
                f"{where} belongs to another recipe (hash {found}, this one {self.hash}); choose another "
                "train.output_dir, or start over with train.resume_from_checkpoint=false"
            )

    def write_recipe(self) -> None:
        """Write the resolved recipe."""
        write_text(self.path / RESOLVED, dump_recipe(self.recipe))

    def save_checkpoint(
        self,
        state: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        objects: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write ``checkpoints/checkpoint-<step>`` and prune older ones."""
        full = {**state, "recipe_hash": self.hash, "global_batch": self.global_batch}
        ckpt.save_checkpoint(self.checkpoint_of(state["step"]), full, tensors, objects)
        ckpt.prune(self.checkpoints, self.recipe.train.save_total_limit, state["best_step"])

    def checkpoint_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"{ckpt.PREFIX}{step}"

    def clear(self) -> None:
        """Delete what a run writes into its folder, and nothing else."""
        for folder in (self.checkpoints, self.student, self.path / REPORT, self.path / ".push", self.path / ".fetch"):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (LOG, RESOLVED):
            (self.path / name).unlink(missing_ok=True)
