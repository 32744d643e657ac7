"""What a terminal shows: lines, tables, sizes, durations, the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from kd_hf.errors import drop_output, is_main_process


class Progress:
    """The progress bar of one run, on the main process only; plain lines when nobody watches a terminal."""

    def __init__(self, total: int, start: int, images_per_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.images_per_step = images_per_step
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not (enabled and watched()),
            file=sys.stderr,
        )
        self._last = (time.perf_counter(), start)

    def advance(self) -> None:
        """One step done."""
        self.bar.update(1)

    def rate(self, step: int) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        (before, from_step), self._last = self._last, (now, step)
        return (step - from_step) * self.images_per_step / max(now - before, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluating, saving) does not count into the rate."""
        start = time.perf_counter()
        yield
        before, step = self._last
        self._last = (before + time.perf_counter() - start, step)

    def show(self, values: dict[str, Any], step: int, total: int) -> None:
        """Loss parts and rate: behind the bar, or as a line where there is no terminal."""
        parts = [key for key in values if "/" in key and not key.startswith("weight/")]
        keys = [key for key in ("loss", *parts, "lr", "images_per_second") if key in values]
        shown = {key: f"{values[key]:.4g}" for key in keys}
        if not self.bar.disable:
            self.bar.set_postfix(shown)
        elif self.enabled:
            left = (total - step) * self.images_per_step / max(values.get("images_per_second", 0.0), 1e-9)
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            self.say(f"step {step}/{total}  {text}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """A line on standard output, above the bar if there is one (which is on standard error)."""
        _write(text)

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def watched() -> bool:
    """Whether a person sees the standard error as it moves, so that bars make sense."""
    return sys.stderr.isatty()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def say(*lines: str) -> None:
    """Write lines on standard output, from the main process only; what cannot be said does not end what is done."""
    if is_main_process():
        for line in lines:
            _write(line)


def _write(text: str) -> None:
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except UnicodeEncodeError:  # in a locale that lacks × or ü
        _write(text.encode("ascii", "backslashreplace").decode())
    except OSError as error:
        drop_output()
        with suppress(OSError):
            lost = f"the standard output cannot be written ({error.strerror})"
            print(f"kd_hf: warning: {lost}; the work goes on in silence", file=sys.stderr, flush=True)


def bytes_text(size: float) -> str:
    """A number of bytes in words, three digits of it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def duration_text(seconds: float) -> str:
    """A duration in words, in the unit that fits it."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as aligned columns, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
