"""What ``data.path`` means on this machine, and what a user is told who wrote something else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kd_hf.data.folders import is_data
from kd_hf.data.pixels import IMAGE_SUFFIXES
from kd_hf.data.source import GIVEN_DATA, TABLE_PATTERNS
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import DataConfig

ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def with_local_path(cfg: DataConfig) -> DataConfig:
    """The block with ``~`` and environment variables in `path` filled in.

    Raises:
        UserError: nothing is written there, or a variable that is not set.
    """
    if not cfg.path.strip():
        raise UserError("data.path is empty; give a folder, or a data set of the Hub as owner/name")
    if cfg.path == GIVEN_DATA:
        raise UserError("data.path: the images of this run were handed over in Python; give them again, or a path")
    path = os.path.expanduser(os.path.expandvars(cfg.path))
    if "$" in cfg.path and (unset := _VARIABLE.search(path)):
        raise UserError(f"data.path: the environment variable {unset[1].strip('{}')} in '{cfg.path}' is not set")
    return cfg if path == cfg.path else cfg.model_copy(update={"path": path})


def local_folder(cfg: DataConfig) -> Path | None:
    """The folder that ``data.path`` is; None where it can only be a data set of the Hub.

    Raises:
        UserError: a file, with what to do with one of its kind; or a path that does not exist.
    """
    path = Path(cfg.path)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"data.path: '{cfg.path}' is a file; {_advice(path)}")
    if path.is_absolute() or cfg.path.startswith(".") or cfg.path.count("/") > 1:
        raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{_near(path)}")
    if is_archive(path):
        raise UserError(f"data.path: there is no file '{cfg.path}', and archives have to be unpacked.{_near(path)}")
    return None


def is_archive(path: str | Path) -> bool:
    """Whether a file is packed, by its name; plain tar files are read as they are."""
    return str(path).lower().endswith(ARCHIVES)


def holds_tables(folder: Path) -> bool:
    """Whether a folder is one of Parquet or tar files, and not one of class folders or of COCO's files."""
    return any(is_data(path.name) for pattern in TABLE_PATTERNS for path in folder.glob(pattern))


def packed_file(folder: Path) -> str | None:
    """The first archive that lies in a folder, which may be why it holds nothing else."""
    return next((entry.name for entry in sorted(folder.iterdir()) if is_archive(entry.name) and entry.is_file()), None)


def _near(path: Path) -> str:
    """The entry beside a path that is called nearly alike."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, names)


def _advice(path: Path) -> str:
    suffix = path.suffix.lower()
    if is_archive(path):
        return f"unpack it, and give the folder: {_unpacking(path)}"
    if suffix in (".parquet", ".tar"):
        return (
            "a data set has one for each split; set data.path to its folder and data.data_files to "
            f"{{train: {path.name}, validation: …}}"
        )
    if suffix in IMAGE_SUFFIXES:
        return "it is one image; give the folder that holds train/<class>/<image>.jpg"
    return "give a folder of class folders, of Parquet or tar files, or a data set of the Hub as owner/name"


def _unpacking(path: Path) -> str:
    name = path.name.lower()
    stem = path.with_name(path.name.split(".")[0])
    if name.endswith(".zip"):
        return f"unzip {path} -d {stem}"
    if ".tar." in name or name.endswith((".tgz", ".tbz2", ".txz")):
        return f"mkdir {stem} && tar -xf {path} -C {stem}"
    return f"unpack {path} into {stem}"
