"""What in a folder was written by this package, and so may be replaced or removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kd_hf.errors import UserError
from kd_hf.files import is_passing, writing
from kd_hf.layout import CHECKPOINTS, ENDING, LOG, PAGE, REPORT, RESOLVED, STUDENT
from kd_hf.recipe.resolved import HASH_LINE
from kd_hf.run.checkpoint import STATE

# what a run writes into `student/` and `report/`, by the path in its folder; the rest is somebody else's
_WRITTEN = re.compile(
    rf"{STUDENT}/(model[^/]*\.safetensors(\.index\.json)?|(preprocessor_)?config\.json|README\.md|{re.escape(RESOLVED)}"
    rf"|{REPORT}/[^/]+\.png|\.eval_results/[^/]+\.yaml)|{REPORT}/([^/]+\.png|{re.escape(PAGE)})"
)
_NAMES = (CHECKPOINTS, STUDENT, REPORT, LOG, RESOLVED, ENDING)


def check_own(folder: Path) -> None:
    """Refuse a folder in which a run would replace something that was not written by one.

    The resolved recipe marks a run folder: it is the first that a run writes and the last that it removes, and in a
    folder without it nothing has the names that runs use.

    Raises:
        UserError: naming what lies there.
    """
    with writing(folder):
        if (folder / "config.json").is_file() and is_run_folder(folder):
            raise UserError(f"train.output_dir: '{folder}' is the folder of a student; choose another folder")
        if is_run_folder(folder):
            return
        for name in _NAMES:
            path = folder / name
            if path.exists() and not _is_ours(path):
                raise UserError(
                    f"train.output_dir: '{folder}' holds '{name}', which kd_hf did not write and will not replace; "
                    "choose another folder, or move that elsewhere"
                )


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written its recipe there."""
    try:
        with (folder / RESOLVED).open("rb") as file:
            return file.read(len(HASH_LINE)) == HASH_LINE.encode()
    except OSError:
        return False


def written_in(folder: Path) -> Iterator[str]:
    """What a run has written into the student and the report in its folder, by its path in there."""
    for place in (STUDENT, REPORT):
        for path in sorted((folder / place).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _WRITTEN.fullmatch(name):
                yield name


def _is_ours(path: Path) -> bool:
    """Whether a file or folder in a folder without a recipe comes from a run, by copying or from the Hub."""
    if not path.is_dir():
        return False
    inside = [entry for entry in path.iterdir() if not is_passing(entry.name)]
    if path.name == CHECKPOINTS:
        return all((entry / STATE).is_file() for entry in inside)
    return not inside or (path.name == STUDENT and is_run_folder(path))
