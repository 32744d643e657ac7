"""What a user is told when data cannot be found, opened or read any further."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig

# an address up to its query, which may be a kilobyte of signatures that are nobody else's business
ADDRESS = re.compile(r"(https?://)(?:[^\s/?#@'\"<>]*@)?([^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*)?")
CONTINUE = "once it can be read, the same command continues the run from its last checkpoint"


def plain_reason(error: BaseException) -> str:
    """The words of an error in one line, without the queries (signatures) and passwords of the addresses in it."""
    text = ADDRESS.sub(r"\1\2", " ".join(str(error).split())).rstrip(".")
    return text or type(error).__name__


@contextmanager
def library_errors(cfg: DataConfig) -> Iterator[None]:
    """Turn what `datasets` and the Hub client raise into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = plain_reason(error)
        raise UserError(f"data.path: '{cfg.path}': {reason}.{_advice(error, reason)}") from error


def _advice(error: Exception, reason: str) -> str:
    from datasets.exceptions import DatasetNotFoundError

    missing = isinstance(error, DatasetNotFoundError)
    silent = isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason
    cases = (
        ("gated" in reason.lower(), " Accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"),
        ("Invalid credentials" in reason, " Renew HF_TOKEN, or run `hf auth login`"),
        (missing and "Revision" in reason, " Check `data.revision`"),
        (missing, " Check the spelling; a private one needs `hf auth login` or HF_TOKEN"),
        ("BuilderConfig" in reason or "Config name is missing" in reason, " Set `data.name` to one of these"),
        (silent, " Check the network (and HF_HUB_OFFLINE), or give a local folder"),
        (isinstance(error, FileNotFoundError), " Check `data.path` and `data.data_files`"),
    )
    return next((advice for applies, advice in cases if applies), "")


def check_labels(smallest: int, largest: int, names: Sequence[str] | None, where: str) -> None:
    """Raise :class:`UserError` for labels that are no class numbers: below -1 (none), or beyond the `names`."""
    if smallest < -1:
        raise UserError(f"data.label_column: {where} has the label {smallest}; expected 0, 1, 2, … (-1: no label)")
    if names is not None and largest >= len(names):
        raise UserError(f"data.label_column: {where} has the label {largest}, but only {len(names)} classes, from 0 on")
