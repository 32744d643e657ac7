"""What every distillation method must satisfy, as one call: for our own methods and for those of other packages.

>>> from kd_hf.testing import check_method
>>> check_method(MyMethod)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kd_hf.draws import Draws, hash_key
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, PreActivation, Preprocessing, Shapes, Stage
from kd_hf.methods.base import OF_STUDENT, Method, MethodConfig, Moment, Needs, Reference
from kd_hf.models.parts import AFTER, HEAD, NORM
from kd_hf.models.taps import check_tap
from kd_hf.outputs import Outputs, Target

if TYPE_CHECKING:
    from kd_hf.tasks.base import Task

CLASSES, BATCH, GRID = 11, 6, 4


def tiny_stages(name: str, widths: Sequence[int] = (6, 8, 10, 12), layout: str = "NCHW") -> ModelInfo:
    """The facts of a network with one stage per width (a CNN, or Swin with ``layout="NHWC"``).

    The last map is ``GRID × GRID``, each earlier one twice as large. Stages of a CNN end in BatchNorm and ReLU.
    """
    relu = (PreActivation(f"layer{i + 1}.act", norm=f"layer{i + 1}.bn") for i in range(len(widths)))
    ends = relu if layout == "NCHW" else [None] * len(widths)
    stages = tuple(
        Stage(f"layer{i + 1}", width, layout, end) for i, (width, end) in enumerate(zip(widths, ends, strict=True))
    )
    return ModelInfo(name, "torch", CLASSES, Preprocessing(), stages=stages, head="fc")


def tiny_vit(name: str, width: int = 12, depth: int = 4, prefix: Sequence[str] = ("cls",)) -> ModelInfo:
    """The facts of a ViT of ``GRID × GRID`` patches; a "dist" token brings a second head."""
    return ModelInfo(
        name,
        "torch",
        CLASSES,
        Preprocessing(),
        stages=(Stage("norm", width, "NLC"),),
        blocks=tuple(f"blocks.{i}" for i in range(depth)),
        prefix=tuple(prefix),
        block_prefix=tuple(prefix),
        norm="norm",
        head="head",
        dist_head="head_dist" if "dist" in prefix else None,
    )


# students and teachers a method is tried on; widths differ, agree, and the last student has two heads
PAIRS: Mapping[str, tuple[ModelInfo, ModelInfo]] = {
    "cnn": (tiny_stages("tiny_cnn"), tiny_stages("tiny_cnn_teacher", (8, 10, 12, 16))),
    "swin": (tiny_stages("tiny_swin", layout="NHWC"), tiny_stages("tiny_cnn_teacher")),
    "vit": (tiny_vit("tiny_vit"), tiny_vit("tiny_vit_teacher", 16, 5)),
    "distilled": (tiny_vit("tiny_distilled", prefix=("cls", "dist")), tiny_stages("tiny_cnn_teacher")),
}


def tap_shape(info: ModelInfo, tap: str) -> tuple[int, ...]:
    """Shape of a tap without the batch, from facts alone: maps halve from stage to stage down to ``GRID × GRID``.

    Raises:
        AssertionError: for a tap whose shape facts do not tell (``module:…``); give it to :func:`check_method`.
    """
    kind, _, index = tap.partition(":")
    width = info.stages[-1].channels if info.stages else 12
    tokens = GRID * GRID + (0 if index == "patch" else len(info.prefix))
    if kind in ("stage", "preact"):
        position = int(index) - 1 if int(index) > 0 else len(info.stages) + int(index)
        size = GRID * 2 ** (len(info.stages) - 1 - position)
        return (info.stages[position].channels, size, size)
    if kind == "block" or tap in ("tokens", "tokens:patch"):
        return (tokens, width)
    assert kind in ("tokens", "pre_logits"), f"give the shape of tap '{tap}' of '{info.name}' in `shapes`"
    return (width,)


@dataclass
class _Batch:
    """A method's arguments, cut along the batch with `part`."""

    student: Outputs
    teacher: Outputs | None
    target: Target
    keys: Tensor

    def part(self, rows: slice) -> _Batch:
        """Some of the samples."""
        labels: dict[str, Any] = {
            name: None if value is None else value[rows] for name, value in vars(self.target).items()
        }
        return _Batch(
            self.student.map(lambda t: t[rows]),
            None if self.teacher is None else self.teacher.map(lambda t: t[rows]),
            replace(self.target, **labels),
            self.keys[rows],
        )

    def to(self, dtype: torch.dtype) -> _Batch:
        """The same numbers in another precision, detached from any graph."""
        soft = None if self.target.soft is None else self.target.soft.to(dtype)
        return replace(
            self,
            student=self.student.map(lambda t: t.detach().to(dtype)),
            teacher=None if self.teacher is None else self.teacher.map(lambda t: t.detach().to(dtype)),
            target=replace(self.target, soft=soft),
        )

    def leaves(self) -> _Batch:
        """The same numbers as leaves that collect gradients."""
        fresh = self.to(self.student.logits.dtype)
        for outputs in (fresh.student, fresh.teacher):
            for tensor in _tensors(outputs).values():
                tensor.requires_grad_()
        return fresh


def _made_up_part(info: ModelInfo, name: str) -> nn.Module:
    """A layer with the shapes of a network's part: a classifier, a norm, or a convolution to the final features."""
    if name == HEAD:
        return nn.Linear(tap_shape(info, "pre_logits")[0], info.num_classes)
    if name.startswith(NORM):
        norm = nn.BatchNorm2d(tap_shape(info, name.removeprefix(NORM))[0])
        nn.init.uniform_(norm.weight, -1, 1), nn.init.uniform_(norm.bias, -1, 1)
        return norm
    entry = tap_shape(info, name.removeprefix(AFTER))
    stride = entry[1] // GRID if len(entry) == 3 else 1
    return nn.Conv2d(entry[0] if len(entry) == 3 else entry[1], info.stages[-1].channels, stride, stride)


def _tensors(outputs: Outputs | None) -> dict[str, Tensor]:
    """Everything a network gave, by name."""
    if outputs is None:
        return {}
    named = {"logits": outputs.logits, "dist_logits": outputs.dist_logits}
    named.update({f"taps[{role}]": tap for role, tap in outputs.taps.items()})
    named.update({f"strong.{name}": tensor for name, tensor in _tensors(outputs.strong).items()})
    return {name: tensor for name, tensor in named.items() if tensor is not None}


class MadeUpSamples:
    """Training images of all classes in turn."""

    def __len__(self) -> int:
        return BATCH * CLASSES

    def labels(self) -> np.ndarray:
        """All labels; see :class:`kd_hf.info.Samples`."""
        return np.arange(len(self)) % CLASSES


class _Case:
    """A method with the shapes, modules and inputs it is tried on."""

    def __init__(
        self,
        method: type[Method],
        cfg: MethodConfig,
        infos: tuple[ModelInfo, ModelInfo | None],
        shapes: Mapping[str, tuple[int, ...]],
        parts: Mapping[str, nn.Module],
    ) -> None:
        self.method, self.cfg = method, cfg
        self.needs: Needs = method.needs(cfg, *infos)
        student, teacher = infos
        self.student = self._shapes(student, self.needs.student, "student", shapes)
        if self.needs.samples:
            self.student = replace(self.student, samples=MadeUpSamples())
        self.teacher = self._shapes(teacher, self.needs.teacher, "teacher", shapes) if teacher else None
        self.parts = {name: self._part(name, teacher, parts).requires_grad_(False).eval() for name in self.needs.parts}
        self.own_parts = {f"{OF_STUDENT}{part}": _made_up_part(student, part) for part in self.needs.student_parts}
        self.dist_head = self.needs.dist_head

    @staticmethod
    def _shapes(info: ModelInfo, roles: Mapping[str, str], side: str, given: Mapping[str, tuple[int, ...]]) -> Shapes:
        for role, tap in roles.items():
            if f"{side}.{role}" not in given:
                check_tap(info, tap)
        taps = {role: given.get(f"{side}.{role}") or tap_shape(info, tap) for role, tap in roles.items()}
        return Shapes(info.num_classes, taps, info.width, len(info.block_prefix))

    @staticmethod
    def _part(name: str, teacher: ModelInfo | None, given: Mapping[str, nn.Module]) -> nn.Module:
        if name in given:
            return given[name]
        known = teacher is not None and (name == HEAD or name.startswith((AFTER, NORM)))
        assert known and teacher is not None, f"give the teacher's part '{name}' in `parts`"
        return _made_up_part(teacher, name)

    def build(self, dtype: torch.dtype = torch.float64) -> Method:
        """A fresh instance with reproducible weights, in train mode."""
        for part in (*self.parts.values(), *self.own_parts.values()):
            part.to(dtype).zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.method(self.cfg, self.student, self.teacher, self.parts | self.own_parts).to(dtype)

    def batch(self, kind: str) -> _Batch:
        """Random inputs of `BATCH` samples; `kind` of labels: hard, soft or missing (one sample has none)."""
        draws = Draws(torch.tensor([hash_key("check_method", sample) for sample in range(BATCH)]))
        return _Batch(
            self._outputs(self.student, draws, "student"),
            None if self.teacher is None else self._outputs(self.teacher, draws, "teacher"),
            _labels(kind, self.student.num_classes, draws),
            draws.keys,
        )

    def _outputs(self, shapes: Shapes, draws: Draws, side: str) -> Outputs:
        def normal(name: str, shape: Sequence[int]) -> Tensor:
            return draws.normal(f"{side}/{name}", shape).double()

        dist = normal("dist", (shapes.num_classes,)) if side == "student" and self.dist_head else None
        taps = {role: normal(role, shape) for role, shape in shapes.taps.items()}
        strong = Outputs(2 * normal("strong", (shapes.num_classes,))) if self.needs.strong else None
        return Outputs(2 * normal("logits", (shapes.num_classes,)), dist, taps, strong)


def _labels(kind: str, classes: int, draws: Draws) -> Target:
    hard = (draws.uniform("label", ()) * classes).long()
    row = hard + CLASSES * torch.arange(len(hard))  # of the made-up training images
    if kind == "missing":
        hard[0] = -1
    if kind != "soft":
        return Target(hard, None, row)
    other = (hard + 1) % classes
    share = 0.6 + 0.3 * draws.uniform("share", ()).double()[:, None]
    one, two = (nn.functional.one_hot(index, classes).double() for index in (hard, other))
    return Target(hard, share * one + (1 - share) * two, row)


def _run(built: Method, batch: _Batch) -> dict[str, Tensor]:
    return built(batch.student, batch.teacher, batch.target, _drawn(built, batch))


def _drawn(built: Method, batch: _Batch) -> dict[str, Tensor]:
    """Draws for the batch, and scheduled numbers as in the middle of a run."""
    scheduled = {name: torch.tensor(value) for name, value in built.scheduled(Moment(15, 30, 10)).items()}
    return {**built.draw(Draws(batch.keys)), **scheduled}


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.double() for value in losses.values()]).sum()


def check_method(
    method: type[Method],
    config: Mapping[str, Any] | None = None,
    student: ModelInfo | None = None,
    teacher: ModelInfo | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    parts: Mapping[str, nn.Module] | None = None,
) -> None:
    """Assert that a method keeps the contract of :class:`kd_hf.methods.base.Method`, on tiny random tensors.

    Checked: options and their refusal, names and finiteness of losses, gradients (all own parameters and declared
    student tensors and parts, never the teacher's), logits that are read undeclared, draws as the only randomness,
    the mean over halves of a batch (unless `batch_coupled`), samples without label, bfloat16, saving and loading.

    Args:
        method: the class.
        config: options, where the defaults are not what is to be tried.
        student: facts of a student; without it the method is tried on small CNNs and ViTs, of which at least one
            pair must suit.
        teacher: facts of a teacher, for `student`.
        shapes: shapes without the batch of taps that facts do not tell, as ``"student.<role>"``, ``"teacher.<role>"``.
        parts: live teacher modules by part name; "head", "after:…" and "norm:…" are made up when missing.

    Raises:
        AssertionError: naming what is violated.
    """
    cfg = _check_declaration(method, dict(config or {}))
    cases, refusals = [], []
    for infos in [(student, teacher)] if student is not None else PAIRS.values():
        try:
            case = _Case(method, cfg, infos, shapes or {}, parts or {})
            case.build()
        except UserError as error:
            refusals.append(str(error))
            continue
        cases.append(case)
    assert cases, f"{method.name} refuses every network it was tried on: " + "; ".join(refusals)
    for case in cases:
        for kind in _kinds(case.needs):
            _check_losses(case, case.batch(kind))
            _check_gradients(case, case.batch(kind))
            _check_logits(case, case.batch(kind))
            _check_randomness(case, case.batch(kind))
            _check_halves(case, case.batch(kind))
            _check_half_precision(case, case.batch(kind))
        _check_reload(case, case.batch("hard"))


def _kinds(needs: Needs) -> tuple[str, ...]:
    """The kinds of labels that a method must take."""
    return {
        "none": ("missing",),
        "hard": ("hard", "missing"),
        "soft": ("hard", "soft", "missing"),
        "optional": ("hard", "soft", "missing"),
    }[needs.labels]


def _check_declaration(method: type[Method], config: dict[str, Any]) -> MethodConfig:
    assert isinstance(method.name, str) and method.name.isidentifier(), f"name {method.name!r} is no identifier"
    assert isinstance(method.paper, Reference), f"{method.name}.paper is not a Reference"
    assert issubclass(method.Config, MethodConfig), f"{method.name}.Config is not a MethodConfig"
    try:
        method.Config.model_validate({**config, "no_such_option": 1})
    except ValidationError:
        return method.Config.model_validate(config)
    raise AssertionError(f"{method.name}.Config takes unknown options; keep extra='forbid'")


def _check_losses(case: _Case, batch: _Batch) -> None:
    losses = _run(case.build(), batch)
    assert isinstance(losses, dict) and losses, f"{case.method.name} returns no losses"
    for name, value in losses.items():
        assert isinstance(name, str) and name, f"loss name {name!r} is not a string"
        assert isinstance(value, Tensor) and value.shape == (), f"loss '{name}' is not a scalar tensor"
        assert torch.isfinite(value), f"loss '{name}' is {value.item()}"


def _check_gradients(case: _Case, batch: _Batch) -> None:
    built, batch = case.build(), batch.leaves()
    registered = {id(tensor) for tensor in (*built.parameters(), *built.buffers())}
    for name, part in {**case.parts, **case.own_parts}.items():
        taken = any(id(parameter) in registered for parameter in part.parameters())
        owner = "part" if name.startswith(OF_STUDENT) else "teacher part"
        assert not taken, f"{owner} '{name}' is registered; keep it in `self.parts` only"
    _total(_run(built, batch)).backward()
    for name, part in case.own_parts.items():
        for key, parameter in part.named_parameters():
            _assert_gradient(f"'{key}' of the part '{name}'", parameter)
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            _assert_gradient(f"parameter '{name}'", parameter)
    seen = _tensors(batch.student)
    for role in case.needs.student:
        _assert_gradient(f"student tap '{role}'", seen[f"taps[{role}]"])
    for needed, name in ((case.needs.dist_head, "dist_logits"), (case.needs.strong, "strong.logits")):
        if needed:
            _assert_gradient(f"student.{name}", seen[name])
    for name, tensor in _tensors(batch.teacher).items():
        assert tensor.grad is None or not tensor.grad.any(), f"a gradient reaches the teacher's {name}; detach it"


def _assert_gradient(name: str, tensor: Tensor) -> None:
    assert tensor.grad is not None, f"no gradient reaches {name}"
    assert torch.isfinite(tensor.grad).all(), f"the gradient of {name} is not finite"


def _check_logits(case: _Case, batch: _Batch) -> None:
    if batch.teacher is None or case.needs.teacher_logits:
        return
    losses = _run(case.build(), batch)
    others = replace(batch, teacher=replace(batch.teacher, logits=batch.teacher.logits.flip(1)))
    same = all(torch.equal(losses[name], value) for name, value in _run(case.build(), others).items())
    assert same, "a loss reads the teacher's logits, which needs() does not declare; then they may not be there"


def _check_randomness(case: _Case, batch: _Batch) -> None:
    built = case.build()
    first, second = built.draw(Draws(batch.keys)), built.draw(Draws(batch.keys))
    assert first.keys() == second.keys(), "draw() names other tensors the second time"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"draw '{name}' is not a function of the keys"
    before = {name: tensor.clone() for name, tensor in _tensors(batch.student).items()}
    state = torch.get_rng_state()
    one = _run(case.build(), batch)
    assert torch.equal(state, torch.get_rng_state()), "forward() or draw() used torch's global generator"
    two = _run(case.build(), batch)
    assert all(torch.equal(value, two[name]) for name, value in one.items()), "the same inputs gave other losses"
    for name, tensor in _tensors(batch.student).items():
        assert torch.equal(before[name], tensor), f"forward() changed student.{name} in place"


def _check_halves(case: _Case, batch: _Batch) -> None:
    if case.needs.batch_coupled:
        return
    half = BATCH // 2
    whole = _run(case.build(), batch)
    parts = [_run(case.build(), batch.part(rows)) for rows in (slice(0, half), slice(half, BATCH))]
    for name, value in whole.items():
        mean = (parts[0][name] + parts[1][name]) / 2
        tolerance = 1e-9 if value.dtype == torch.float64 else 1e-5
        assert torch.allclose(mean, value, rtol=tolerance, atol=1e-12), (
            f"loss '{name}' of the whole batch is {value.item():.12g}, the mean over its halves {mean.item():.12g}; "
            "divide sums by the batch size, or declare Needs.batch_coupled"
        )


def _check_half_precision(case: _Case, batch: _Batch) -> None:
    exact = _total(_run(case.build(), batch))
    with torch.autocast("cpu", torch.bfloat16):
        rough = _run(case.build(torch.float32), batch.to(torch.bfloat16))
    for name, value in rough.items():
        assert torch.isfinite(value), f"loss '{name}' is {value.item()} under bfloat16"
    error = abs(_total(rough) - exact).item()
    assert error <= 0.05 * abs(exact.item()) + 1e-6, (
        f"the loss is {_total(rough).item():.6g} under bfloat16 and {exact.item():.6g} in float64; "
        "compute it in float32"
    )


def _check_reload(case: _Case, batch: _Batch) -> None:
    built = case.build()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.01)
    saved = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    restored = case.build()
    restored.load_state_dict(saved, strict=True)
    one, two = _run(built, batch), _run(restored, batch)
    assert all(torch.equal(value, two[name]) for name, value in one.items()), "loading a state_dict changes the losses"
    own = sum(parameter.numel() for parameter in built.parameters())
    assert built.cost().parameters == own, f"cost() counts {built.cost().parameters} parameters, there are {own}"


def check_task(task: Task, images: int = 8) -> None:
    """Check what the trainer relies on of a task, with the student of its recipe at random weights, on noise.

    Args:
        task: opened from a recipe; its data are not read.
        images: of noise.

    Raises:
        AssertionError: it does not keep the contract.
    """
    from kd_hf.process import build_accelerator

    recipe = task.recipe
    assert task.pipeline_tag == recipe.task, f"its pipeline_tag is {task.pipeline_tag}, the recipe's task {recipe.task}"
    assert task.score.key and task.score.name and "{data}" in task.words.limit
    cfg, source = recipe.student, task.noise(images, recipe.data.image_size or 32, recipe.student.num_classes or 5)
    assert len(source) == images and source.describe()
    student = task.load(str(cfg.model), pretrained=False, num_classes=cfg.num_classes or source.num_classes,
                        kwargs=cfg.kwargs, image_size=cfg.image_size or recipe.data.image_size)  # fmt: skip
    task.check_classes(student.info, source)
    model = task.tapped(student, student.info, ())
    views = {"student": replace(student.info.preprocessing, image_size=recipe.data.image_size or 32)}
    accelerator = build_accelerator(recipe.train)
    outputs = model.eval()(task.example(views["student"], accelerator.device))
    assert isinstance(outputs, Outputs) and outputs.logits.isfinite().all(), "a tapped network gives finite Outputs"

    def batches(world: int, rank: int, start: int) -> list[Any]:
        position = {
            "per_device": 4 // world,
            "world": world,
            "rank": rank,
            "accumulation": 1,
            "seed": recipe.train.seed,
        }
        position |= {"start_step": start, "total_steps": 2, "workers": 0, "prefetch_factor": 1}
        return list(task.batches(source, views, **position, pin_memory=False))

    whole, later = batches(1, 0, 0), batches(1, 0, 1)
    assert len(whole) == 2 and later[0].key.equal(whole[1].key), "a batch is a function of its number"
    parts = [batches(2, rank, 0)[0].key for rank in (0, 1)]
    assert torch.cat(parts).sort().values.equal(whole[0].key.sort().values), "two ranks share the batch of one"
    inputs, target = task.stage(source, views, student.info)(whole[0])
    assert inputs.keys() == views.keys() and all(tensor is not None for tensor in target.tensors())
    model(inputs["student"])
    measured = task.evaluator({"student": model}, views["student"], {}, source, accelerator)()
    assert "samples" in measured, "an evaluation says how many images it measured"
    assert all(isinstance(word, str) for word in (*task.drawn(), *task.augmentation(), *task.size_of(views["student"])))
