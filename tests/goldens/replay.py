"""Step the real trainer through a recorded training, and compare everything with the record, in float64.

Only the data pipeline is left out: a recipe's trainer is built, set to the recorded initial weights, and its own feed
hands it the recorded images, targets and draws.
"""

from __future__ import annotations

import math
from collections import ChainMap, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kd_hf.data.noise import NoiseSource
from kd_hf.distillation.module import DistillModule
from kd_hf.distillation.teacher import Teacher
from kd_hf.draws import Draws
from kd_hf.methods.base import Moment
from kd_hf.methods.orthogonal import OrthogonalProjection
from kd_hf.outputs import Outputs, Target
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.train.feed import Feed
from kd_hf.train.trainer import DistillTrainer
from tests.goldens.record import Mismatch
from tests.goldens.trajectory import DROP_PATH, Trajectory, projections, sampled
from tests.runs import ROOT

LIMIT = 1e-9
FLOOR = 1e-6  # below it a difference is not measured against the number itself
ALONE = (
    *("train.use_cpu=true", "train.cpu_threads=1", "train.disable_tqdm=true", "train.dataloader_num_workers=0"),
    *("train.eval_strategy=no", "train.save_strategy=no", "train.fp16=false", "train.bf16=false"),
    *("train.sync_batchnorm=false", "eval.report=false"),
)


@dataclass
class Differences:
    """The largest relative difference of every quantity, and what the file lets the replay leave out."""

    errors: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    exceptions: list[str] = field(default_factory=list)

    def note(self, key: str, difference: float | Tensor, size: float | Tensor) -> None:
        """Raise the difference of a quantity to this one, measured against a size."""
        error = float(difference) / max(float(size), FLOOR)
        self.errors[key] = max(self.errors[key], error if math.isfinite(error) else math.inf)


def replay(record: Trajectory, recipes: Path = ROOT / "recipes") -> Differences:
    """Train as recorded. Raises Mismatch for what the trainer lacks, or what the file holds and nothing reads."""
    facts, found, paths = record.facts, Differences(), DropPaths(record)
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(mock.patch("timm.layers.drop.drop_path", paths))
        trainer = _build(record, recipes, stack.enter_context(TemporaryDirectory()))
        names = _Names(trainer)
        _start(trainer, names, record)
        paths.follow(trainer)
        rates = stack.enter_context(_rates(trainer, record))
        watch = stack.enter_context(_watched(trainer))
        feed = _feed(trainer, record, paths)
        for step in range(facts.steps):
            watch.clear()
            trainer.step(feed)
            trainer.state.global_step += 1
            paths.check()
            _compare_losses(record, trainer, step, watch, found)
            if (step + 1) % facts.steps_per_epoch == 0:
                _compare_epoch(record, names, step // facts.steps_per_epoch, found)
        _compare_rates(record, rates, found)
        _compare_end(record, names, found)
    if unread := record.tensors.unread():
        raise Mismatch(f"nothing reads {', '.join(unread)}")
    return found


# ------------------------------------------------------------------------------------------------ the trainer


def _build(record: Trajectory, recipes: Path, folder: str) -> DistillTrainer:
    """The recipe's trainer with its overrides, in float64, with random networks."""
    facts = record.facts
    recipe = load_recipe(recipes / facts.recipe, [*ALONE, *facts.overrides, f"train.output_dir={folder}"])
    rows = facts.steps_per_epoch * facts.accumulation * facts.pixels[0]
    source = NoiseSource(rows, facts.pixels[-1], facts.classes)
    trainer = DistillTrainer(_untrained(recipe), train_dataset=source, eval_dataset=source)
    length = trainer.length
    if (length.total_steps, length.steps_per_epoch) != (facts.steps, facts.steps_per_epoch):
        raise Mismatch(f"the recipe takes {length.total_steps} steps, {length.steps_per_epoch} an epoch")
    trainer.parts.module.double()
    if trainer.trained.ema is not None:
        trainer.trained.ema.double()
    if (trainer.trained.ema is None) != (facts.average is None):
        raise Mismatch(f"the file's average starts from {facts.average}, and the recipe's is {trainer.args.ema}")
    for name, teacher in trainer.teachers.items():
        trainer.teachers[name] = _ExactTeacher(teacher)
    return trainer


def _untrained(recipe: Recipe) -> Recipe:
    """The same run from random networks, whose teachers nobody measures."""
    student = recipe.student.model_copy(update={"pretrained": False})
    teachers = {
        name: cfg.model_copy(update={"pretrained": False, "gate": cfg.gate.model_copy(update={"enabled": False})})
        for name, cfg in recipe.all_teachers().items()
    }
    block = {"teacher": teachers.get("teacher")} if recipe.teacher else {"teachers": teachers}
    return recipe.model_copy(update={"student": student, "baseline": None, **block})


class _ExactTeacher(Teacher):
    """A teacher in float64, whose logits are not rounded."""

    def __init__(self, teacher: Teacher) -> None:
        vars(self).update(vars(teacher))
        self.dtype = torch.float64
        self.model.double()

    def __call__(self, pixels: Tensor, whole: bool = True) -> Outputs:
        """As every teacher's, but for its logits' float32."""
        with mock.patch.object(Tensor, "float", Tensor.double):
            return super().__call__(pixels, whole)


class _Names:
    """Everything that has a name in a record."""

    def __init__(self, trainer: DistillTrainer) -> None:
        networks = {"student": trainer.parts.student, **trainer.parts.teachers}
        self.states: dict[str, nn.Module] = {name: handle.network for name, handle in networks.items()}
        self.states["methods"] = trainer.parts.module.methods
        if trainer.trained.ema is not None:
            self.states["ema"] = trainer.trained.ema.module.network
        trained = {"student": self.states["student"], "methods": self.states["methods"]}
        self.learned = {
            f"{k}.{name}" for k, m in trained.items() for name, p in m.named_parameters() if p.requires_grad
        }

    def tensors(self) -> dict[str, Tensor]:
        """By name; writing into one writes into its network."""
        return {f"{key}.{name}": v for key, module in self.states.items() for name, v in module.state_dict().items()}


@torch.no_grad()
def _start(trainer: DistillTrainer, names: _Names, record: Trajectory) -> None:
    """Set everything to the recorded initial values."""
    for name, value in names.tensors().items():
        if name.startswith("ema.") or not value.is_floating_point() or name.rpartition(".")[2].startswith("base_"):
            continue
        value.copy_(record.initial(name, value.shape))
    for name, module in names.states["methods"].named_modules():
        key = f"weights/methods.{name}.base"
        if isinstance(module, OrthogonalProjection) and key in record.tensors:
            module.set_base(record.tensors[key])
    if trainer.trained.ema is not None:
        trainer.trained.ema.module.load_state_dict(trainer.parts.module.student.state_dict())


# ------------------------------------------------------------------------------------------------ what a step is given


@dataclass
class _Micro:
    """A recorded micro batch, as the feed takes it; its key tells which it is."""

    key: Tensor
    corrupt: list[int] = field(default_factory=list)

    def to(self, device: torch.device, non_blocking: bool = True) -> _Micro:
        """It lies nowhere."""
        return self


class _RecordedDraws:
    """Stands in for the trained module where the feed asks it for random numbers."""

    def __init__(self, module: DistillModule, record: Trajectory) -> None:
        self.module, self.record, self.choices = module, record, module.choices

    def draw(self, draws: Draws, moment: Moment, active: Collection[str]) -> dict[str, Mapping[str, Tensor]]:
        """The recorded ones, and what moves with the run."""
        step, micro = draws.keys.tolist()
        return {
            name: ChainMap(
                {key: torch.tensor(value, dtype=torch.float64) for key, value in method.scheduled(moment).items()},
                self.record.draws(name, step, micro),
            )
            for name, method in self.module.named_methods()
            if name in active
        }


def _feed(trainer: DistillTrainer, record: Trajectory, paths: DropPaths) -> Feed:
    """The trainer's own way of preparing lessons, from the recorded batches."""
    facts, module = record.facts, trainer.parts.module
    views = ("student", *trainer.teachers)

    def stage(batch: _Micro) -> tuple[dict[str, Tensor], Target]:
        step, micro = paths.at = tuple(batch.key.tolist())
        return dict.fromkeys(views, record.pixels(step, micro)), record.target(step, micro)

    counted = ((step, micro) for step in range(facts.steps) for micro in range(facts.accumulation))
    return Feed(
        iter(_Micro(torch.tensor(pair)) for pair in counted),
        stage,
        trainer.teachers,
        _RecordedDraws(module, record),
        lambda step: tuple(name for name, weight in trainer.weights(step).items() if weight != 0),
        lambda step: Moment(step, facts.steps, facts.steps_per_epoch),
        accumulation=facts.accumulation,
        start_step=0,
        seed=0,
        rank=0,
        device=torch.device("cpu"),
        ahead=0,
    )


class DropPaths:
    """Stands in for timm's drop path: the record's masks in the order of the calls of a pass.

    A pass over k views of a batch at once takes the masks of ``view.0`` … ``view.<k-1>``, one after the other.
    """

    def __init__(self, record: Trajectory) -> None:
        self.record, self.names = record, record.drop_paths()
        self.at = (0, 0)  # step and micro batch
        self.current: list[str] = []  # the passes that run
        self.counts = dict.fromkeys(self.names, 0)  # calls in the last run of a pass

    def follow(self, trainer: DistillTrainer) -> None:
        """Learn which pass begins, from the networks and the parts of teachers that run."""
        self._on(trainer.parts.module.student, ["student"])
        for name, teacher in trainer.teachers.items():
            self._on(teacher.model, [name])
        views = [name for name in self.names if name.startswith("view.")]
        for part in {part for method in trainer.parts.module.methods.values() for part in method.parts.values()}:
            self._on(part, views)

    def _on(self, module: nn.Module, names: list[str]) -> None:
        """Take these masks while a module runs."""
        outer: list[list[str]] = []

        def begin(module: nn.Module, args: Any) -> None:
            outer.append(self.current)
            self.current = [name for name in names if name in self.counts]
            self.counts.update(dict.fromkeys(self.current, 0))

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.current = outer.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end, always_call=True)

    def __call__(self, x: Tensor, drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> Tensor:
        """Drop what the record says. Raises Mismatch where it says something else than the network."""
        if drop_prob == 0.0 or not training:
            return x
        masks = []
        for name in self.current:
            keep, mask = (self.record.tensors[f"{DROP_PATH}{name}/{key}"] for key in ("keep", "mask"))
            call, self.counts[name] = self.counts[name], self.counts[name] + 1
            if call >= len(keep) or abs(float(keep[call]) - (1 - drop_prob)) > 1e-6:
                raise Mismatch(f"{DROP_PATH}{name}: call {call} of the network keeps {1 - drop_prob:g}")
            masks.append(mask[(*self.at, call)] / keep[call])
        if sum(map(len, masks)) != len(x):
            raise Mismatch(
                f"drop path of {', '.join(self.current) or 'an unknown pass'}: not one mask for each of {len(x)}"
            )
        return x * torch.cat(masks).view(-1, *[1] * (x.ndim - 1))

    def check(self) -> None:
        """Raises Mismatch when a pass has recorded masks that the network did not ask for."""
        for name, count in self.counts.items():
            if count != len(self.record.tensors[f"{DROP_PATH}{name}/keep"]):
                raise Mismatch(f"{DROP_PATH}{name}: the network drops paths {count} times")


# ------------------------------------------------------------------------------------------------ what comes of it


class Watch:
    """What a step does, unrounded: losses of its micro batches, and the norm of the gradient before it is clipped."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.norm: float | None = None

    def clear(self) -> None:
        """Begin a step."""
        self.losses, self.norm = [], None

    def means(self) -> dict[str, float]:
        """Every loss over the micro batches."""
        return {name: math.fsum(losses[name] for losses in self.losses) / len(self.losses) for name in self.losses[0]}


@contextmanager
def _watched(trainer: DistillTrainer) -> Iterator[Watch]:
    """Look at the trainer's steps."""
    watch, optimizer, window = Watch(), trainer.trained.optimizer.optimizer, trainer.window
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clip, add = trainer.accelerator.clip_grad_norm_, window.add

    def note_norm(*_: Any) -> None:
        if watch.norm is None:  # clipping comes first, where there is any
            norms = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
            watch.norm = float(torch.stack(norms).norm())

    def noted_clip(*args: Any, **kwargs: Any) -> Any:
        note_norm()
        return clip(*args, **kwargs)

    def noted_add(losses: Mapping[str, Tensor], step: int) -> None:
        watch.losses.append({name: float(value.detach()) for name, value in losses.items()})
        add(losses, step)

    handle = optimizer.register_step_pre_hook(note_norm)
    with (
        mock.patch.object(trainer.accelerator, "clip_grad_norm_", noted_clip),
        mock.patch.object(window, "add", noted_add),
    ):
        yield watch
    handle.remove()


@contextmanager
def _rates(trainer: DistillTrainer, record: Trajectory) -> Iterator[list[float]]:
    """The rates that the recipe's schedule sets; the recorded ones replace them where the file imposes them."""
    schedule, rates = trainer.trained.schedule, list[float]()
    set_rate = schedule.set

    def noted(step: int) -> float:
        rates.append(set_rate(step))
        if record.facts.schedule == "own":
            return rates[-1]
        imposed = float(record.tensors["lr/all"][step])
        for group in trainer.trained.optimizer.optimizer.param_groups:
            group["lr"] = imposed * group.get("lr_scale", 1.0)
        return imposed

    with mock.patch.object(schedule, "set", noted):
        yield rates


def _compare_losses(record: Trajectory, trainer: DistillTrainer, step: int, watch: Watch, found: Differences) -> None:
    """What was differentiated, its summands, and the gradient's norm."""
    weights, means = trainer.weights(step), watch.means()
    for key, values in record.under("out/").items():
        recorded = float(values[step])
        if key == "grad_norm":
            value = watch.norm
        elif key == "loss":
            value = means["loss"]
        else:  # a block of the recipe, or one of its parts, times the block's weight
            parts = [mean for name, mean in means.items() if name == key or name.startswith(f"{key}/")]
            if not parts:
                raise Mismatch(f"out/{key}: the recipe has no such loss; it has {', '.join(means)}")
            value = weights[key.partition("/")[0]] * math.fsum(parts)
        assert value is not None
        found.note(f"out/{key}", abs(value - recorded), abs(recorded))


def _compare_epoch(record: Trajectory, names: _Names, epoch: int, found: Differences) -> None:
    """One inner product of every tensor."""
    tensors = names.tensors()
    for name, values in record.under("epoch/").items():
        value = _tensor(tensors, f"epoch/{name}", name)
        found.note(f"epoch/{name}", (projections(name, value, 1) - values[epoch]).abs().max(), value.norm())


def _compare_end(record: Trajectory, names: _Names, found: Differences) -> None:
    """Elements and inner products of every tensor that is learned or averaged, and of statistics that moved."""
    tensors, final = names.tensors(), record.under("final/")
    if missing := names.learned - set(final):
        raise Mismatch(f"the file holds no end of {', '.join(sorted(missing))}")
    for name, values in final.items():
        value = _tensor(tensors, f"final/{name}", name)
        found.note(f"final/{name}", (sampled(value) - values).abs().max(), values.abs().max())
    for name, values in record.under("dot/").items():
        value = _tensor(tensors, f"dot/{name}", name)
        found.note(f"dot/{name}", (projections(name, value) - values).abs().max(), value.norm())


def _tensor(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if name not in tensors:
        raise Mismatch(f"{key}: the trainer has no such tensor")
    return tensors[name].detach().double()


def _compare_rates(record: Trajectory, rates: list[float], found: Differences) -> None:
    """The recipe's own rates are the recorded ones, or the file says that they are imposed."""
    recorded = record.tensors["lr/all"].tolist()
    pairs = list(zip(rates, recorded, strict=True))
    if record.facts.schedule == "own" or all(abs(ours - theirs) <= LIMIT * theirs for ours, theirs in pairs):
        for ours, theirs in pairs:
            found.note("lr/all", abs(ours - theirs), theirs)
        return
    late = record.facts.late
    moved = [abs(ours - theirs) for ours, theirs in zip(rates, recorded[late:], strict=False)]
    if late and max(moved) <= LIMIT * max(recorded):
        found.exceptions.append(f"rates are the file's, {late} steps behind the recipe's")
    else:
        found.exceptions.append("rates are the file's, not the recipe's")
