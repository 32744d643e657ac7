"""``finished.json``: what a run has exported and described, so that a finished run is one that is whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from kd_hf.files import FileSum, write_text
from kd_hf.layout import ENDING, STUDENT
from kd_hf.run.identity import Identity
from kd_hf.run.ownership import written_in

FORMAT = 1
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    identity: Identity
    step: int
    """The step it ended after."""
    files: dict[str, FileSum]
    """What was written into ``student/`` and ``report/``, by its path in the run folder."""
    described: bool
    """Whether report and card are among them."""

    def write(self, folder: Path) -> None:
        """Keep it in a run folder."""
        write_text(folder / ENDING, json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    def fault(self, folder: Path) -> str | None:
        """What is wrong with the exported weights, in a few words; None when nothing is.

        Only weights are compared to the bit: people edit cards.
        """
        for name, expected in self.files.items():
            if name.startswith(f"{STUDENT}/") and name.endswith(WEIGHTS) and (fault := expected.fault(folder / name)):
                return f"{name} {fault}"
        config = folder / STUDENT / "config.json"
        return None if config.is_file() else f"{STUDENT}/{config.name} is missing"

    def is_whole(self, folder: Path) -> bool:
        """Whether the student is described, and nothing that was written is missing."""
        return self.described and all((folder / name).is_file() for name in self.files)


_ADAPTER = TypeAdapter(Ending)


def ending_of(folder: Path, identity: Identity, step: int, described: bool) -> Ending:
    """The ending of a run whose student lies in its folder, with its report and card where it is `described`."""
    return Ending(identity, step, {name: FileSum.of(folder / name) for name in written_in(folder)}, described)


def read_ending(folder: Path) -> Ending | None:
    """The ending that a run folder holds; None where there is none that this version can read."""
    try:
        values = json.loads((folder / ENDING).read_text(encoding="utf-8"))
        return _ADAPTER.validate_python(values) if values["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
        return None
