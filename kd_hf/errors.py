"""The one exception that means "the user can fix this", and how a command ends on it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake a user can mend. Its text is the whole message: what, where, and what would be right."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` (leading space), or the list of choices when none is close."""
    names = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f" Known: {shown}." if names else ""


def is_main_process() -> bool:
    """True in the one process whose words a person reads (rank 0, or no launcher at all)."""
    return int(os.environ.get("RANK", "0")) == 0


def run_command(main: Callable[[list[str]], int]) -> None:
    """Run a command's ``main(argv)`` and exit with its code: 2 and one line for a :class:`UserError`."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        if is_main_process():
            print(f"kd_hf: error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("kd_hf: interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code)
