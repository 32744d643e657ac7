"""Reading a run folder: what was trained, by which recipe, with which numbers; reports, cards, comparisons use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, nearest
from kd_hf.layout import LOG, PLAIN, REPORT, RESOLVED, STUDENT
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.run.log import read_log

if TYPE_CHECKING:
    from kd_hf.tasks.base import Task
    from kd_hf.tasks.score import Score

_WEIGHT = "weight/"


@dataclass(frozen=True)
class NetworkNote:
    """What the log says about a network of a run."""

    name: str = "?"  # as the recipe calls it
    source: str = ""  # what its weights were read from, by the name in the recipe
    parameters: int | None = None
    library: str = ""
    architecture: str = ""
    revision: str | None = None  # the commit, for a network from the Hub


@dataclass(frozen=True)
class RunRecord:
    """A run folder as it lies on the disk, finished or not; see :meth:`read`.

    `log` holds the lines of ``log.jsonl``, oldest first. Keys of the lines: ``loss``, one ``<block>/<part>`` for each
    unweighted loss, ``weight/<block>``, ``lr``, ``images_per_second``, and ``eval_…`` with ``train_seconds``.
    """

    path: Path
    recipe: Recipe
    log: tuple[Mapping[str, Any], ...] = field(repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Read a run folder.

        Raises:
            UserError: it is no run folder, or one whose recipe this version cannot read.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            near = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
            raise UserError(f"no run folder '{folder}'.{nearest(path.name, near)}")
        if not (path / RESOLVED).is_file():
            raise UserError(f"'{folder}' is no run folder: it holds no {RESOLVED}; give the train.output_dir of a run")
        try:
            recipe = load_recipe(path / RESOLVED)
        except UserError as error:
            raise UserError(f"'{folder}' was written by another version of kd_hf: {error}") from None
        return cls(path, recipe, tuple(read_log(path)))

    @cached_property
    def task(self) -> Task:
        """What was learned from the images."""
        from kd_hf.tasks import open_task

        return open_task(self.recipe)

    @property
    def score(self) -> Score:
        """The number that its networks are compared by."""
        return self.task.score

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def student(self) -> Path:
        """The artefact's folder."""
        return self.path / STUDENT

    @property
    def report(self) -> Path:
        """The folder of pictures and the page."""
        return self.path / REPORT

    def need(self, what: str = "student") -> Path:
        """The artefact's folder, or :class:`UserError` when the run has not written one."""
        if not (self.student / "config.json").is_file():
            state = "its training has not ended" if (self.path / LOG).is_file() else "it holds no log either"
            raise UserError(f"'{self.path}' holds no {what} yet ({state}); run its recipe to the end first")
        return self.student

    @cached_property
    def start(self) -> Mapping[str, Any]:
        """The newest line that says how the run was started; empty when there is none."""
        return next((line for line in reversed(self.log) if "models" in line), {})

    @cached_property
    def networks(self) -> dict[str, NetworkNote]:
        """What is known of each network, by its name in the recipe; ``student`` is the student."""
        noted = self.start.get("models", {})
        known = [entry.name for entry in fields(NetworkNote)]  # a log of another version may say more or less
        return {
            name: NetworkNote(**{key: facts[key] for key in known if key in facts})
            for name, facts in noted.items()
            if isinstance(facts, Mapping)
        }

    def macs(self, network: str) -> int | None:
        """Multiply–accumulates of a network's forward pass for one image as training shows it, where they are known."""
        found: int | None = self.start.get("macs", {}).get(network)
        return found

    def data_commit(self, split: str) -> str | None:
        """The commit of the Hub repository that the images of a split, `train` or `eval`, were read from."""
        found: str | None = self.start.get("data_revision", {}).get(split)
        return found

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a logged number, where it was finite."""
        return [(line["step"], line[key]) for line in self.log if isinstance(line.get(key), (int, float))]

    def last(self, key: str) -> Any:
        """The newest value of a key that is not null; None when there is none."""
        return next((line[key] for line in reversed(self.log) if line.get(key) is not None), None)

    def metrics(self) -> dict[str, float]:
        """The newest ``eval_…`` values, without the prefix."""
        found: dict[str, float] = {}
        for line in self.log:
            measured = {key: value for key, value in line.items() if key.startswith("eval_") and value is not None}
            found.update({key.removeprefix("eval_"): value for key, value in measured.items()})
        return found

    def parts(self) -> list[str]:
        """Names of the logged loss parts, ``<block>/<part>``."""
        keys = {key for line in self.log for key in line if "/" in key and not key.startswith(_WEIGHT)}
        return sorted(keys)

    def weights(self) -> list[str]:
        """Names of the blocks whose weight was logged."""
        return sorted({key.removeprefix(_WEIGHT) for line in self.log for key in line if key.startswith(_WEIGHT)})

    @cached_property
    def plain(self) -> RunRecord | None:
        """The run of the plain twin that lies inside this one (``baseline: train``)."""
        folder = self.path / PLAIN
        return RunRecord.read(folder) if (folder / RESOLVED).is_file() else None

    def trained_teacher(self, name: str) -> RunRecord | None:
        """The run that trained a teacher, when it was one of this project and its folder is there."""
        folder = Path(self.recipe.all_teachers()[name].model or "")
        return RunRecord.read(folder) if (folder / RESOLVED).is_file() and (folder / LOG).is_file() else None

    @property
    def plain_score(self) -> float | None:
        """:attr:`score` of the same student without distillation, trained beside this run or given in the recipe."""
        if self.plain is not None:
            return self.plain.last(self.score.logged)
        return self.recipe.baseline if isinstance(self.recipe.baseline, float) else None
