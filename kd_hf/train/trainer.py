"""DistillTrainer: the loop around one module, its teachers and a stream of batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kd_hf.distillation.assembly import Assembly, assemble
from kd_hf.distillation.choices import weights_at
from kd_hf.distillation.gate import pass_gate
from kd_hf.distillation.module import check_batch
from kd_hf.distillation.sharding import check_sharding
from kd_hf.distillation.summary import announce
from kd_hf.distillation.teacher import Teacher
from kd_hf.errors import LocalError, UserError
from kd_hf.metrics.predictions import EvalPrediction, PredictionOutput, Predictions
from kd_hf.process import (
    Vote,
    agreed,
    build_accelerator,
    check_agreement,
    nondeterminism_named,
    seed_networks,
    set_cpu_threads,
)
from kd_hf.recipe.config import HubConfig, Recipe, TrainConfig
from kd_hf.run import checkpoint as ckpt
from kd_hf.run.folder import RunFolder, Start
from kd_hf.run.length import run_length
from kd_hf.run.log import read_log
from kd_hf.run.state import CheckpointState
from kd_hf.signals import StopSignal, name_of
from kd_hf.tasks.score import best_by
from kd_hf.train.arguments import Methods, Network, Setup, read_setup
from kd_hf.train.callbacks import CallbackList, TrainerControl, TrainerState, TrainOutput
from kd_hf.train.feed import Feed, open_feed
from kd_hf.train.journal import Journal, run_facts, shown_metrics
from kd_hf.train.losses import LossWindow
from kd_hf.train.publication import Publication
from kd_hf.train.trainable import Trainable


class DistillTrainer:
    """Distils a student.

    Args:
        student: the network that is trained: a Hub id or timm name (with its weights), a timm or transformers model,
            any other torch classifier. Or a whole :class:`~kd_hf.recipe.config.Recipe`, which then says all
            of the rest.
        teacher: the network that is imitated, in the same forms; several by name; None to train without one.
        methods: losses by name as in a recipe, `{"kd": {"weight": 0.5, "temperature": 2}}`; a number is a weight, a
            list of names takes the papers' values. `task`, the loss on labels, is there unless it is changed.
        args: a :class:`~kd_hf.recipe.config.TrainConfig`, a dict of its keys and those of `hub`, or the output folder.
        train_dataset: a `datasets.Dataset` with an image and a label column, a torchvision data set, or a
            :class:`~kd_hf.data.source.Source`; augmentation is this trainer's own.
        eval_dataset: held-out images, in the same forms.
        callbacks: objects or classes with transformers' callback methods.
        compute_metrics: maps an object with `predictions` (logits ``[N, K]``) and `label_ids` ``[N]`` to further
            metrics of an evaluation.
        data: keys of a recipe's `data` block: `augment`, `image_size`, column names; with `path` also the images.
        eval: keys of a recipe's `eval` block.
        hub: keys of a recipe's `hub` block.
        processing_class: the image processor of a transformers student, which says how its images are prepared.

    Raises:
        UserError: anything that was asked for and cannot be had, before the first step.

    Example:
        >>> trainer = DistillTrainer(load_recipe("recipes/quickstart.yaml"))
        >>> trainer.train().metrics["eval_top1"]
    """

    def __init__(
        self,
        student: Network | Recipe,
        teacher: Network | Mapping[str, Network] | None = None,
        methods: Methods | None = None,
        args: TrainConfig | Mapping[str, Any] | str | Path | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: Iterable[Any] = (),
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        *,
        data: Mapping[str, Any] | None = None,
        eval: Mapping[str, Any] | None = None,
        hub: HubConfig | Mapping[str, Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        given = (student, teacher, methods, args, train_dataset, eval_dataset, data, eval, hub, processing_class)
        setup: Setup = read_setup(*given)
        self.recipe, self.compute_metrics = setup.recipe, compute_metrics
        self.task = setup.task
        metric, greater = best_by(self.recipe.train, self.task.score)
        resolved = {
            "metric_for_best_model": metric,
            "greater_is_better": greater,
        }  # callbacks of transformers read both
        self.args = self.recipe.train.model_copy(update=resolved)
        self._best_by, self._greater_is_better = metric, greater
        self.train_source, self.eval_source = setup.train_source, setup.eval_source
        source = self.train_source
        self.parts: Assembly = assemble(
            self.recipe, source.num_classes, given=setup.networks, samples=source, task=self.task
        )
        self.task.check_classes(self.parts.student.info, self.train_source)
        unused = self.task.unused_parameters or self.parts.module.may_pause
        self.accelerator: Accelerator = build_accelerator(self.args, unused_parameters=unused)
        self.device = self.accelerator.device
        self.length = run_length(self.args, len(self.train_source), self.accelerator.num_processes)
        self.journal = Journal(self.accelerator, self.args)
        main = self.accelerator.is_main_process
        weights = {name: teacher.weights_hash() for name, teacher in self.parts.teachers.items() if main}
        images = {"train": self.train_source, "eval": self.eval_source}
        self.run = RunFolder(self.recipe, self.length.global_batch, images, weights)
        named = self.task.named(self.parts.student, source.class_names)
        self.publication = Publication(self.run, named, self.journal.say)
        self._build()
        objects = {"model": self.trained.plain.student.network, "processing_class": processing_class}
        objects |= {"optimizer": self.trained.optimizer, "lr_scheduler": self.trained.schedule}
        self.callbacks = CallbackList(self.args, callbacks, objects)
        self._has_begun = False
        self._callbacks_before: dict[str, Any] = {}
        self._set_back()
        self.callbacks.call("on_init_end", self.state, self.control)

    def _set_back(self) -> None:
        """Stand before the first step."""
        self.state = TrainerState.of(self.args, self.length, self.accelerator)
        self.control = TrainerControl()
        self.window = LossWindow()
        self.corrupt: set[int] = set()
        self.skipped_steps = 0  # by this process's scaler since it started
        self._seconds_before, self._clock = 0.0, time.perf_counter()
        self._evaluated_at = self._saved_at = -1

    # ------------------------------------------------------------------------------------------ building

    def _build(self) -> None:
        """Place everything on the device and hand the one module to accelerate."""
        args, accelerator = self.args, self.accelerator
        check_batch(self.parts.choices, args.per_device_train_batch_size, accelerator.num_processes)
        check_sharding(self.recipe, self.parts.choices, accelerator)
        self.threads = set_cpu_threads(args.cpu_threads, accelerator.num_processes)
        sources = {"train": self.train_source, "eval": self.eval_source}
        self.facts = run_facts(self.parts, sources, accelerator, self.length)
        self.teachers = {
            name: Teacher(name, cfg, self.parts.teachers[name], self.parts.tapped_teachers[name], self.device, args)
            for name, cfg in self.recipe.all_teachers().items()
            if name in self.parts.teachers
        }
        self._check_stores()
        info, length = self.parts.student.info, self.length
        self.trained = Trainable(
            self.parts.module, info, self.recipe, accelerator, length.total_steps, length.steps_per_epoch
        )
        self.evaluator = self._evaluator(self.eval_source)

    def _check_stores(self) -> None:
        """Refuse stored teachers that were shown other images than this run shows, or fewer epochs."""
        epochs = -(-self.length.total_steps // self.length.steps_per_epoch)
        for teacher in self.parts.stored.values():
            views = self.parts.views(stored=True)
            teacher.check(self.recipe, self.train_source, views, self.length.global_batch, epochs)

    def _evaluator(self, source: Any) -> Any:
        students, view = self.trained.students(), self.parts.student.info.preprocessing
        return self.task.evaluator(students, view, self.teachers, source, self.accelerator)

    # ------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to the end, or until a signal or a callback asks to stop; then export the student.

        When the run has ended, now or before, the network holds the weights that were exported.

        Args:
            resume_from_checkpoint: as the recipe's field of that name, which it overrides.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with self.run.locked():
            start = agreed(lambda: self._begin(resume))
            check_agreement(self.accelerator, self.run.sight_of(start), self.run.path)
            self.journal.say(*start.notes)
            if start.ending is not None:
                return self._take_over(start)
            self._set_out(start)
            try:
                stopped_by = self._run(start)
            except UserError:
                if self.state.global_step == 0 and self.accelerator.is_main_process:
                    self.run.clear()  # nothing was learned
                raise
            finally:
                self.journal.progress.close()
            return self._stopped(stopped_by) if stopped_by else self._finish()

    def _begin(self, resume: str | bool | None) -> Start:
        """On the main process: where the run begins; make the repository, and fetch the checkpoint that lies there."""
        if resume is False:
            self.publication.prepare()  # before anything is removed
            return self.run.begin(False)
        if not isinstance(resume, str):
            self.publication.fetch()
        start = self.run.begin(resume)
        if start.ending is None:
            self.publication.prepare()
        return start

    def _run(self, start: Start) -> int:
        """Train to the end; the number of the signal that stopped it before, or 0."""
        with StopSignal() as stop:
            self._open_run()
            try:
                if self.state.global_step == 0:
                    self._gate()
                self.callbacks.call("on_train_begin", self.state, self.control)
                with nondeterminism_named():
                    return self._loop(stop)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"out of memory on {self.device}: lower train.per_device_train_batch_size and raise "
                    "train.gradient_accumulation_steps by the same factor, or set train.activation_checkpointing"
                ) from None

    def _loop(self, stop: StopSignal) -> int:
        feed, vote = self.feed(), Vote(self.accelerator)
        if feed.note:
            self.journal.say(feed.note)
            self.journal.write({"step": self.state.global_step, "images": feed.note})
        stopped_by = 0
        total = self.length.total_steps
        while self.state.global_step < total and not (self.control.should_training_stop or stopped_by):
            if self.state.global_step % self.length.steps_per_epoch == 0:
                self.callbacks.call("on_epoch_begin", self.state, self.control)
            self.callbacks.call("on_step_begin", self.state, self.control)
            self.step(feed)
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.length.steps_per_epoch
            self.journal.progress.advance()
            self.callbacks.call("on_step_end", self.state, self.control)
            stopped_by = vote(stop.number)
            self._after_step(stopping=bool(stopped_by))
        vote.close()
        if self.state.global_step == total:
            return 0
        if not stopped_by:
            self._close_early()
        return stopped_by

    def _close_early(self) -> None:
        """A callback ended the run: it closes as at its last step."""
        self._log_losses()
        if self._evaluated_at != self.state.global_step:
            self.evaluate()
        if self._saved_at != self.state.global_step and (self.args.save_strategy != "no" or self.control.should_save):
            self.save_checkpoint()

    def _after_step(self, stopping: bool) -> None:
        """Log, evaluate and save as the recipe says, or because the run was asked to stop."""
        step, args, control = self.state.global_step, self.args, self.control
        last = step == self.length.total_steps
        if step % args.logging_steps == 0 or last or stopping or control.should_log:
            self._log_losses()
        epoch_end, closing = step % self.length.steps_per_epoch == 0, last and args.save_strategy != "no"
        if args.is_due("eval", step, epoch_end) or control.should_evaluate or last:
            with self.journal.progress.paused():
                self.evaluate()
        if args.is_due("save", step, epoch_end) or control.should_save or stopping or closing:
            with self.journal.progress.paused():
                self.save_checkpoint()
        control.should_log = control.should_evaluate = control.should_save = False
        if epoch_end:
            self.callbacks.call("on_epoch_end", self.state, control)

    def feed(self) -> Feed:
        """The lessons that are left of the run."""

        def active(step: int) -> tuple[str, ...]:
            return tuple(name for name, weight in self.weights(step).items() if weight != 0)

        start, total = self.state.global_step, self.length.total_steps
        return open_feed(self.parts, self.train_source, self.teachers, active, self.accelerator, start, total)

    def step(self, feed: Feed) -> None:
        """One optimiser step over the micro-batches of a global batch."""
        step, module = self.state.global_step, self.trained.wrapped
        self.learning_rate = self.trained.schedule.set(step)
        weights = self.weights(step)
        module.train()
        for micro in range(self.args.gradient_accumulation_steps):
            lesson = next(feed)
            self._note_corrupt(lesson.corrupt)
            seed_networks(self.args.seed, step, micro, self.accelerator.process_index)
            with self.accelerator.accumulate(module):
                given = (lesson.teachers, lesson.target, lesson.draws, lesson.active, lesson.strong)
                losses = module(lesson.pixels, *given)
                total = torch.stack([weights[name.partition("/")[0]] * value for name, value in losses.items()]).sum()
                self.window.add({"loss": total, **losses}, step + 1)
                self.accelerator.backward(total)
                if self.args.max_grad_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(module.parameters(), self.args.max_grad_norm)
                self._optimize()
        self.trained.average(step + 1)

    def _optimize(self) -> None:
        """Step the optimiser at the last micro batch, between the callbacks that look at gradients."""
        if not self.accelerator.sync_gradients:
            self.callbacks.call("on_substep_end", self.state, self.control)
            return
        self.callbacks.call("on_pre_optimizer_step", self.state, self.control)
        self.trained.optimizer.step()
        self.skipped_steps += (
            self.accelerator.optimizer_step_was_skipped
        )  # float16 overflowed; the scaler lowers its scale
        self.callbacks.call("on_optimizer_step", self.state, self.control)
        self.trained.optimizer.zero_grad()

    def weights(self, step: int) -> dict[str, float]:
        """Factor of every method at a step counted from 0."""
        return weights_at(self.parts.choices, step, self.length.total_steps, self.length.steps_per_epoch)

    def _note_corrupt(self, rows: Iterable[int]) -> None:
        new = set(rows) - self.corrupt
        self.corrupt |= new
        if len(self.corrupt) > self.recipe.data.max_corrupt:
            raise LocalError(
                f"more than data.max_corrupt = {self.recipe.data.max_corrupt} unreadable training images, "
                f"the last in row {max(new)} of {self.train_source.describe()}; mend the data or raise the limit"
            )

    # ---------------------------------------------------------------------------------- gate, evaluation

    def _gate(self) -> None:
        """Measure the teachers before the first step; refuse one that is below its gate."""

        def tell(text: str, numbers: Mapping[str, Any]) -> None:
            self.journal.say(text)
            self.journal.write(dict(numbers))

        names, views = self.train_source.class_names, self.parts.views()
        pass_gate(self.teachers, views, names, self.eval_source, self.accelerator, self.task, tell)

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the student (its average too, when there is one) and the teachers on held-out images.

        Args:
            eval_dataset: other images than those the trainer was given.
            metric_key_prefix: begins the names.

        Returns:
            ``eval_top1``, ``eval_top5``, ``eval_agreement`` … in percent, of the weights that will be exported.
        """
        self.trained.share_buffers()
        evaluator, found = self.evaluator, self.task.predictions() if self.compute_metrics else None
        if eval_dataset is not None:
            evaluator = self._evaluator(self._images(eval_dataset))
        metrics = self._measured(evaluator, found, metric_key_prefix)
        self.log({**metrics, "train_seconds": round(self._seconds(), 2)})
        self.journal.say(f"step {self.state.global_step}: {shown_metrics(metrics)}")
        self.callbacks.call("on_evaluate", self.state, self.control, metrics=metrics)
        if eval_dataset is None:
            self._evaluated_at = self.state.global_step
            self._note_best(metrics)  # after the callbacks, which compare with the best so far
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """The student's logits ``[N, K]`` and the labels ``[N]`` of a data set, in its order, and the metrics."""
        self.trained.share_buffers()
        found = self.task.predictions()
        evaluator = self._evaluator(self._images(test_dataset))
        metrics = self._measured(evaluator, found, metric_key_prefix)
        self.callbacks.call("on_predict", self.state, self.control, metrics=metrics)
        return PredictionOutput(*found.gather(self.accelerator), metrics)

    def _images(self, dataset: Any) -> Any:
        return self.task.open_images("eval", dataset, self.train_source.class_names)

    def _measured(self, evaluator: Any, found: Predictions | None, prefix: str) -> dict[str, float]:
        """An evaluator's metrics and the user's own, under names with a prefix."""
        values = dict(evaluator(found))
        if self.compute_metrics and found:
            values |= self.compute_metrics(found.gather(self.accelerator))
        return {key if key.startswith(f"{prefix}_") else f"{prefix}_{key}": value for key, value in values.items()}

    def _seconds(self) -> float:
        """Time spent training, over all parts of an interrupted run."""
        return self._seconds_before + time.perf_counter() - self._clock

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        name = self._best_by
        if name not in metrics:
            if self.args.load_best_model_at_end:
                raise UserError(f"train.metric_for_best_model: no '{name}' among {', '.join(metrics)}")
            return
        if self.state.note_best(metrics[name], self._greater_is_better):
            self.control.should_save |= self.args.load_best_model_at_end

    def _log_losses(self) -> None:
        """Write the mean losses since the last log."""
        step = self.state.global_step
        means, first_bad = self.window.fetch(self.accelerator)
        if first_bad is not None:
            self._stop_on_non_finite(*first_bad)
        if not means:
            return
        rate = self.journal.progress.rate(step)
        values = {**means, "lr": self.learning_rate, "images_per_second": rate}
        values |= {f"weight/{name}": weight for name, weight in self.weights(step - 1).items()}
        if self.skipped_steps:
            values["skipped_steps"] = self.skipped_steps
        if self.corrupt:
            values["corrupt_images"] = len(self.corrupt)
        self.log(values)
        self.journal.progress.show(values, step, self.length.total_steps)

    def _stop_on_non_finite(self, part: str, step: int) -> None:
        kept = ckpt.list_checkpoints(self.run.checkpoints)
        self.journal.write({"step": step, "error": f"{part} is not finite"})
        raise UserError(
            f"the loss part '{part}' became NaN or infinite at step {step}; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet")
            + ". Lower train.learning_rate or that method's weight, or set train.max_grad_norm"
        )

    def log(self, logs: dict[str, float]) -> None:
        """Write values of the current step to ``log.jsonl``, the trackers and the callbacks."""
        entry = {"step": self.state.global_step, "epoch": round(self.state.epoch, 4), **logs}
        self.state.log_history.append(entry)
        self.journal.write(entry)
        self.journal.track(logs, self.state.global_step)
        self.callbacks.call("on_log", self.state, self.control, logs=logs)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, class or instance."""
        self.callbacks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback by instance or by class."""
        self.callbacks.remove(callback)

    # --------------------------------------------------------------------------------- run folder, resume

    def _set_out(self, start: Start) -> None:
        """Stand where the run begins: with the initial weights, or those of a checkpoint."""
        if self._has_begun:
            self._set_back()
            self.trained.reset()
            self.evaluator = self._evaluator(self.eval_source)
            self.callbacks.restore(self._callbacks_before)
        self._has_begun, self._callbacks_before = True, copy.deepcopy(self.callbacks.stateful())
        if start.checkpoint is not None and start.state is not None:
            self._load_checkpoint(start.checkpoint, start.state)
            self.journal.say(f"continuing from {start.checkpoint}")

    def _load_checkpoint(self, folder: Path, state: CheckpointState) -> None:
        self.trained.load(folder)
        self.state.global_step = self._saved_at = state.step
        self.state.epoch = self.state.global_step / self.length.steps_per_epoch
        self.state.best_metric, self.state.best_global_step = state.best_metric, state.best_step
        self.control.should_training_stop = state.ended
        self.corrupt = set(state.corrupt)
        self._seconds_before = state.seconds
        self.callbacks.restore(state.callbacks)
        if self.args.cpu_threads == "auto":  # another number of threads adds floats in another order
            self.threads = set_cpu_threads(state.cpu_threads, self.accelerator.num_processes)
        if state.processes != self.accelerator.num_processes:
            self.journal.say(
                f"the run was begun on {state.processes} process(es) and goes on on {self.accelerator.num_processes}: "
                "sums are rounded in another order, and BatchNorm sees other groups of images"
            )

    def save_checkpoint(self) -> None:
        """Write ``checkpoints/checkpoint-<step>`` whole or not at all; refuses to save after a non-finite loss."""
        first_bad = self.window.first_bad(self.accelerator)
        if first_bad is not None:
            self._stop_on_non_finite(*first_bad)
        self.trained.share_buffers()
        tensors, objects = self.trained.tensors(), self.trained.objects()
        if self.accelerator.is_main_process:
            self.journal.sync()
            self.run.save_checkpoint(self._checkpoint_state(), tensors, objects)
            self.publication.after_save(self.trained.exported(tensors=tensors), self.state.global_step)
        self._saved_at = self.state.global_step
        self.accelerator.wait_for_everyone()
        self.callbacks.call("on_save", self.state, self.control)

    def _checkpoint_state(self) -> CheckpointState:
        return CheckpointState(
            self.state.global_step,
            self.run.identity,
            processes=self.accelerator.num_processes,
            cpu_threads=self.threads,
            best_metric=self.state.best_metric,
            best_step=self.state.best_global_step,
            corrupt=tuple(sorted(self.corrupt)),
            seconds=self._seconds(),
            callbacks=self.callbacks.stateful(),
            ended=self.control.should_training_stop,
        )

    def _open_run(self) -> None:
        """Write the resolved recipe, open the log, the trackers and the progress bar; say what will happen."""
        start = self.state.global_step
        if self.accelerator.is_main_process:
            self.run.write_recipe()
        self.state.log_history = self.journal.open(self.run.path, start, self.recipe.model_dump(mode="json"))
        measured = any(line["step"] == start and "train_seconds" in line for line in self.state.log_history)
        self._evaluated_at = start if measured else -1
        where = f"{self.accelerator.num_processes} process(es) on {self.device}"
        self.journal.say(*announce(self.parts, self.facts["data"], self.facts["data_notes"], f"{self.length}; {where}"))
        self.journal.write({"step": start, **self.facts})
        self._clock = time.perf_counter()
        self.journal.show_progress(self.length.total_steps, start, self.length.global_batch)

    def _stopped(self, number: int) -> TrainOutput:
        """Tell the person watching that a signal has ended the run before its end."""
        done = f"step {self.state.global_step} of {self.length.total_steps}"
        name = name_of(number)
        self.journal.say(f"stopped by {name} after {done}, which is saved; the same command continues")
        self.publication.leave()
        self.journal.close()
        return TrainOutput.of(self.state, name)

    def _finish(self) -> TrainOutput:
        """Export the student, describe it, close the log and the trackers; push it last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        weights = self.trained.exported(None if best is None else agreed(lambda: self.run.whole_checkpoint(best)))
        if self.accelerator.is_main_process:
            self.publication.export(weights)
            self.run.end(self.state.global_step, described=False)
        self.trained.settle(None if best is None else weights)
        self.evaluator = self._evaluator(self.eval_source)
        if self.corrupt:
            self.journal.say(f"{len(self.corrupt)} unreadable training images were replaced by their neighbours")
        self.accelerator.wait_for_everyone()
        self._describe()  # the others have nothing left to do, and do not wait
        self.callbacks.call("on_train_end", self.state, self.control)
        self.journal.close()
        if self.accelerator.is_main_process and self.recipe.hub.push_to_hub:
            self.callbacks.call("on_push_begin", self.state, self.control)
            self.publication.push()
        return TrainOutput.of(self.state)

    def _take_over(self, start: Start) -> TrainOutput:
        """A run that has ended: load what it exported, and do what is missing of the rest."""
        assert start.ending is not None
        self.trained.settle(self.publication.exported())
        self.evaluator = self._evaluator(self.eval_source)
        self.state.global_step, self.state.log_history = start.step, read_log(self.run.path)
        self.state.epoch = self.state.global_step / self.length.steps_per_epoch
        self._has_begun, self._callbacks_before = True, copy.deepcopy(self.callbacks.stateful())
        if start.whole:
            self.journal.say(f"{self.run.path} holds the finished run of this recipe; nothing to train")
        else:
            self.journal.say(f"{self.run.path} holds the student of this recipe; what is missing beside it is made now")
            self._describe()
        if self.accelerator.is_main_process:
            self.publication.catch_up()
        return TrainOutput.of(self.state)

    def _describe(self) -> None:
        """On the main process: write report and card, and note that the run is whole."""
        if self.accelerator.is_main_process:
            sharded = any(teacher.cfg.shard for teacher in self.teachers.values())
            teachers = None if sharded else self.parts.teachers
            described = self.publication.close(teachers, self.eval_source, self.device)
            self.run.end(self.state.global_step, described)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the student as a model that timm and transformers load (``student/`` of the run folder).

        All ranks call this together; the main one writes.
        """
        self.trained.share_buffers()
        weights = self.trained.exported()
        if self.accelerator.is_main_process:
            self.publication.export(weights, Path(output_dir) if output_dir else None)
            if output_dir is None:
                self.run.note_export()

    def create_model_card(self, license: str | None = None, tags: Iterable[str] = ()) -> None:
        """Write the model card of the exported student, ``student/README.md``; on the main process.

        Args:
            license: instead of the recipe's `hub.license`.
            tags: further ones.
        """
        if self.accelerator.is_main_process:
            self.publication.describe(license=license, tags=tuple(tags))

    def push_to_hub(
        self, commit_message: str = "End of training", *, revision: str | None = None, private: bool | None = None
    ) -> str | None:
        """Push the exported student to ``hub.hub_model_id``; gives its address, on the main process.

        Args:
            commit_message: of the one commit.
            revision: branch, instead of the recipe's.
            private: for a repository that does not exist yet.

        Raises:
            UserError: no token, no network, somebody else's repository; what lies on the disk is whole.
        """
        if not self.accelerator.is_main_process:
            return None
        return self.publication.push_again(commit_message, hub_revision=revision, hub_private_repo=private)
