"""Lists as people write them."""

from __future__ import annotations

from collections.abc import Sequence


def enumerate_names(names: Sequence[str], shown: int = 3) -> str:
    """The first few names and how many there are: ``a, b, c, … (17 in all)``."""
    more = f", … ({len(names)} in all)" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
