"""The door to images: class folders, Parquet and tar files, the Hub, the digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.data.digits import DigitsSource
from kd_hf.data.source import GIVEN_DATA, TABLE_PATTERNS
from kd_hf.errors import UserError, nearest
from kd_hf.recipe.config import DataConfig

if TYPE_CHECKING:
    from kd_hf.data.source import Source, Split


def open_source(cfg: DataConfig, split: Split, seed: int = 0) -> Source:
    """Open one split of the recipe's data.

    Args:
        cfg: the recipe's `data` block.
        split: which of its two splits.
        seed: decides which training images keep their label when `cfg.num_labels` is set.

    Raises:
        UserError: the data, split or columns do not exist, or more labels are asked for than there are.
    """
    return with_labels(_open(cfg, split), cfg, split, seed)


def with_labels(source: Source, cfg: DataConfig, split: Split, seed: int = 0) -> Source:
    """The source with the labels that the recipe's `data` block leaves it; see :func:`open_source`."""
    if len(source) == 0:
        raise UserError(f"data.path: no images in {source.describe()}")
    source.hold = cfg.hold
    if split == "eval" or (cfg.num_labels is None and cfg.unlabelled == "keep"):
        return source
    from kd_hf.data.labels import LabelSubset

    subset = LabelSubset(source, cfg.num_labels, cfg.unlabelled, seed)
    subset.revision, subset.hold = source.revision, cfg.hold
    return subset


def _open(cfg: DataConfig, split: Split) -> Source:
    if cfg.path == GIVEN_DATA:
        raise UserError("data.path: the images of this run were handed over in Python; give them again, or a path")
    if cfg.path.startswith("builtin:"):
        if cfg.path != "builtin:digits":
            raise UserError(f"data.path: unknown built-in data '{cfg.path}'.{nearest(cfg.path, ['builtin:digits'])}")
        return DigitsSource(split)
    from kd_hf.data.folders import FolderSource
    from kd_hf.data.tables import open_files

    folder = Path(cfg.path).expanduser()
    if folder.is_dir():
        listed = cfg.data_files or any(any(folder.glob(pattern)) for pattern in TABLE_PATTERNS)
        return open_files(cfg, split) if listed else FolderSource(folder, cfg, split)
    if folder.is_absolute() or cfg.path.startswith((".", "~")) or cfg.path.count("/") > 1:
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{near}")
    return open_files(cfg, split)
