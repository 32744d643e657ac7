"""A recorded file brought into our terms: what every kind of case gives, and the case of given input tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_hf.info import Shapes
from kd_hf.methods import get_method
from kd_hf.methods.base import Method
from kd_hf.outputs import Outputs
from tests.goldens.layout import NO_CHANGE, Layout, Output, Term, check_facts, make_terms, recorded_outputs, rename
from tests.goldens.record import Golden, Mismatch


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

    def run(self, change: Output = NO_CHANGE) -> Run:
        """Run with the options and draws of the recorded method that an output asks for."""


@dataclass
class KeyedCase(ABC):
    """A file without one total loss: each recorded tensor is compared with ours of the same key."""

    golden: Golden

    @abstractmethod
    def values(self) -> Mapping[str, Tensor]:
        """Ours, by the keys of the file; there may be more than it holds."""


@dataclass
class TensorCase:
    """A case that gives a method's input tensors directly."""

    golden: Golden
    layout: Layout
    terms: list[Term] = field(init=False)

    def __post_init__(self) -> None:
        check_facts(self.layout, self.golden, self.golden.hparams)
        self.terms = make_terms(self.golden.method, self.layout, self.golden.hparams)

    def expected(self) -> Mapping[str, Output]:
        """Recorded outputs that have a counterpart."""
        return recorded_outputs(self.golden, self.layout, self.golden.hparams)

    def run(self, change: Output = NO_CHANGE) -> Run:
        """Build the methods with some options replaced, and run them on fresh leaves."""
        recorded = self.golden.group("in/")
        inputs = {name: recorded[name].clone() for name in self.layout.inputs if name in recorded}
        leaves = {}
        for name, slot in self.layout.inputs.items():
            if name in inputs and slot.startswith("student."):
                leaves[f"in/{name}"] = inputs[name].requires_grad_()
        option = self.golden.option
        student, teacher = (option.outputs(self._outputs(side, inputs)) for side in ("student", "teacher"))
        draws = recorded_draws(self.golden, self.layout, change)
        losses: dict[str, Tensor] = {}
        values = {"ori_scale": torch.tensor(self.layout.task_weight(self.golden.hparams), dtype=torch.float64)}
        for term in self.terms:
            built = self._build(term, change, student, teacher)
            if term.name == self.golden.method:
                leaves |= self._leaves(built)
                watch(built, self.layout.modules, values)
            option.trained(built)
            parts = built(student, teacher, self.golden.target(), draws)
            losses.update({f"{term.name}/{part}": value for part, value in parts.items()})
        return Run(self.terms, losses, values, leaves)

    def _leaves(self, built: Method) -> dict[str, Tensor]:
        parameters = dict(built.named_parameters())
        names = {name: rename(name, self.layout.parameters) for name in self.golden.group("param/")}
        return {f"param/{name}": parameters[ours] for name, ours in names.items() if ours in parameters}

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

    def _build(self, term: Term, change: Output, student: Outputs, teacher: Outputs) -> Method:
        own = term.name == self.golden.method
        built = self._new(term, change.options if own else {}, student, teacher)
        if own:
            load(built, {rename(k, self.layout.parameters): v for k, v in self.golden.group("param/").items()})
        return built

    def _new(self, term: Term, changes: Mapping[str, Any], student: Outputs, teacher: Outputs) -> Method:
        classes = student.logits.shape[1]
        ours, theirs = (
            Shapes(classes, {role: tuple(tap.shape[1:]) for role, tap in outputs.taps.items()})
            for outputs in (student, teacher)
        )
        return get_method(term.name)(term.config(changes), ours, theirs, self._parts()).double()

    def _parts(self) -> dict[str, nn.Module]:
        """The teacher's frozen classifier, where it is recorded."""
        if not self.layout.head:
            return {}
        state = {key: self.golden.tensors[f"in/{self.layout.head}_{key}"] for key in ("weight", "bias")}
        classes, width = state["weight"].shape
        head = nn.Linear(width, classes, dtype=torch.float64).requires_grad_(False)
        load(head, state)
        return {"head": head}


class NormedCase(TensorCase):
    """A case whose method has BatchNorms: ``out/after/…`` is what their statistics are after the step."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further the method's buffers after the step, and what else is recorded."""
        run, buffers = super().run(change), dict(self.built.named_buffers())
        names = {name: rename(name, self.layout.parameters) for name in self.golden.group("out/after/")}
        after = {f"after/{name}": buffers[ours].clone() for name, ours in names.items() if ours in buffers}
        return replace(run, values={**run.values, **after, **self._further(run)})

    def _further(self, run: Run) -> Mapping[str, Tensor]:
        """Other recorded values."""
        return {}

    def _build(self, term: Term, change: Output, student: Outputs, teacher: Outputs) -> Method:
        self.built = super()._build(term, change, student, teacher)
        return self.built


class Draws(Mapping[str, Tensor]):
    """What a file's method drew, by our names; a draw that no method looks at stays unread."""

    def __init__(self, golden: Golden, layout: Layout, change: Output = NO_CHANGE) -> None:
        self._recorded = golden.group("draw/")
        names = {ours: name for name, ours in layout.draws.items() if name in self._recorded}
        self._names = {**names, **{ours: names[other] for ours, other in change.draws.items() if other in names}}

    def __getitem__(self, key: str) -> Tensor:
        return self._recorded[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def recorded_draws(golden: Golden, layout: Layout, change: Output = NO_CHANGE) -> Mapping[str, Tensor]:
    """The draws of a run; a plain dictionary where the run is compiled."""
    draws = Draws(golden, layout, change)
    return dict(draws) if golden.option.backend else draws


def watch(module: nn.Module, names: Mapping[str, str], values: dict[str, Tensor]) -> None:
    """Note what submodules give in the coming runs, under their recorded names."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: values.update({name: output.detach()})

    modules = dict(module.named_modules())
    for name, path in names.items():
        if path in modules:
            modules[path].register_forward_hook(hook(name))


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all parameters of a module. Raises Mismatch when names or shapes differ."""
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise Mismatch(" ".join(str(error).split())) from error
