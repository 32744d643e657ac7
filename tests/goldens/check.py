"""Run recorded files through our methods and compare every loss, part and gradient, in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd_hf.errors import UserError
from kd_hf.methods import get_method, method_names
from kd_hf.methods.base import Method, MethodConfig, Outputs, Target
from kd_hf.models.info import Shapes
from tests.goldens.layouts import IGNORED, LAYOUTS, Layout, Output, layout_of
from tests.goldens.options import PLAIN, Option

LIMIT = 1e-9
# kinds of files that are no method of the classification trainer
DETECTION = ("deform_attn", "vidt", "vidt_criterion", "vidt_kd")
# Values this small are differences of numbers near 1, so their own size says nothing about rounding.
FLOOR = 1e-6
# A gradient that cancels (of a bias before BatchNorm) is recorded as the rounding of its summands.
NOISE = 1e-13
# What rounding to float32 changes, relative to a number.
SINGLE = 2.0**-24


class Mismatch(Exception):
    """A file that our methods cannot reproduce, for the reason given."""


class NotCovered(Exception):
    """A file of a kind that there is no table entry for."""


@dataclass(frozen=True)
class Row:
    """The outcome for one file; `error` is the worst relative error, None when nothing could be compared."""

    method: str
    case: str
    error: float | None
    status: str


def passed(row: Row) -> bool:
    """Whether everything in the file agreed."""
    return row.status == "ok"


def failed(row: Row) -> bool:
    """Whether something in the file did not."""
    return row.status.startswith("FAILED")


@dataclass(frozen=True)
class Golden:
    """A recorded file and how it is run; the tensors named in `single` were stored with the precision of float32."""

    method: str
    hparams: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    single: frozenset[str] = frozenset()
    option: Option = PLAIN

    @classmethod
    def read(cls, file: Path, option: Option = PLAIN) -> Golden:
        """Read a file; floating-point tensors become float64."""
        with safe_open(file, "pt", device=str(torch.get_default_device())) as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in sorted(stored.keys())}
        method = metadata.get("method", file.parent.name)
        wide = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}
        single = frozenset(key for key, value in tensors.items() if value.dtype == torch.float32)
        return cls(method, json.loads(metadata.get("hparams", "{}")), wide, single, option)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix such as ``in/``, by the rest of their names."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def target(self) -> Target:
        """Labels: an index vector or rows, under whichever name; none at all gives -1."""
        inputs = self.group("in/")
        found = [inputs[name] for name in ("label", "labels", "target", "targets") if name in inputs]
        if not found:
            return Target(torch.full((len(next(iter(inputs.values()))),), -1))
        return Target(found[0]) if found[0].ndim == 1 else Target(found[0].argmax(1), found[0])


@dataclass
class Term:
    """One method of a case with its options and its weight in the recipe."""

    name: str
    options: Mapping[str, Any]
    weight: float

    def config(self, changes: Mapping[str, Any]) -> MethodConfig:
        """The method's Config, with some options replaced."""
        return get_method(self.name).Config.model_validate({**self.options, **changes})


def make_term(name: str, layout: Layout, hparams: Mapping[str, Any]) -> Term:
    """Translate official hyper-parameters. Raises Mismatch for unknown or missing ones."""
    expected = {*layout.options, *([layout.weight] if layout.weight else [])}
    if missing := expected - hparams.keys():
        raise Mismatch(f"hparams lack {', '.join(sorted(missing))}")
    if unknown := hparams.keys() - expected - layout.optional.keys() - layout.ignored - IGNORED:
        raise Mismatch(f"unknown hparams {', '.join(sorted(unknown))}")
    named = {**layout.options, **layout.optional}
    options = {ours: hparams[official] for official, ours in named.items() if official in hparams}
    return Term(name, {**layout.fixed, **options}, hparams[layout.weight] if layout.weight else 1.0)


def make_terms(name: str, layout: Layout, hparams: Mapping[str, Any]) -> list[Term]:
    """The recorded method and what is recorded in the same loss: `task` first, companions last."""
    task = [Term("task", layout.task(hparams), layout.task_weight(hparams))] if layout.task else []
    companions = [Term(other, *recorded) for other, recorded in layout.companions(hparams).items()]
    return [*task, make_term(name, layout, hparams), *companions]


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first matching prefix of an official parameter name."""
    for official, ours in prefixes.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    return name


@dataclass
class Run:
    """What a case gives: unweighted losses ``term/part``, further recorded values, and leaves by their grad/ name."""

    terms: list[Term]
    losses: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]

    def value(self, output: Output) -> Tensor:
        """The sum of losses that an output stands for."""
        total = torch.zeros((), dtype=torch.float64)
        for term in self.terms:
            if term.name.startswith(output.method):
                chosen = f"{term.name}/{output.part}"
                parts = [v for k, v in self.losses.items() if k == chosen or (not output.part and k.startswith(chosen))]
                total = total + (term.weight if output.weighted else 1.0) * torch.stack(parts).sum()
        return total


class Case(Protocol):
    """A file brought into our terms."""

    golden: Golden

    def expected(self) -> Mapping[str, Output]:
        """Recorded outputs that have a counterpart, by name."""

    def run(self, changes: Mapping[str, Any]) -> Run:
        """Run with some options of the recorded method replaced."""


@dataclass
class TensorCase:
    """A case that gives a method's input tensors directly."""

    golden: Golden
    layout: Layout
    terms: list[Term] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = make_terms(self.golden.method, self.layout, self.golden.hparams)

    def expected(self) -> Mapping[str, Output]:
        """Recorded outputs that have a counterpart."""
        return {name: output for name, output in self.layout.outputs.items() if f"out/{name}" in self.golden.tensors}

    def run(self, changes: Mapping[str, Any]) -> Run:
        """Build the methods with some options replaced, and run them on fresh leaves."""
        inputs = {name: tensor.clone() for name, tensor in self.golden.group("in/").items()}
        leaves = {}
        for name, slot in self.layout.inputs.items():
            if name in inputs and slot.startswith("student."):
                leaves[f"in/{name}"] = inputs[name].requires_grad_()
        option = self.golden.option
        student, teacher = (option.outputs(self._outputs(side, inputs)) for side in ("student", "teacher"))
        draws = {ours: self.golden.tensors[f"draw/{name}"] for name, ours in self._draws().items()}
        losses = {}
        for term in self.terms:
            built = self._build(term, changes if term.name == self.golden.method else {}, student, teacher)
            parameters = dict(built.named_parameters())
            for name in self.golden.group("param/") if term.name == self.golden.method else ():
                ours = rename(name, self.layout.parameters)
                if ours in parameters:
                    leaves[f"param/{name}"] = parameters[ours]
            option.trained(built)
            parts = built(student, teacher, self.golden.target(), draws)
            losses.update({f"{term.name}/{part}": value for part, value in parts.items()})
        values = {"ori_scale": torch.tensor(self.layout.task_weight(self.golden.hparams), dtype=torch.float64)}
        return Run(self.terms, losses, values, leaves)

    def _draws(self) -> Mapping[str, str]:
        return {name: ours for name, ours in self.layout.draws.items() if f"draw/{name}" in self.golden.tensors}

    def _outputs(self, side: str, inputs: Mapping[str, Tensor]) -> Outputs:
        slots: dict[str, Tensor] = {}
        for name, slot in self.layout.inputs.items():
            if name in inputs and slot.endswith("*"):
                slots |= {f"{slot[:-1]}{index}": value for index, value in enumerate(inputs[name].unbind(1))}
            elif name in inputs:
                slots[slot] = inputs[name]
        found = {slot.partition(".")[2]: value for slot, value in slots.items() if slot.startswith(side)}
        # a method on features alone is recorded without logits
        logits = found.pop("logits", None)
        logits = next(iter(found.values())).new_zeros(1, 1) if logits is None and found else logits
        return Outputs(torch.zeros(1, 1) if logits is None else logits, found.pop("dist_logits", None), found)

    def _build(self, term: Term, changes: Mapping[str, Any], student: Outputs, teacher: Outputs) -> Method:
        built = self._new(term, changes, student, teacher)
        if term.name == self.golden.method:
            load(built, {rename(k, self.layout.parameters): v for k, v in self.golden.group("param/").items()})
        return built

    def _new(self, term: Term, changes: Mapping[str, Any], student: Outputs, teacher: Outputs) -> Method:
        classes = student.logits.shape[1]
        ours, theirs = (
            Shapes(classes, {role: tuple(tap.shape[1:]) for role, tap in outputs.taps.items()})
            for outputs in (student, teacher)
        )
        return get_method(term.name)(term.config(changes), ours, theirs, self._parts()).double()

    def _parts(self) -> dict[str, torch.nn.Module]:
        """The teacher's frozen classifier, where it is recorded."""
        if not self.layout.head:
            return {}
        state = {key: self.golden.tensors[f"in/{self.layout.head}_{key}"] for key in ("weight", "bias")}
        classes, width = state["weight"].shape
        head = torch.nn.Linear(width, classes, dtype=torch.float64).requires_grad_(False)
        load(head, state)
        return {"head": head}


def load(module: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all parameters of a module. Raises Mismatch when names or shapes differ."""
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise Mismatch(" ".join(str(error).split())) from error


def relative_error(ours: Tensor, theirs: Tensor, rounding: float = 0.0) -> float:
    """Largest absolute difference over the largest recorded magnitude; infinite when shapes differ or NaN.

    `rounding` is what storing may have changed, relative to each number; as much is not counted.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.to(theirs.device).double(), theirs.double()
    if max(ours.abs().max(), theirs.abs().max()) < NOISE:
        return 0.0
    difference = ((ours - theirs).abs() - rounding * theirs.abs()).clamp(min=0)
    error = (difference.max() / theirs.abs().max().clamp(min=FLOOR)).item()
    return error if error == error else float("inf")


def compare(case: Case) -> dict[str, float]:
    """Relative error of everything recorded that has a counterpart, by key."""
    golden, base = case.golden, case.run({})
    errors = {}
    for name, output in case.expected().items():
        run = case.run(output.options) if output.options else base
        errors[f"out/{name}"] = relative_error(run.value(output).detach(), golden.tensors[f"out/{name}"])
    for name, value in base.values.items():
        for key in (name, f"out/{name}"):
            if key in golden.tensors:
                errors[key] = relative_error(value, golden.tensors[key], SINGLE * (key in golden.single))
    if "out/loss" not in errors:
        raise Mismatch("the file holds no out/loss")
    gradients = golden.group("grad/")
    if gradients:
        base.value(Output(weighted=True)).backward()
    for name, gradient in gradients.items():
        leaf = base.leaves.get(name)
        if leaf is None:
            raise Mismatch(f"grad/{name} has no counterpart")
        ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        errors[f"grad/{name}"] = relative_error(ours, gradient)
    return errors


def open_case(golden: Golden) -> Case:
    """The case of a file: input tensors, or images through networks. Raises NotCovered."""
    if golden.method in DETECTION:
        from tests.goldens.cases_detection import open_detection

        return open_detection(golden)
    if golden.method not in method_names():
        raise NotCovered("not understood: no such method")
    if golden.method not in LAYOUTS:
        raise NotCovered("not covered")
    if golden.group("student/"):
        from tests.goldens.networks import NetworkCase

        return NetworkCase(golden)
    if golden.group("param/student/"):
        from tests.goldens.networks import DeiTCase

        return DeiTCase(golden)
    if golden.method == "scalekd":
        from tests.goldens.cases_scalekd import open_scalekd

        return open_scalekd(golden)
    if golden.method == "vkd":
        from tests.goldens.cases_vkd import VkDCase

        return VkDCase(golden, LAYOUTS["vkd"])
    return TensorCase(golden, layout_of(golden.method, golden.hparams))


def check_file(file: Path, option: Option = PLAIN) -> Row:
    """Check one file; never raises for what is wrong with the file."""
    method, case = file.parent.name, file.stem
    try:
        golden = Golden.read(file, option)
        errors = compare(open_case(golden))
    except NotCovered as reason:
        return Row(method, case, None, str(reason))
    except (Mismatch, UserError, ValidationError, SafetensorError, KeyError, ValueError, RuntimeError) as reason:
        return Row(method, case, None, f"FAILED {type(reason).__name__}: {' '.join(str(reason).split())}")
    worst = max(errors, key=lambda key: errors[key])
    status = "ok" if errors[worst] <= LIMIT else f"FAILED {worst}"
    return Row(method, case, errors[worst], status)
