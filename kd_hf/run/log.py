"""``log.jsonl``: one object a line, the single source for plots and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_hf.files import write_text, writing
from kd_hf.layout import LOG


class JsonLines:
    """``log.jsonl``: one object a line, the single source for plots and comparisons."""

    def __init__(self, folder: Path, keep_until: int) -> None:
        """Continue the log of `folder`, forgetting what was written after step `keep_until`."""
        self.path = folder / LOG
        kept = [line for line in read_log(folder) if line.get("step", 0) <= keep_until] if keep_until else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append a line; non-finite numbers become null, which is what JSON has."""
        clean = {key: None if value != value or value in (float("inf"), float("-inf")) else value
                 for key, value in values.items()}  # fmt: skip
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line cut off by a kill is left out."""
    path = folder / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values
