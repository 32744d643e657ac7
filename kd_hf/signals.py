"""The signals that ask a run to save and stop: what terminals, launchers and schedulers send."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; kill, timeout, Slurm, Kubernetes; a terminal that closes; what schedulers send ahead of the end on request
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # some systems lack some


class StopSignal:
    """Turns such a signal into a request that the loop reads; a second Ctrl-C interrupts at once.

    A signal that is ignored stays so (``nohup`` ignores SIGHUP), and outside the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


def name_of(number: int) -> str:
    """What a signal is called."""
    return signal.Signals(number).name


def leave_stopping_to_the_parent() -> None:
    """In a process that works for another one: a signal to their group must not end it before the parent has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
