"""The door to images: class folders, Parquet and tar files, the Hub, the digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.data.digits import DigitsSource
from kd_hf.data.place import holds_tables, local_folder, packed_file, with_local_path
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
    return with_labels(_open(with_local_path(cfg), split), cfg, split, seed)


def with_labels(source: Source, cfg: DataConfig, split: Split, seed: int = 0) -> Source:
    """The source with the labels that the recipe's `data` block leaves it; see :func:`open_source`."""
    if len(source) == 0:
        raise UserError(f"data.path: no images in {source.describe()}" + (f"; {source.note}" if source.note else ""))
    labelled = source
    if split == "train":
        from kd_hf.data.labels import LabelSubset, WithUnlabelled, unlabelled_folder

        folder = unlabelled_folder(cfg)
        labelled = source if folder is None else WithUnlabelled(source, folder)
        if cfg.num_labels is not None or cfg.unlabelled == "drop":
            labelled = LabelSubset(labelled, cfg.num_labels, cfg.unlabelled == "drop", seed)
    labelled.revision, labelled.hold = source.revision, cfg.hold
    return labelled


def _open(cfg: DataConfig, split: Split) -> Source:
    if cfg.path.startswith("builtin:"):
        if cfg.path != "builtin:digits":
            raise UserError(f"data.path: unknown built-in data '{cfg.path}'.{nearest(cfg.path, ['builtin:digits'])}")
        return DigitsSource(split)
    from kd_hf.data.folders import FolderSource
    from kd_hf.data.tables import open_files

    folder = local_folder(cfg)
    if folder is None or cfg.data_files or holds_tables(folder):
        return open_files(cfg, split)
    try:
        return FolderSource(folder, cfg, split)
    except UserError as error:
        archive = packed_file(folder)
        if archive is None:
            raise
        raise UserError(f"{error}; {Path(folder, archive)} has to be unpacked first") from error
