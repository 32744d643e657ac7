"""A stored teacher in the place of one that runs: does its store fit the recipe, and what do its rows say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_hf.data.fingerprint import samples_hash
from kd_hf.data.geometry import takes_jitter
from kd_hf.data.mix import is_mixing
from kd_hf.data.order import Layout
from kd_hf.data.source import Source
from kd_hf.data.views import plan_views
from kd_hf.errors import LocalError, UserError
from kd_hf.info import ModelInfo, Preprocessing, Shapes
from kd_hf.layout import STUDENT
from kd_hf.models.handle import ModelHandle, Origin
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import Recipe, TeacherConfig, TrainConfig
from kd_hf.recipe.resolved import trained_hash
from kd_hf.store.format import (
    KEY,
    KEY_MASK,
    Store,
    StoredNetwork,
    first_difference,
    matrix,
    open_store,
    read_info,
    spread,
)

_AHEAD = 3


def depends_on_batch(recipe: Recipe, source: Source) -> bool:
    """Whether the images at the positions of an epoch depend on how many of them make a step."""
    augment = recipe.data.augment
    lanes = len(source.group_sizes) > 1 and recipe.data.lanes > 1
    return augment.repeats > 1 or lanes or (is_mixing(augment) and augment.mix_group is None)


def shown_images(
    name: str, recipe: Recipe, source: Source, views: Mapping[str, Preprocessing], global_batch: int
) -> dict[str, Any]:
    """Everything that decides the pixels a teacher sees, by the recipe's keys; None where a value has no effect.

    Args:
        name: of the teacher.
        recipe: the run.
        source: its training images.
        views: of the student and of all teachers, stored or not.
        global_batch: images per optimiser step.
    """
    data, augment, crop = recipe.data, recipe.data.augment, recipe.data.augment.crop
    plan, grouped, mixing = plan_views(views, training=True), len(source.group_sizes) > 1, is_mixing(augment)
    first, own = views[plan.view_of[name]], views[name]  # noise and fill colours are those of the first
    distinct = -(-global_batch // augment.repeats)
    measured = crop.kind == "pad" or augment.erasing > 0 or (mixing and augment.cutmix > 0)
    boxed = {"scale": crop.scale, "ratio": crop.ratio}
    found = {
        "train.seed": recipe.train.seed,
        "data": f"{len(source)} images ({samples_hash(source)})",
        "data.decoder": data.decoder,
        "data.augment.crop": {"random_resized": boxed, "pad": {"padding": crop.padding}, "resize": {}}[crop.kind],
        "data.augment.crop.kind": crop.kind,
        "data.augment.hflip": augment.hflip,
        "data.augment.auto_augment": augment.auto_augment,
        "data.augment.color_jitter": augment.color_jitter if takes_jitter(augment.auto_augment) else None,
        "data.augment.erasing": augment.erasing,
        "data.augment.strong": None,  # losses that look at this view take no stored teacher
        **{f"data.augment.{key}": getattr(augment, key) if mixing else None
           for key in ("mixup", "cutmix", "mix_prob", "mix_group")},
        "data.augment.switch_prob": augment.switch_prob if mixing and augment.mixup and augment.cutmix else None,
        "data.augment.repeats": augment.repeats,
        "images per step (processes × train.per_device_train_batch_size × train.gradient_accumulation_steps)":
            global_batch if depends_on_batch(recipe, source) else None,
        "data.lanes": min(distinct, data.lanes) if grouped else None,
        "data.shuffle_block": data.shuffle_block if grouped else None,
        "row groups of the data": digest(source.group_sizes) if grouped else None,
        "student.image_size": plan.size if measured else None,
        "teacher's view": {key: getattr(own, key) for key in ("image_size", "interpolation", "mean", "std")},
        "mean and std of the first network that has this view":
            (first.mean, first.std) if augment.auto_augment or augment.erasing else None,
    }  # fmt: skip
    return dict(json.loads(json.dumps(found)))


def digest(values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def asked_for(cfg: TeacherConfig, args: TrainConfig) -> dict[str, Any]:
    """What a recipe says about a teacher that decides what it says."""
    kept = ("model", "revision", "num_classes", "pretrained", "kwargs", "mode")
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    values = {key: getattr(cfg, key) for key in kept} | {"dtype": mixed if cfg.dtype == "auto" else cfg.dtype}
    return dict(json.loads(json.dumps(values)))


def trained_by(cfg: TeacherConfig) -> str | None:
    """Hash of the recipe that trained a teacher, when it is a run folder on this machine."""
    folder = Path(cfg.model or "").expanduser()
    return trained_hash(folder / STUDENT) or trained_hash(folder)


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher of which only the outputs are there.

    Args:
        name: its name in the recipe.
        cfg: its block.
        store: where the outputs lie.
        column: its name in the store.
    """

    name: str
    cfg: TeacherConfig
    store: Store
    column: str

    @classmethod
    def open(cls, name: str, cfg: TeacherConfig) -> StoredTeacher:
        """Open the store that a recipe's block names."""
        return cls.of(name, cfg, open_store(str(cfg.store)))

    @classmethod
    def of(cls, name: str, cfg: TeacherConfig, store: Store) -> StoredTeacher:
        """A teacher of a store; the only one of it fits whatever it is called there."""
        known = list(store.manifest.teachers)
        if name not in known and len(known) > 1:
            raise UserError(f"teacher.store: '{store.place}' holds the teachers {', '.join(known)}, and no '{name}'")
        return cls(name, cfg, store, name if name in known else known[0])

    @property
    def facts(self) -> StoredNetwork:
        """What the manifest says about it."""
        return self.store.manifest.teachers[self.column]

    @cached_property
    def info(self) -> ModelInfo:
        """Its facts; preprocessing is what this recipe would show it."""
        info = read_info(self.facts.info)
        own = info.native or info.preprocessing
        changes = self.cfg.preprocessing.model_dump(exclude_none=True)
        paths = tuple(tap.removeprefix("module:") for tap in self.facts.taps if tap.startswith("module:"))
        return replace(info, preprocessing=replace(own, **changes), modules=paths)

    @property
    def handle(self) -> ModelHandle:
        """Its facts and origin; there is no network in it."""
        facts, asked = self.facts, self.facts.asked
        origin = Origin(facts.library, facts.architecture, asked["model"], facts.commit, asked["pretrained"])
        return ModelHandle(torch.nn.Identity(), self.info, origin)

    @property
    def shapes(self) -> Shapes:
        """Number of classes and shapes of the stored taps."""
        return Shapes(self.facts.num_classes, self.facts.taps, self.info.width, len(self.info.block_prefix))

    def describe(self) -> str:
        """One line for the log."""
        facts = self.facts
        kept = "all classes" if facts.top_k == facts.num_classes else f"the {facts.top_k} likeliest classes"
        text = f"{self.info.name}: {kept} for {self.store.manifest.epochs} epochs, stored in {self.store.place}"
        if facts.gate is None:
            return text
        return f"{text}; top-1 {facts.gate['top1']:.1f} on {facts.gate['samples']:.0f} held-out images when written"

    def check(
        self, recipe: Recipe, source: Source, views: Mapping[str, Preprocessing], global_batch: int, epochs: int
    ) -> None:
        """Raise :class:`UserError` when training would show the teacher something else, or for more epochs.

        Args:
            recipe: the run.
            source: its training images.
            views: of the student and of all teachers, stored or not.
            global_batch: images per optimiser step.
            epochs: that the run begins.
        """
        facts, asked = self.facts, asked_for(self.cfg, recipe.train)
        if asked["revision"] == facts.commit:
            asked["revision"] = facts.asked["revision"]
        trained = trained_by(self.cfg) or facts.trained_by  # the folder need not be here
        found = (
            first_difference(facts.asked, asked)
            or first_difference({"recipe (hash)": facts.trained_by}, {"recipe (hash)": trained})
            or first_difference(facts.shown, shown_images(self.name, recipe, source, views, global_batch))
        )
        if found:
            key, there, here = found
            block = f"{'teacher' if recipe.teacher else f'teachers.{self.name}'}."
            named = f"{block}{key}" if key in asked or key.startswith("recipe") else key
            raise UserError(
                f"{block}store: '{self.store.place}' does not fit this recipe: {named} is {_shown(there)} in the "
                f"store and {_shown(here)} here"
            )
        if epochs > self.store.manifest.epochs:
            raise UserError(
                f"teacher.store: '{self.store.place}' holds {self.store.manifest.epochs} epochs and this run has "
                f"{epochs}; `python -m kd_hf.cache RECIPE --epochs {epochs}` adds what is missing"
            )

    def reader(self, layout: Layout, steps_per_epoch: int, taps: Sequence[str]) -> Reader:
        """Its outputs by micro step, for one rank.

        Args:
            layout: of the rank's micro batches.
            steps_per_epoch: optimiser steps.
            taps: that methods read.
        """
        return Reader(self, layout, steps_per_epoch, taps)


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


class Reader:
    """Reads a stored teacher's rows of one rank in order; the next row groups are fetched by a thread meanwhile.

    Args:
        teacher: whose rows.
        layout: of the rank's micro batches.
        steps_per_epoch: optimiser steps.
        taps: that are read.
        ahead: row groups that are read before they are asked for.
    """

    def __init__(
        self, teacher: StoredTeacher, layout: Layout, steps_per_epoch: int, taps: Sequence[str], ahead: int = _AHEAD
    ) -> None:
        self.teacher, self.layout, self.steps_per_epoch, self.taps = teacher, layout, steps_per_epoch, tuple(taps)
        self.ahead = ahead
        name, known = teacher.column, teacher.facts.columns(teacher.column)
        wanted = (f"{name}_values", f"{name}_classes", *(f"{name}_{tap}" for tap in self.taps))
        self.columns = {key: known[key] for key in wanted if key in known}
        self._pool = ThreadPoolExecutor(1)
        self._groups: dict[int, Future[dict[str, np.ndarray]]] = {}

    def __call__(self, micro_step: int, keys: Tensor, device: torch.device) -> Outputs:
        """Outputs for a micro batch counted over the whole run, on `device`: float32 logits ``[B, C]`` and taps.

        Raises:
            UserError: the images have other keys (int64 ``[B]``) than those the rows were written for.
        """
        epoch, start = self.layout.locate(micro_step, self.steps_per_epoch)
        rows = self.rows(epoch, start, len(keys))
        if not np.array_equal(rows[KEY], keys.numpy() & KEY_MASK):
            raise LocalError(
                f"teacher.store: '{self.teacher.store.place}' was written for other images: the keys at positions "
                f"{start} to {start + len(keys)} of epoch {epoch} are others"
            )
        return self.decode(rows, device)

    def rows(self, epoch: int, start: int, count: int) -> dict[str, np.ndarray]:
        """The columns' numbers at positions ``start … start + count - 1`` of an epoch, ``[count, width]`` each."""
        store = self.teacher.store
        size, base = store.manifest.group_rows, epoch * store.groups_per_epoch
        first, last = start // size, (start + count - 1) // size
        self._fetch(base + first, base + last)
        groups = [self._groups[base + group].result() for group in range(first, last + 1)]
        begin = start - first * size
        joined = {key: [group[key] for group in groups] for key in (KEY, *self.columns)}
        # a copy in any case: what Parquet gave must not be written to
        return {key: np.concatenate(parts)[begin : begin + count].copy() for key, parts in joined.items()}

    def _fetch(self, first: int, last: int) -> None:
        """Have the row groups read, and those after them; forget those before."""
        end = self.teacher.store.manifest.epochs * self.teacher.store.groups_per_epoch
        wanted = range(first, min(last + 1 + self.ahead, end))
        self._groups = {number: found for number, found in self._groups.items() if number in wanted}
        for number in wanted:
            if number not in self._groups:
                self._groups[number] = self._pool.submit(self._read, number)

    def _read(self, number: int) -> dict[str, np.ndarray]:
        table = self.teacher.store.group(number, [KEY, *self.columns])
        found = {key: matrix(table.column(key), kind, width) for key, (kind, width) in self.columns.items()}
        return {KEY: table.column(KEY).to_numpy(), **found}

    def decode(self, rows: Mapping[str, np.ndarray], device: torch.device) -> Outputs:
        """Logits and taps of rows."""
        name, facts = self.teacher.column, self.teacher.facts

        def tensor(key: str, kind: type[np.generic] = np.float16) -> Tensor:
            found = torch.from_numpy(rows[f"{name}_{key}"].astype(kind))
            return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)

        classes = tensor("classes", np.int64) if f"{name}_classes" in rows else None
        taps = {tap: tensor(tap).float().reshape(-1, *facts.taps[tap]) for tap in self.taps}
        return Outputs(spread(tensor("values"), classes, facts.num_classes), None, taps)
