"""Keeping the libraries' own words out of a run's lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_REQUESTS = ("huggingface_hub.utils._http", "huggingface_hub.file_download")  # loggers that tell of each try


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars for files of a moment, no remarks on loading: what matters is checked and said by whoever loads."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_retries() -> Iterator[None]:
    """No warnings of the Hub's client for each try that failed: in the end its caller says in one line what is wrong.

    Who asks the client for more than warnings (`HF_HUB_VERBOSITY=info`) keeps them. Threads may do this at a time.
    """
    with ExitStack() as stack:
        for logger in map(logging.getLogger, _REQUESTS):
            if not logger.isEnabledFor(logging.INFO):
                errors_only = _ErrorsOnly()
                logger.addFilter(errors_only)
                stack.callback(logger.removeFilter, errors_only)
        yield


class _ErrorsOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
