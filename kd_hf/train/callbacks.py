"""What a run tells callbacks: its state, and what they may ask for.

Callbacks follow transformers' protocol (``on_step_end(args, state, control, **kwargs)`` and so on), so
``transformers.TrainerCallback`` objects work; nothing here imports transformers.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd_hf.recipe.config import TrainConfig
    from kd_hf.run.length import RunLength


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

    @property
    def exit_code(self) -> int:
        """That of a command: 0, or 128 and the number of the signal, as of a process that the signal ended."""
        return 128 + signal.Signals[self.stopped_by] if self.stopped_by else 0

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
