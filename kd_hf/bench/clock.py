"""Time on a device between marks, and pieces of work that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Mark = Callable[[str], None]
Work = Callable[[Mark], None]


class Stopwatch:
    """Seconds between marks.

    On a GPU marks are events in the current stream, and nothing waits for the device before :meth:`read`. On a CPU
    they are the processor time of this process while it works on one thread and alone, so that the turns of other
    programs do not count; else the wall clock.

    Args:
        device: where the work is done.
        alone: whether nothing waits for other processes.
    """

    def __init__(self, device: torch.device, alone: bool = True) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []
        self._now: Callable[[], Any] = time.perf_counter
        self.counts = "wall-clock time"
        if device.type == "cuda":
            self._now, self.counts = self._event, "time on the GPU"
        elif alone and torch.get_num_threads() == 1:
            self._now, self.counts = time.process_time, "processor time"

    def start(self) -> None:
        """Begin, once the device has done all that was asked of it."""
        self._wait()
        self._marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """End a part: what happened since the last mark is called `part`."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part since :meth:`start`; parts of one name are added."""
        self._wait()
        found: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks[:-1], self._marks[1:], strict=True):
            seconds = before.elapsed_time(after) / 1e3 if isinstance(before, torch.cuda.Event) else after - before
            found[part] = found.get(part, 0.0) + seconds
        return found

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def ignore(part: str) -> None:
    """The mark of a run that is not timed."""


@dataclass(frozen=True)
class Slot:
    """Work that takes its turn in every round: run once untimed, then `repeats` times in a row on the watch."""

    work: Work
    watch: Stopwatch
    repeats: int = 1

    def seconds(self) -> dict[str, float]:
        """Seconds of one run by part."""
        self.work(ignore)
        self.watch.start()
        for _ in range(self.repeats):
            self.work(self.watch.mark)
        return {part: seconds / self.repeats for part, seconds in self.watch.read().items()}


Rounds = Sequence[Mapping[str, float]]  # seconds by part, for every round


def take_turns(slots: Mapping[str, Slot], rounds: int) -> dict[str, Rounds]:
    """Run all slots in every round, in reversed order every other one, so that a drift of the machine cancels."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in slots}
    for number in range(rounds):
        for name in list(slots)[:: -1 if number % 2 else 1]:
            found[name].append(slots[name].seconds())
    return dict(found)


def totals(rounds: Rounds, without: str = "") -> list[float]:
    """Seconds of every round over its parts, one of them left out."""
    return [sum(seconds for part, seconds in parts.items() if part != without) for parts in rounds]


def medians(rounds: Rounds) -> dict[str, float]:
    """The median over rounds of every part."""
    return {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and their quartiles."""
    ratios = sorted(one / other for one, other in zip(above, below, strict=True))
    last = len(ratios) - 1
    return {
        "median": statistics.median(ratios),
        "low": ratios[round(0.25 * last)],
        "high": ratios[round(0.75 * last)],
    }
