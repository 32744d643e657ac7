"""What a user is told when data cannot be found, opened or read any further."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_hf.errors import UserError, nearest
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
        raise UserError(f"data.path: '{cfg.path}': {reason}.{_advice(error, reason, cfg.path)}") from error


def _advice(error: Exception, reason: str, path: str) -> str:
    from datasets.exceptions import DatasetNotFoundError

    here = nearest(Path(path).name, [entry.name for entry in Path(path).parent.glob("*")])
    near = f" (there is no '{path}' here.{here})" if "Did you mean" in here else ""
    missing = isinstance(error, DatasetNotFoundError)
    silent = isinstance(error, ConnectionError) or "LocalEntryNotFoundError" in reason
    cases = (
        ("gated" in reason.lower(), " Accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"),
        ("Invalid credentials" in reason, " Renew HF_TOKEN, or run `hf auth login`"),
        (missing and "Revision" in reason, " Check `data.revision`"),
        (missing, f" Check the spelling{near}; a private one needs `hf auth login` or HF_TOKEN"),
        ("BuilderConfig" in reason or "Config name is missing" in reason, " Set `data.name` to one of these"),
        (silent, f" Check the network (and HF_HUB_OFFLINE), or give a local folder{near}"),
        (isinstance(error, FileNotFoundError), " Check `data.path` and `data.data_files`"),
    )
    return next((advice for applies, advice in cases if applies), "")
