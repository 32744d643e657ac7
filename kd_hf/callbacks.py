"""What a run tells others: the state callbacks see, the JSON-lines log, the progress bar.

Callbacks follow transformers' protocol (``on_step_end(args, state, control, **kwargs)`` and so on), so
``transformers.TrainerCallback`` objects work; nothing here imports transformers.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kd_hf.files import write_text, writing

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.config import TrainConfig
    from kd_hf.run import RunLength

LOG = "log.jsonl"


@dataclass
class TrainerState:
    """Progress of a run, under transformers' names."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    logging_steps: int = 0
    train_batch_size: int | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None

    @classmethod
    def of(cls, args: TrainConfig, length: RunLength, accelerator: Accelerator) -> TrainerState:
        """The state before the first step."""
        return cls(
            max_steps=length.total_steps,
            num_train_epochs=length.total_steps / length.steps_per_epoch,
            logging_steps=args.logging_steps,
            train_batch_size=args.per_device_train_batch_size,
            is_world_process_zero=accelerator.is_main_process,
            is_local_process_zero=accelerator.is_local_main_process,
        )

    def note_best(self, value: float, greater_is_better: bool) -> bool:
        """Remember an evaluation of the current step if it is the best so far; says whether it is."""
        best = self.best_metric
        if best is not None and not (value > best if greater_is_better else value < best):
            return False
        self.best_metric, self.best_global_step = value, self.global_step
        return True


@dataclass
class TrainOutput:
    """What a training returns."""

    global_step: int
    training_loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    stopped_by: str = ""  # the signal that ended the run early, or nothing

    @classmethod
    def of(cls, state: TrainerState, stopped_by: str = "") -> TrainOutput:
        """The last loss and the last evaluation of a run's log."""
        metrics: dict[str, float] = {}
        for entry in state.log_history:
            metrics.update({key: value for key, value in entry.items() if key.startswith("eval_")})
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return cls(state.global_step, losses[-1] if losses else math.nan, metrics, stopped_by)


@dataclass
class TrainerControl:
    """Requests a callback may make."""

    should_training_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class CallbackList:
    """Calls every callback's method of an event, if it has one.

    Args:
        args: the recipe's `train` block.
        callbacks: objects or classes.
        objects: what every call also carries by name (``model``, ``optimizer``, …).
    """

    def __init__(self, args: Any, callbacks: Iterable[Any] = (), objects: Mapping[str, Any] | None = None) -> None:
        self.args, self.objects = args, dict(objects or {})
        self.callbacks: list[Any] = []
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add a callback, class or instance."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def remove(self, callback: Any) -> None:
        """Remove a callback by instance or by class."""
        self.callbacks = [kept for kept in self.callbacks if kept is not callback and type(kept) is not callback]

    def call(self, event: str, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Run ``callback.<event>(args, state, control, **kwargs)`` for all."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self.args, state, control, **self.objects, **kwargs)

    def stateful(self) -> dict[str, Any]:
        """What callbacks of transformers' `ExportableState` want to keep in a checkpoint, by class name."""
        return {type(c).__name__: c.state()["attributes"] for c in self.callbacks if _keeps_state(c)}

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Give callbacks back what a checkpoint holds of them."""
        for callback in self.callbacks:
            if _keeps_state(callback):
                vars(callback).update(states.get(type(callback).__name__, {}))


def _keeps_state(callback: Any) -> bool:
    return callable(getattr(callback, "state", None)) and callable(getattr(type(callback), "from_state", None))


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
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

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
