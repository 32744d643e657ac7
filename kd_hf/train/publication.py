"""What a run leaves for others: the artefact, its report and model card, and all of it on the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kd_hf.data.source import Source
from kd_hf.errors import UserError
from kd_hf.hub.artefact import read_weights, save_student
from kd_hf.hub.card import write_card
from kd_hf.hub.publisher import Publisher, fetch_checkpoint
from kd_hf.layout import RESOLVED, UNFINISHED
from kd_hf.models.handle import ModelHandle
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.folder import RunFolder
from kd_hf.run.record import RunRecord


class Publication:
    """Exports, describes and pushes the student of one run; lives on the main process.

    Args:
        run: the run folder.
        student: the network, with the names of its classes.
        say: shows a line to the person watching.
    """

    def __init__(self, run: RunFolder, student: ModelHandle, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.recipe: Recipe = run.recipe
        self.student = student
        hub = self.recipe.hub
        self.publisher = Publisher(hub, run.path, say) if hub.push_to_hub else None

    def prepare(self) -> None:
        """Make the repository, so that what would fail at the end of the run fails before its first step."""
        if self.publisher is not None:
            self.publisher.prepare()

    def fetch(self) -> None:
        """Take over the checkpoint that the run pushed from another machine, when this one has none."""
        hub = self.recipe.hub
        is_new = not self.run.has_checkpoint and not self.run.student.exists()
        if self.publisher is not None and hub.hub_strategy == "checkpoint" and is_new:
            found = fetch_checkpoint(hub, self.run.path)
            if found is not None:
                self.say(f"fetched {found} from the Hub")

    def export(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> None:
        """Write the artefact: by default ``student/`` of the run folder."""
        extra = {RESOLVED: dump_recipe(self.recipe)}
        save_student(self.student, folder or self.run.student, state_dict=weights, extra_files=extra)

    def after_save(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Push the student as it is now, and its checkpoint, in the background; never raises for the Hub's sake."""
        publisher, strategy = self.publisher, self.recipe.hub.hub_strategy
        if publisher is None or strategy == "end" or publisher.busy:
            return
        folder = self.run.path / UNFINISHED
        self.export(weights, folder)
        checkpoint = self.run.checkpoint_of(step) if strategy == "checkpoint" else None
        publisher.in_background(folder, f"Step {step}", checkpoint)  # it has its own hold on the files when it returns
        shutil.rmtree(folder, ignore_errors=True)

    def exported(self) -> dict[str, Tensor]:
        """The weights in ``student/`` of the run folder, named as in the network."""
        return read_weights(self.student, self.run.student)

    def close(self, teachers: Mapping[str, ModelHandle] | None, source: Source, device: torch.device) -> bool:
        """Write report and card; what fails here costs a sentence, not the run. Whether both are there."""
        record = RunRecord.read(self.run.path)
        cfg = self.recipe.eval
        try:
            if cfg.report:
                from kd_hf.report.build import write_report

                write_report(record, teachers=teachers, source=source, device=device, samples=cfg.report_samples)
            write_card(record, self._repo_id())
        except (UserError, OSError) as error:
            self.say(f"warning: the student is not described, which the same command tries again: {error}")
            return False
        return True

    def push(self, message: str = "End of training") -> None:
        """Push the artefact for good, and say where it is.

        Raises:
            UserError: it failed; the run folder is whole, and the message says how to repeat the push.
        """
        if self.publisher is not None:
            self.say(f"pushed to {self.publisher.finish(self.run.student, message)}")

    def catch_up(self) -> None:
        """Push the student of a run that has ended; changes nothing where it has arrived."""
        if self.publisher is not None:
            self.prepare()
            self.push()

    def leave(self) -> None:
        """Tell a person whose run was stopped why the process has not ended yet."""
        if self.publisher is not None and self.publisher.busy:
            self.say("the push of the last save is still running; it ends first")

    def describe(self, license: str | None = None, tags: tuple[str, ...] = ()) -> None:
        """Write the model card anew."""
        record = RunRecord.read(self.run.path)
        hub = record.recipe.hub
        hub = hub.model_copy(update={"license": license or hub.license, "tags": (*hub.tags, *tags)})
        changed = replace(record, recipe=record.recipe.model_copy(update={"hub": hub}))
        write_card(changed, self._repo_id())

    def _repo_id(self) -> str | None:
        """Where the student is pushed to."""
        return self.publisher.repo_id if self.publisher else None

    def push_again(self, message: str, **changes: str | bool | None) -> str:
        """Push the exported student, with other keys of the `hub` block where they are not None; gives the address."""
        set_now = {key: value for key, value in changes.items() if value is not None}
        hub = self.recipe.hub.model_copy(update={**set_now, "push_to_hub": True})
        folder = RunRecord.read(self.run.path).need()
        publisher = Publisher(hub, self.run.path, self.say)
        publisher.prepare()
        return publisher.finish(folder, message)
