"""The one exception that means "the user can fix this", and how a command ends on it."""

from __future__ import annotations

import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress


class UserError(Exception):
    """A mistake a user can mend. Its text is the whole message: what, where, and what would be right."""


class LocalError(UserError):
    """One that shows in a single process, such as an unreadable file, so that this process has to say it."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` (leading space), or the list of choices when none is close."""
    names = sorted(str(choice) for choice in choices)
    likeness = {other: difflib.SequenceMatcher(None, other.lower(), name.lower()).ratio() for other in names}
    ranked = sorted(names, key=lambda other: -likeness[other])
    if ranked and likeness[ranked[0]] >= 0.6:
        return f" Did you mean '{ranked[0]}'?"
    shown = ", ".join(sorted(ranked[:12])) + (", …" if len(names) > 12 else "")
    return f" Known: {shown}." if names else ""


def is_main_process() -> bool:
    """True in the one process whose words a person reads (rank 0, or no launcher at all)."""
    return int(os.environ.get("RANK", "0")) == 0


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command's ``main(argv)`` and exit with its code: 2 and one line for a :class:`UserError`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in a locale that lacks × or ü
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        code = _output_ended(error)
    except UserError as error:
        if is_main_process() or isinstance(error, LocalError):
            where = "" if is_main_process() else f" (process {os.environ['RANK']})"
            # one line, whatever a library's message that was quoted looked like
            print(f"kd_hf: error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("kd_hf: interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)


def _output_ended(error: OSError) -> int:
    """The exit code where it was the standard output that could not be written; raises `error` where it was not."""
    try:
        sys.stdout.flush()  # it still has what it could not write
    except OSError as lost:
        drop_output()
        if isinstance(lost, BrokenPipeError):  # whoever read it has read enough
            return 128 + signal.SIGPIPE
        print(f"kd_hf: error: cannot write to the standard output: {lost.strerror}", file=sys.stderr, flush=True)
        return 2
    raise error


def drop_output() -> None:
    """Have what is still written to the standard output go nowhere, since it cannot go where it should."""
    with suppress(OSError, ValueError):  # a notebook's has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
