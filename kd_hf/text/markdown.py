"""Markdown that holds whatever text a user wrote: spans, links, fences and tables that it cannot break."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

_SPECIAL = re.compile(r"([\\`*_~\[\]<>#$])")


def plain(text: object) -> str:
    """Text on one line that is shown as it is written."""
    return _SPECIAL.sub(r"\\\1", _one_line(text).replace("&", "&amp;"))


def code(text: object) -> str:
    """A code span; its fence is longer than any run of backticks inside."""
    line = _one_line(text)
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}" if line else ""


def link(text: object, url: str) -> str:
    """A link; what has no place in a URL is percent-encoded."""
    return f"[{plain(text)}]({quote(url, safe=':/?#@!$&*+,;=%~.-_')})"


def fenced(text: str, language: str = "") -> list[str]:
    """Lines of a code block; its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}{language}", *text.rstrip("\n").split("\n"), fence]


def table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a GitHub table; `rows` are Markdown, the first of them the head.

    Args:
        rows: cells, as many in each row.
        left: so many columns are aligned to the left, the others to the right.
    """
    cells = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
