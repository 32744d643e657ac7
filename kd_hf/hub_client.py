"""How the Hub's client is spoken to: its retries and bars kept quiet, and patience with what may pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

_REQUESTS = ("huggingface_hub.utils._http", "huggingface_hub.file_download")  # loggers that tell of each try

T = TypeVar("T")

WAITS = (1.0, 5.0, 25.0)  # seconds between tries
_LONGEST_WAIT = 300.0  # seconds; the window of the Hub's rate limits
_PASSING = {408, 409, 412, 429}  # beside all 5xx; 409 and 412: another commit came in between


def telling_part(error: BaseException) -> BaseException:
    """The first error of a chain that says what happened between the client and the Hub; else the outermost."""
    from huggingface_hub import errors

    known = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HTTPError)
    part: BaseException | None = error
    while part is not None and not isinstance(part, known):
        part = part.__cause__ or part.__context__
    return part or error


def patiently(call: Callable[[], T], waits: Sequence[float] = WAITS) -> T:
    """Call, and again after each of `waits` (in seconds) while the failure is one that may pass; without a word."""
    for least in waits:
        try:
            with without_retries():
                return call()
        except Exception as error:
            pause = _pause(telling_part(error), least)
            if pause is None:
                raise
        time.sleep(pause)
    with without_retries():
        return call()


def _pause(error: BaseException, least: float) -> float | None:
    """Seconds to wait before another try, no less than the Hub asks for; None when trying again cannot help."""
    from huggingface_hub import errors
    from huggingface_hub.utils import parse_ratelimit_headers

    response: Any = getattr(error, "response", None)
    if response is None:
        # without a number it is the client's own error, or ours: what arrived is not what was announced
        damaged = isinstance(error, OSError) and error.errno is None
        passing = isinstance(error, errors.HTTPError) or damaged
        return least if passing and not isinstance(error, errors.OfflineModeIsEnabled) else None
    if response.status_code not in _PASSING and response.status_code < 500:
        return None
    limit, asked = parse_ratelimit_headers(response.headers), response.headers.get("Retry-After", "")
    reset = limit.reset_in_seconds if limit is not None and limit.remaining == 0 else 0
    return min(max(least, reset, float(asked) if asked.isdigit() else 0.0), _LONGEST_WAIT)


def hub_answers(seconds: float = 10.0) -> bool:
    """Whether the Hub can be reached, by one request; the client itself would try for half a minute."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except (errors.HTTPError, OSError):  # offline mode is an OSError
        return False
    return True


@contextmanager
def hub_left_alone() -> Iterator[None]:
    """Offline mode for a while: what lies in the caches is found, and nothing else is asked for."""
    import datasets
    from huggingface_hub import constants

    switches: tuple[Any, ...] = (constants, datasets.config)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the client's progress bars out of what the training shows."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    wanted = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # somebody asked for them
    with nullcontext() if wanted else disable_progress_bars():
        yield


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
