"""The run folder: what lies in it, where a run begins that continues it, and what may be continued or replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.files import remove, tidy, write_text, writing
from kd_hf.layout import CHECKPOINTS, ENDING, INCOMING, LOG, OUTGOING, REPORT, RESOLVED, STUDENT, UNFINISHED
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.resolved import dump_recipe, trained_hash
from kd_hf.run import checkpoint as ckpt
from kd_hf.run.ending import Ending, ending_of, read_ending
from kd_hf.run.identity import Identity, Images, listed, recipes_differ
from kd_hf.run.lock import RunLock, locked
from kd_hf.run.log import read_log
from kd_hf.run.ownership import check_own, written_in
from kd_hf.run.state import CheckpointState

START_OVER = "train.resume_from_checkpoint=false"


class OtherRun(UserError):
    """What lies in the folder belongs to another run."""

    def __init__(self, what: str, over: str = f"start over with {START_OVER}") -> None:
        super().__init__(f"{what}; choose another train.output_dir, or {over}")
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what,)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its first step, where a checkpoint stands, or at what is left to do when it has ended."""

    checkpoint: Path | None = None
    state: CheckpointState | None = None
    ending: Ending | None = None
    """Of a run whose student is exported."""
    whole: bool = False
    """Whether report and card are there too, so that there is nothing left to do."""
    notes: tuple[str, ...] = ()
    """For the person watching."""

    @property
    def step(self) -> int:
        """The steps that are done."""
        return self.ending.step if self.ending else self.state.step if self.state else 0


class RunFolder:
    """``recipe.resolved.yaml``, ``log.jsonl``, ``checkpoints/``, ``student/`` and ``report/`` of one run.

    Args:
        recipe: the run; its ``train.output_dir`` is the folder.
        global_batch: images per optimiser step over all processes.
        data: the images by split, ``train`` and ``eval``.
        teachers: hashes of their weights by name.
    """

    def __init__(
        self, recipe: Recipe, global_batch: int, data: Mapping[str, Images], teachers: Mapping[str, str]
    ) -> None:
        self.path = Path(recipe.train.output_dir)
        self.checkpoints = self.path / CHECKPOINTS
        self.student = self.path / STUDENT
        self.recipe, self.global_batch = recipe, global_batch
        self.lock = RunLock(self.path)
        self._data, self._teachers = data, teachers

    @cached_property
    def identity(self) -> Identity:
        """What this run is; asked for by the main process only, because it takes time."""
        return Identity.of(self.recipe, self.global_batch, self._data, self._teachers)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something on this machine to continue from."""
        return bool(ckpt.list_checkpoints(self.checkpoints))

    @contextmanager
    def locked(self, patient: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder; a call of all processes.

        Args:
            patient: wait for a run that is there.

        Raises:
            UserError: another run is there.
        """
        with locked(self.lock, patient):
            yield

    def sight_of(self, start: Start) -> int:
        """A number that differs between processes which do not see the same checkpoints."""
        newest = max(map(ckpt.step_of, ckpt.list_checkpoints(self.checkpoints)), default=-1)
        return 2 * newest + (start.checkpoint is None or (start.checkpoint / ckpt.STATE).is_file())

    # ------------------------------------------------------------------------------------------- beginning

    def begin(self, resume: str | bool | None) -> Start:
        """Where this run begins; on the main process, which holds the lock. Removes what a killed process left.

        Args:
            resume: the recipe's ``resume_from_checkpoint``; False empties the folder.

        Raises:
            OtherRun: what lies there is of another recipe, of other data or teachers, or of another global batch.
            UserError: nothing there though demanded, all of it damaged, or something that kd_hf did not write.
        """
        check_own(self.path)
        self._tidy()
        if resume is False:
            self.clear()
            return Start()
        ending = None if resume is not None else _ending_in(self.path, self.recipe, self.global_batch)
        notes: tuple[str, ...] = ()
        if ending is not None:
            self._check_same(ending.identity, self.student)
            fault = ending.fault(self.path)
            if fault is None:
                return Start(ending=ending, whole=ending.is_whole(self.path))
            if not self.has_checkpoint:
                raise UserError(
                    f"{self.path} holds a finished run, but {fault}, and there is no checkpoint to export it from "
                    f"again; start over with {START_OVER}"
                )
            notes = (f"{self.path}: {fault}; it is exported again from the last checkpoint",)
        start = self._from_checkpoint(resume)
        return replace(start, notes=notes + start.notes)

    def _from_checkpoint(self, resume: str | bool | None) -> Start:
        """The newest checkpoint that is whole, or the one that is named."""
        named = isinstance(resume, str)
        candidates = [Path(resume).expanduser()] if isinstance(resume, str) else ckpt.list_checkpoints(self.checkpoints)
        if not candidates:
            if resume is True:
                raise UserError(f"train.resume_from_checkpoint: there is no checkpoint in {self.checkpoints}")
            return Start()
        notes: list[str] = []
        for candidate in reversed(candidates):
            try:
                state = ckpt.read_state(candidate)
                self._check_same(state.identity, candidate)
                ckpt.check_files(candidate)
            except OtherRun:
                raise
            except UserError as error:
                if named:
                    raise
                notes.append(f"{error}; the one before it is taken")
                continue
            return self._with_best(Start(candidate, state, notes=tuple(notes)))
        raise UserError(f"{'; '.join(notes).replace('; the one before it is taken', '')}; start over with {START_OVER}")

    def _with_best(self, start: Start) -> Start:
        """The same without a best step of which the weights cannot be exported: its checkpoint is gone or damaged."""
        state = start.state
        if state is None or state.best_step is None or not self.recipe.train.load_best_model_at_end:
            return start
        best = self.checkpoint_of(state.best_step)
        try:
            if best != start.checkpoint:
                ckpt.read_state(best)
                ckpt.check_files(best)
        except UserError as error:
            note = f"{error}; it was the best so far, the best of the evaluations to come is exported instead"
            forgotten = replace(state, best_step=None, best_metric=None)
            return replace(start, state=forgotten, notes=(*start.notes, note))
        return start

    def _check_same(self, identity: Identity, where: Path) -> None:
        if different := identity.differences(self.identity):
            raise OtherRun(f"{where} belongs to another run: {listed(different)}")

    # --------------------------------------------------------------------------------------------- writing

    def write_recipe(self) -> None:
        """Write the resolved recipe, by which the folder is known as one of kd_hf."""
        write_text(self.path / RESOLVED, dump_recipe(self.recipe))

    def save_checkpoint(
        self,
        state: CheckpointState,
        tensors: Mapping[str, Mapping[str, Tensor]],
        objects: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write ``checkpoints/checkpoint-<step>`` and prune older ones."""
        ckpt.save_checkpoint(self.checkpoint_of(state.step), state, tensors, objects)
        ckpt.prune(self.checkpoints, self.recipe.train.save_total_limit, state.best_step)

    def checkpoint_of(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.checkpoints / f"{ckpt.PREFIX}{step}"

    def whole_checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, when it is as it was written."""
        path = self.checkpoint_of(step)
        try:
            ckpt.check_files(path)
        except UserError as error:
            raise UserError(f"{error}; the same command exports the last weights instead") from None
        return path

    def end(self, step: int, described: bool) -> None:
        """Note that the student lies there, and whether report and card do."""
        ending_of(self.path, self.identity, step, described).write(self.path)

    def note_export(self) -> None:
        """Note that the student was written again, on purpose."""
        if ending := read_ending(self.path):
            ending_of(self.path, ending.identity, ending.step, ending.described).write(self.path)

    # -------------------------------------------------------------------------------------------- removing

    def _tidy(self) -> None:
        with writing(self.path):
            tidy(self.path, (STUDENT, REPORT, LOG, RESOLVED, ENDING))
            tidy(self.student, (REPORT, "README.md", ".eval_results"))
            ckpt.tidy_checkpoints(self.checkpoints)
            for name in (UNFINISHED, OUTGOING):
                remove(self.path / name)

    def clear(self) -> None:
        """Delete what a run writes into its folder, and nothing else; the recipe, which marks it, is the last to go."""
        with writing(self.path):
            remove(self.path / ENDING)
            for path in ckpt.list_checkpoints(self.checkpoints):
                remove(path)
            for name in list(written_in(self.path)):
                (self.path / name).unlink()
            for name in (UNFINISHED, OUTGOING, INCOMING, LOG, RESOLVED):
                remove(self.path / name)
            for folder in (self.checkpoints, self.student, self.path / REPORT):
                _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove folders that hold no file."""
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def _ending_in(folder: Path, recipe: Recipe, global_batch: int) -> Ending | None:
    """How the run in a folder ended; None where it has not."""
    student = folder / STUDENT
    ending, exported = read_ending(folder), trained_hash(student)
    if ending is not None or exported is None:
        return ending
    # the export of a version that kept no ending, or one that a kill came right after
    has_report = not recipe.eval.report or (folder / REPORT).is_dir()
    steps = [line["step"] for line in read_log(folder) if isinstance(line.get("step"), int)]
    identity = Identity.of_older(student, exported, global_batch)
    return ending_of(folder, identity, max(steps, default=0), (student / "README.md").is_file() and has_report)


def is_trained(recipe: Recipe) -> bool:
    """Whether a folder holds the whole student of this very recipe, of whatever data and global batch."""
    folder = Path(recipe.train.output_dir)
    ending = _ending_in(folder, recipe, 0)
    if ending is None or recipes_differ(ending.identity, recipe):
        return False
    return ending.fault(folder) is None and ending.is_whole(folder)
