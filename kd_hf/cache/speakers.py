"""The teachers of a store, run over every position of every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd_hf.cache.files import parts_of
from kd_hf.data.batch import Batch
from kd_hf.data.loader import BatchLoader, TrainBatches
from kd_hf.data.mix import is_mixing
from kd_hf.data.opening import open_source
from kd_hf.data.order import Layout
from kd_hf.data.pixels import exif_warnings_silenced
from kd_hf.data.views import DeviceStage, ViewPlan, plan_views
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.choices import check_methods, taps_of
from kd_hf.distillation.gate import pass_gate
from kd_hf.errors import UserError
from kd_hf.metrics.measure import eval_batch_size
from kd_hf.outputs import Outputs
from kd_hf.process import build_accelerator, set_cpu_threads, versions
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.variants import teacher_recipes, with_trained_teachers, without_stores
from kd_hf.run.folder import is_trained
from kd_hf.run.length import run_length
from kd_hf.store.format import Manifest, Shard, StoredNetwork, class_type, describe_network, log_probabilities
from kd_hf.store.reader import asked_for, depends_on_batch, digest, shown_images, trained_by

_GROUP_BYTES, _SHARD_BYTES = 16 << 20, 256 << 20
_GROUP_ROWS = 1000


@dataclass(frozen=True)
class Positions(Layout):
    """Pieces of `per_device` positions wherever they are wanted, instead of a rank's parts of global batches."""

    batch: int = 1
    """Images per optimiser step, on which the order may depend."""
    starts: Sequence[tuple[int, int]] = ()
    """(epoch, first position) of every piece."""

    @property
    def global_batch(self) -> int:
        """Images per optimiser step."""
        return self.batch

    def locate(self, micro_step: int, steps_per_epoch: int) -> tuple[int, int]:
        """(epoch, first position) of a piece."""
        return self.starts[micro_step]


class Speakers:
    """The teachers that a recipe's methods read, and the images that training will show them.

    Args:
        recipe: the run; stores that it names are not read.
        processes: that will train; by default as many as run now.

    Raises:
        UserError: a method needs more than a teacher's outputs, or these depend on more than the image.
    """

    def __init__(self, recipe: Recipe, processes: int | None = None) -> None:
        _check_trained(without_stores(recipe))
        self.recipe = recipe = without_stores(with_trained_teachers(recipe))
        for name, cfg in recipe.all_teachers().items():
            _check_fixed(name, cfg.mode, cfg.shard)
        args, student = recipe.train, recipe.student.model_copy(update={"pretrained": False})  # it does not run
        self.accelerator = build_accelerator(args)
        set_cpu_threads(args.cpu_threads, self.accelerator.num_processes)
        self.source = open_source(recipe.data, "train", args.seed)
        self.parts = assemble(recipe.model_copy(update={"student": student}), self.source.num_classes)
        read = list(dict.fromkeys(choice.teacher for choice in self.parts.choices if choice.teacher))
        if not read:
            raise UserError("methods: none of them reads a teacher, so there is nothing to store")
        check_methods(self.parts.choices, dict.fromkeys(read), "python -m kd_hf.cache")
        self.taps = {name: taps_of(self.parts.choices, name) for name in read}
        self._place(read)
        self.length = run_length(args, len(self.source), processes or self.accelerator.num_processes)
        mixing = is_mixing(recipe.data.augment)
        batch = self.length.global_batch if depends_on_batch(recipe, self.source) else 2 if mixing else 1
        self.positions = len(self.source) // batch * batch
        size = min(eval_batch_size(args), self.positions)
        self.layout = Positions(size // 2 * 2 if mixing else size, batch=batch)

    def _place(self, read: Sequence[str]) -> None:
        """Put the teachers on the device, and plan the views that they see, and no others."""
        from kd_hf.distillation.teacher import Teacher

        recipe, parts, device = self.recipe, self.parts, self.accelerator.device
        self.teachers = {
            name: Teacher(name, cfg, parts.teachers[name], parts.tapped_teachers[name], device, recipe.train)
            for name, cfg in recipe.all_teachers().items()
            if name in read
        }
        self.views = parts.views()
        plan = plan_views(self.views, training=True)
        self.plan = ViewPlan(plan.models, {name: view for name, view in plan.view_of.items() if name in read})
        self.stage = DeviceStage(self.views, self.source.num_classes)

    def batches(self, starts: Sequence[tuple[int, int]], size: int | None = None) -> Iterator[Batch]:
        """The images at pieces of epochs, `size` each."""
        args, pin = self.recipe.train, self.accelerator.device.type == "cuda"
        batches = self._batches(starts, size or self.layout.per_device)
        workers, ahead = args.dataloader_num_workers, args.dataloader_prefetch_factor
        return iter(BatchLoader(batches, range(len(starts)), workers, ahead, pin))

    def _batches(self, starts: Sequence[tuple[int, int]], size: int) -> TrainBatches:
        layout = replace(self.layout, starts=starts, per_device=size)
        return TrainBatches(self.source, self.recipe.data, self.plan, layout, self.recipe.train.seed)

    def ask(self, batch: Batch) -> dict[str, Outputs]:
        """What every teacher says about a batch, as it does in training."""
        pixels, _ = self.stage(batch.to(self.accelerator.device, non_blocking=True))
        return {name: teacher(pixels[name]) for name, teacher in self.teachers.items()}

    def seconds_per_image(self) -> float:
        """An estimate from two small batches."""
        size, workers = min(self.layout.per_device, 16) // 2 * 2 or 1, self.recipe.train.dataloader_num_workers
        batches = self._batches([(0, 0)], size)
        for _ in range(2):  # the first one is slower
            began = time.perf_counter()
            with exif_warnings_silenced():
                batch = batches[0]
            loaded = time.perf_counter()
            self.rows(self.ask(batch), {})
            loading, asking = loaded - began, time.perf_counter() - loaded
        return (max(asking, loading / workers) if workers else asking + loading) / size

    def manifest(self, epochs: int | None, top_k: int, shard_rows: int, gates: Mapping[str, Any]) -> Manifest:
        """What the store of these teachers is."""
        described = {name: self._network(name, top_k, gates.get(name)) for name in self.teachers}
        data = self.recipe.data.model_dump(include={"path", "name", "revision", "train_split"})
        epochs = epochs or -(-self.length.total_steps // self.length.steps_per_epoch)
        draft = Manifest(
            versions=versions(), teachers=described, data=data, epochs=epochs, positions=self.positions,
            group_rows=1, shard_rows=1, shards=[],
        )  # fmt: skip
        groups = max(2, min(_GROUP_ROWS, shard_rows, _GROUP_BYTES // draft.row_bytes) // 2 * 2)
        rows = max(1, min(shard_rows, _SHARD_BYTES // draft.row_bytes) // groups) * groups
        sized = draft.model_copy(update={"group_rows": groups, "shard_rows": rows})
        return sized.model_copy(update={"shards": [Shard(file=p.file, rows=len(p.rows)) for p in parts_of(sized)]})

    def _network(self, name: str, top_k: int, gate: dict[str, float] | None) -> StoredNetwork:
        teacher, recipe = self.teachers[name], self.recipe
        info, origin = teacher.info, teacher.handle.origin
        shapes = self.parts.shapes[name].taps
        shown = shown_images(name, recipe, self.source, self.views, self.length.global_batch)
        return StoredNetwork(
            asked=asked_for(teacher.cfg, recipe.train),
            commit=origin.revision,
            trained_by=trained_by(teacher.cfg),
            weights=teacher.handle.weights_hash(),
            library=origin.library,
            architecture=origin.architecture,
            num_classes=info.num_classes,
            parameters=info.parameters,
            top_k=min(top_k, info.num_classes),
            taps={tap: shapes[tap] for tap in self.taps[name]},
            shown=shown,
            shown_hash=digest(shown),
            info=describe_network(info),
            gate=gate,
        )

    def measure(self, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """The teachers' accuracy by their gates; a call of all ranks."""
        found: dict[str, dict[str, float]] = {}

        def tell(text: str, numbers: Mapping[str, Any]) -> None:
            say(text)
            name = numbers["gate"]
            samples = min(self.teachers[name].cfg.gate.samples, len(held_out))
            found[name] = {key: numbers[key] for key in ("top1", "top1_as_fed")} | {"samples": samples}

        if any(teacher.cfg.gate.enabled for teacher in self.teachers.values()):
            held_out = open_source(self.recipe.data, "eval", self.recipe.train.seed)
            names = self.source.class_names
            pass_gate(self.teachers, self.views, names, held_out, self.accelerator, self.parts.task, tell)
        return found

    def rows(self, said: Mapping[str, Outputs], top_k: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Columns of what was said, ``[B, width]`` each; by default all classes."""
        found: dict[str, np.ndarray] = {}
        for name, outputs in said.items():
            number = outputs.logits.shape[1]
            values, classes = log_probabilities(outputs.logits, top_k.get(name, number))
            found[f"{name}_values"] = values.cpu().numpy()
            if classes is not None:
                found[f"{name}_classes"] = classes.cpu().numpy().astype(class_type(number))
            for tap in self.taps[name]:
                half = outputs.taps[tap].half().flatten(1)
                if not half.isfinite().all():
                    raise UserError(f"teacher '{name}': its tap '{tap}' has values that float16 cannot hold")
                found[f"{name}_{tap}"] = half.cpu().numpy()
        return found


def _check_trained(recipe: Recipe) -> None:
    """Refuse a teacher whose recipe has not been run yet."""
    for name, other in teacher_recipes(recipe).items():
        if not is_trained(with_trained_teachers(other)):
            file = recipe.all_teachers()[name].recipe
            raise UserError(f"teacher.recipe: {file} has not been trained; `python -m kd_hf.train {file}` does it")


def _check_fixed(name: str, mode: str, shard: bool) -> None:
    """Refuse a teacher whose outputs depend on more than the image, or that all processes run together."""
    if mode != "eval":
        raise UserError(
            f"teacher.mode: '{name}' is in mode {mode}, so what it says depends on the other images of a process's "
            "batch; only eval can be stored"
        )
    if shard:
        raise UserError(f"teacher.shard: '{name}' is spread over the processes, which write different files here")
