"""DistillTrainer: the loop around one module, its teachers and a stream of batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from kd_hf import checkpoint as ckpt
from kd_hf.artefact import save_student
from kd_hf.assemble import Assembly, assemble
from kd_hf.callbacks import CallbackList, JsonLines, Progress, TrainerControl, TrainerState, TrainOutput, read_log
from kd_hf.config import Recipe
from kd_hf.data.batch import Batch
from kd_hf.data.draws import Draws
from kd_hf.data.loader import train_loader
from kd_hf.data.mix import check_mixing
from kd_hf.data.source import Source, open_source
from kd_hf.data.views import DeviceStage
from kd_hf.distill import weights_at
from kd_hf.errors import LocalError, UserError
from kd_hf.evaluation import Evaluator, measure_teachers
from kd_hf.optim import LrSchedule, build_average, build_optimizer
from kd_hf.plan import announce
from kd_hf.recipe import RESOLVED, dump_recipe, flat
from kd_hf.run import RunFolder
from kd_hf.runtime import StopSignal, build_accelerator, device_name, seed_networks, set_cpu_threads, versions
from kd_hf.sharding import check_sharding, load_whole, load_whole_optimizer, prepare, whole
from kd_hf.teacher import Teacher, check_label_order
from kd_hf.window import LossWindow


class DistillTrainer:
    """Distils a student as a recipe says.

    Args:
        recipe: the run; see :func:`kd_hf.recipe.load_recipe`.
        callbacks: objects or classes with transformers' callback methods.
        train_source: instead of the recipe's training images.
        eval_source: instead of the recipe's evaluation images.

    Example:
        >>> trainer = DistillTrainer(load_recipe("recipes/quickstart.yaml"))
        >>> trainer.train().metrics["eval_top1"]
    """

    def __init__(
        self,
        recipe: Recipe,
        callbacks: Iterable[Any] = (),
        train_source: Source | None = None,
        eval_source: Source | None = None,
    ) -> None:
        self.recipe = recipe
        self.args = recipe.train
        self.train_source = train_source or open_source(recipe.data, "train", self.args.seed)
        self.eval_source = eval_source or open_source(recipe.data, "eval", self.args.seed)
        self.parts: Assembly = assemble(recipe, self.train_source.num_classes)
        self.parts.check_data(self.train_source.num_classes, self.train_source.describe())
        pauses = any(choice.may_pause for choice in self.parts.choices) or "task" not in self.parts.module.choices
        self.accelerator: Accelerator = build_accelerator(self.args, unused_parameters=pauses)
        self.device = self.accelerator.device
        self._plan_length()
        self.run = RunFolder(recipe, self.global_batch)
        self._build()
        self.state = TrainerState(
            max_steps=self.total_steps,
            num_train_epochs=self.total_steps / self.steps_per_epoch,
            is_world_process_zero=self.accelerator.is_main_process,
            is_local_process_zero=self.accelerator.is_local_main_process,
        )
        self.control = TrainerControl()
        self.callbacks = CallbackList(self.args, callbacks)
        self.corrupt: set[int] = set()
        self.progress = Progress(0, 0, 0, enabled=False)  # until the run is opened
        self.log_file: JsonLines | None = None
        self._seconds_before, self._clock = 0.0, time.perf_counter()
        self._evaluated_at = -1

    # ------------------------------------------------------------------------------------------ building

    def _plan_length(self) -> None:
        args = self.args
        self.global_batch = (
            args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        )
        rows = len(self.train_source)
        self.steps_per_epoch = rows // self.global_batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.per_device_train_batch_size: the global batch of {self.global_batch} images is larger than the "
                f"{rows} training images"
            )
        check_mixing(self.recipe.data.augment, args.per_device_train_batch_size)
        self.total_steps = args.max_steps or max(1, round(args.num_train_epochs * self.steps_per_epoch))

    def _build(self) -> None:
        """Place everything on the device and hand the one module to accelerate."""
        args, module, info = self.args, self.parts.module, self.parts.student.info
        check_sharding(self.recipe, self.parts.choices, self.accelerator)
        self.threads = set_cpu_threads(args.cpu_threads, self.accelerator.num_processes)
        precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.teachers = {
            name: Teacher(
                name, cfg, self.parts.teachers[name], self.parts.tapped_teachers[name], self.device, precision
            )
            for name, cfg in self.recipe.all_teachers().items()
        }
        if args.channels_last:
            module.to(memory_format=torch.channels_last)
            for teacher in self.teachers.values():
                teacher.model.to(memory_format=torch.channels_last)
        if args.sync_batchnorm and self.accelerator.num_processes > 1:
            module.student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module.student)
        module.to(self.device)
        self.ema = build_average(module.student, args.ema) if args.ema else None
        self.plain_module = module
        self.module, self.optimizer = prepare(self.accelerator, module, build_optimizer(module, args), info, self.ema)
        self.schedule = LrSchedule(self.optimizer.optimizer, args, self.total_steps, self.steps_per_epoch)
        self.stage = DeviceStage(self.parts.views(), info.num_classes)
        self.evaluator = Evaluator(
            self._students(), info.preprocessing, self.teachers, self.eval_source, self.accelerator, self.recipe
        )
        self.window = LossWindow()

    def _students(self) -> dict[str, torch.nn.Module]:
        """What evaluation measures: ``student`` holds the weights that are exported."""
        raw = self.plain_module.student
        if self.ema is None or self.args.ema is None:
            return {"student": raw}
        if self.args.ema.export:
            return {"student": self.ema.module, "raw": raw}
        return {"student": raw, "ema": self.ema.module}

    # ------------------------------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train to the end, or until a signal or a callback asks to stop; then export the student.

        Args:
            resume_from_checkpoint: as the recipe's field of that name, which it overrides.
        """
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        finished = wanted is None and self.run.is_finished
        self._agree(int(finished))
        if finished:
            self.state.log_history = read_log(self.run.path)
            self.say(f"{self.run.path} holds the finished run of this recipe; nothing to train")
            return TrainOutput.of(self.state)
        self._resume(wanted)
        with StopSignal() as stop:
            self._open_run()
            try:
                if self.state.global_step == 0:
                    self._gate()
                self.callbacks.call("on_train_begin", self.state, self.control)
                self._loop(stop)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"out of memory on {self.device}: lower train.per_device_train_batch_size and raise "
                    "train.gradient_accumulation_steps by the same factor, or set train.activation_checkpointing"
                ) from None
            finally:
                self.progress.close()
        if stop.requested and self.state.global_step < self.total_steps:
            self.say(
                f"stopped by {stop.name} after step {self.state.global_step} of {self.total_steps}, which is saved; "
                "the same command continues"
            )
            return TrainOutput.of(self.state, stop.name)
        return self._finish()

    def _loop(self, stop: StopSignal) -> None:
        batches = self._batches()
        while self.state.global_step < self.total_steps and not self.control.should_training_stop:
            self.callbacks.call("on_step_begin", self.state, self.control)
            self._step(batches)
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.steps_per_epoch
            self.progress.advance()
            self.callbacks.call("on_step_end", self.state, self.control)
            if self._after_step(stop):
                return
        if self.state.global_step < self.total_steps:  # a callback ended the run: it closes as at its last step
            self._log_losses(False)
            if self._evaluated_at != self.state.global_step:
                self.evaluate()
            if self.args.save_strategy != "no":
                self.save_checkpoint()

    def _after_step(self, stop: StopSignal) -> bool:
        """Log, evaluate and save as the recipe says; True when the run was asked to stop."""
        step, args, control = self.state.global_step, self.args, self.control
        last = step == self.total_steps
        stopping = stop.requested and self.accelerator.num_processes == 1
        if step % args.logging_steps == 0 or last or stopping or control.should_log:
            # ranks agree on stopping where they meet anyway, so a signal needs no communication of its own
            stopping = self._log_losses(stop.requested)
        epoch_end, closing = step % self.steps_per_epoch == 0, last and args.save_strategy != "no"
        if _is_due(args.eval_strategy, args.eval_steps, step, epoch_end) or control.should_evaluate or last:
            with self.progress.paused():
                self.evaluate()
        if _is_due(args.save_strategy, args.save_steps, step, epoch_end) or control.should_save or stopping or closing:
            with self.progress.paused():
                self.save_checkpoint()
        control.should_log = control.should_evaluate = control.should_save = False
        if epoch_end:
            self.callbacks.call("on_epoch_end", self.state, control)
        return stopping and not last

    def _batches(self) -> Iterator[Batch]:
        args = self.args
        return iter(
            train_loader(
                self.train_source,
                self.recipe.data,
                self.parts.views(),
                per_device=args.per_device_train_batch_size,
                world=self.accelerator.num_processes,
                rank=self.accelerator.process_index,
                accumulation=args.gradient_accumulation_steps,
                seed=args.seed,
                start_step=self.state.global_step,
                total_steps=self.total_steps,
                workers=args.dataloader_num_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                pin_memory=self.device.type == "cuda",
            )
        )

    def _step(self, batches: Iterator[Batch]) -> None:
        """One optimiser step over the micro-batches of a global batch."""
        step = self.state.global_step
        self.learning_rate = self.schedule.set(step)
        weights = self.weights(step)
        self.module.train()
        for micro in range(self.args.gradient_accumulation_steps):
            seed_networks(self.args.seed, step, micro, self.accelerator.process_index)
            batch = next(batches)
            self._note_corrupt(batch)
            with self.accelerator.accumulate(self.module):
                losses = self._losses(batch, weights)
                total = torch.stack([weights[name.partition("/")[0]] * value for name, value in losses.items()]).sum()
                self.window.add({"loss": total, **losses}, step + 1)
                self.accelerator.backward(total)
                if self.args.max_grad_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.plain_module.student, step=step + 1)

    def _losses(self, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
        batch = batch.to(self.device, non_blocking=True)
        views, target = self.stage(batch)
        active = tuple(name for name, weight in weights.items() if weight != 0)
        read = {self.plain_module.choices[name].teacher for name in active}  # one that is not read now does not run
        taught = {name: teacher(views[name]) for name, teacher in self.teachers.items() if name in read}
        draws = self.plain_module.draw(Draws(batch.key), active)
        return self.module(views["student"], taught, target, draws, active)

    def weights(self, step: int) -> dict[str, float]:
        """Factor of every method at a step counted from 0."""
        return weights_at(self.parts.choices, step, self.total_steps, self.steps_per_epoch)

    def _note_corrupt(self, batch: Batch) -> None:
        new = set(batch.corrupt) - self.corrupt
        self.corrupt |= new
        if len(self.corrupt) > self.recipe.data.max_corrupt:
            raise LocalError(
                f"more than data.max_corrupt = {self.recipe.data.max_corrupt} unreadable training images, "
                f"the last in row {max(new)} of {self.train_source.describe()}; mend the data or raise the limit"
            )

    # ---------------------------------------------------------------------------------- gate, evaluation

    def _gate(self) -> None:
        """Measure the teachers before the first step; refuse one that is below its gate."""
        gated = {name: t for name, t in self.teachers.items() if t.cfg.gate.enabled}
        for name, teacher in gated.items():
            check_label_order(name, teacher.handle, self.train_source.class_names)
        for result in measure_teachers(gated, self.parts.views(), self.eval_source, self.accelerator, self.args):
            self.say(result.describe())
            warning = result.warning()
            if warning:
                self.say(f"warning: {warning}")
            teacher = gated[result.teacher]
            self._write({"step": 0, "gate": result.teacher, "top1": result.own, "top1_as_fed": result.fed})
            result.check(teacher.cfg.gate, teacher.info.num_classes)

    def evaluate(self, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the student (its average too, when there is one) and the teachers on the evaluation images.

        Returns:
            ``eval_top1``, ``eval_top5``, ``eval_agreement`` … in percent, of the weights that will be exported.
        """
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator().items()}
        self._evaluated_at = self.state.global_step
        self.log({**metrics, "train_seconds": round(self._seconds(), 2)})
        shown = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items() if not key.endswith("samples"))
        self.say(f"step {self.state.global_step}: {shown}")
        self.callbacks.call("on_evaluate", self.state, self.control, metrics=metrics)
        self._note_best(metrics)  # after the callbacks, which compare with the best so far
        return metrics

    def _seconds(self) -> float:
        """Time spent training, over all parts of an interrupted run."""
        return self._seconds_before + time.perf_counter() - self._clock

    def _note_best(self, metrics: Mapping[str, float]) -> None:
        name = self.args.metric_for_best_model
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in metrics:
            if self.args.load_best_model_at_end:
                raise UserError(f"train.metric_for_best_model: no '{name}' among {', '.join(metrics)}")
            return
        value, best = metrics[name], self.state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            self.control.should_save |= self.args.load_best_model_at_end

    def _log_losses(self, stop_requested: bool) -> bool:
        """Write the mean losses since the last log; returns whether any rank was asked to stop."""
        step = self.state.global_step
        means, first_bad, stopping = self.window.fetch(self.accelerator, stop_requested)
        if first_bad is not None:
            self._stop_on_non_finite(*first_bad)
        if not means:
            return stopping
        rate = self.progress.rate(step)
        values = {**means, "lr": self.learning_rate, "images_per_second": rate}
        values |= {f"weight/{name}": weight for name, weight in self.weights(step - 1).items()}
        if self.corrupt:
            values["corrupt_images"] = len(self.corrupt)
        self.last_loss = means["loss"]
        self.log(values)
        self.progress.show(values, step, self.total_steps)
        return stopping

    def _stop_on_non_finite(self, part: str, step: int) -> None:
        kept = ckpt.list_checkpoints(self.run.checkpoints)
        self._write({"step": step, "error": f"{part} is not finite"})
        raise UserError(
            f"the loss part '{part}' became NaN or infinite at step {step}; "
            + (f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet")
            + ". Lower train.learning_rate or that method's weight, or set train.max_grad_norm"
        )

    def log(self, logs: dict[str, float]) -> None:
        """Write values of the current step to ``log.jsonl``, the trackers and the callbacks."""
        entry = {"step": self.state.global_step, "epoch": round(self.state.epoch, 4), **logs}
        self.state.log_history.append(entry)
        self._write(entry)
        if self.args.report_to:
            self.accelerator.log(logs, step=self.state.global_step)
        self.callbacks.call("on_log", self.state, self.control, logs=logs)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.log_file is not None:
            self.log_file.write(entry)

    def say(self, text: str) -> None:
        """A line for the person watching, on the main process."""
        if self.accelerator.is_main_process:
            self.progress.say(text)

    # --------------------------------------------------------------------------------- run folder, resume

    def _resume(self, wanted: str | bool | None) -> None:
        """Continue what the run folder holds, unless told otherwise."""
        if wanted is False and self.accelerator.is_main_process:
            self.run.clear()
        self.accelerator.wait_for_everyone()
        found = self.run.find_checkpoint(wanted)
        self._agree(found[1]["step"] if found else -1)
        if found is not None:
            self._load_checkpoint(*found)
            self.say(f"continuing from {found[0]}")

    def _agree(self, seen: int) -> None:
        """Raise :class:`UserError` unless all processes see the same in the run folder."""
        everyone = self.accelerator.gather(torch.tensor([seen], device=self.device))
        if len(set(everyone.tolist())) > 1:
            raise UserError(
                f"train.output_dir: the processes do not see the same checkpoints in {self.run.path}; "
                "give a folder that all machines share"
            )

    def _load_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> None:
        load_whole(self.plain_module, ckpt.load_tensors(folder, "module"))
        if self.ema is not None:
            load_whole(self.ema.module, ckpt.load_tensors(folder, "ema"))
        load_whole_optimizer(self.optimizer, ckpt.load_objects(folder, "optimizer"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(ckpt.load_objects(folder, "scaler"))
        self.state.global_step = state["step"]
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        self.state.best_metric, self.state.best_global_step = state["best_metric"], state["best_step"]
        self.corrupt = set(state["corrupt"])
        self._seconds_before = state["seconds"]
        if self.args.cpu_threads == "auto":  # another number of threads adds floats in another order
            self.threads = set_cpu_threads(state["cpu_threads"], self.accelerator.num_processes)

    def save_checkpoint(self) -> None:
        """Write ``checkpoints/checkpoint-<step>`` whole or not at all; refuses to save after a non-finite loss."""
        first_bad = self.window.first_bad(self.accelerator)
        if first_bad is not None:
            self._stop_on_non_finite(*first_bad)
        main = self.accelerator.is_main_process
        tensors, objects = self._tensors(), {"optimizer": whole(self.optimizer.state_dict(), main)}
        if self.accelerator.scaler is not None:
            objects["scaler"] = self.accelerator.scaler.state_dict()
        if main:
            self.run.save_checkpoint(self._checkpoint_state(), tensors, objects)
        self.accelerator.wait_for_everyone()
        self.callbacks.call("on_save", self.state, self.control)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of a checkpoint by file: all that is trained, and the student's average; a call of all ranks."""
        average = {"ema": self.ema.module.state_dict()} if self.ema is not None else {}
        return whole({"module": self.plain_module.state_dict(), **average}, self.accelerator.is_main_process)

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "processes": self.accelerator.num_processes,
            "cpu_threads": self.threads,
            "best_metric": self.state.best_metric,
            "best_step": self.state.best_global_step,
            "corrupt": sorted(self.corrupt),
            "seconds": self._seconds(),
        }

    def _open_run(self) -> None:
        """Write the resolved recipe, open the log, the trackers and the progress bar; say what will happen."""
        main, start = self.accelerator.is_main_process, self.state.global_step
        if main:
            self.run.write_recipe()
            self.log_file = JsonLines(self.run.path, keep_until=start)
            self.state.log_history = read_log(self.run.path)
        if self.args.report_to:
            self.accelerator.init_trackers("kd_hf", config=flat(self.recipe.model_dump(mode="json")))
        where = f"{self.accelerator.num_processes} process(es) on {self.device}"
        steps = f"{self.total_steps} of {self.global_batch} images, {self.steps_per_epoch} an epoch; {where}"
        for line in announce(self.parts, self.train_source.describe(), steps):
            self.say(line)
        self._write({"step": start, **self._started()})
        self._clock = time.perf_counter()
        self.progress = Progress(self.total_steps, start, self.global_batch, main and not self.args.disable_tqdm)

    def _started(self) -> dict[str, Any]:
        """What a reader of the log should know about the run before its numbers."""
        models = {"student": self.parts.student, **self.parts.teachers}
        return {
            "models": {name: handle.note() for name, handle in models.items()},
            "data": {"train": self.train_source.describe(), "eval": self.eval_source.describe()},
            "processes": self.accelerator.num_processes,
            "device": device_name(self.device),
            "global_batch": self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
            "versions": versions(),
        }

    def _finish(self) -> TrainOutput:
        """Export the student, close the log and the trackers."""
        self.save_model()
        self.accelerator.wait_for_everyone()
        self.callbacks.call("on_train_end", self.state, self.control)
        if self.args.report_to:
            self.accelerator.end_training()
        if self.corrupt:
            self.say(f"{len(self.corrupt)} unreadable training images were replaced by their neighbours")
        return TrainOutput.of(self.state)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the student as a model that timm and transformers load (``student/`` of the run folder).

        All ranks call this together; the main one writes.
        """
        weights = self._export_weights()
        if not self.accelerator.is_main_process:
            return
        folder = Path(output_dir) if output_dir else self.run.student
        handle = self.parts.student
        names = tuple(self.train_source.class_names)
        if names and len(names) == handle.info.num_classes:
            handle = replace(handle, label_names=names)
        save_student(handle, folder, state_dict=weights, extra_files={RESOLVED: dump_recipe(self.recipe)})

    def _export_weights(self) -> dict[str, Tensor]:
        """The bare network's state dict: of the best evaluation or the last step, averaged or raw."""
        averaged = self.args.ema is not None and self.args.ema.export
        name, prefix = ("ema", "network.") if averaged else ("module", "student.network.")
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            tensors = ckpt.load_tensors(self.run.checkpoint_of(self.state.best_global_step), name)
        else:
            tensors = self._tensors()[name]
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _is_due(strategy: str, every: int | None, step: int, epoch_end: bool) -> bool:
    """Whether a strategy (`no`, `epoch`, `steps`) asks for something after a step."""
    if strategy == "epoch":
        return epoch_end
    return strategy == "steps" and every is not None and step % every == 0
