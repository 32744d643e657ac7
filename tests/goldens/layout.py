"""How the names in a method's recorded files map to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kd_hf.methods import get_method
from kd_hf.methods.base import MethodConfig
from tests.goldens.record import Golden, Mismatch

HParams = Mapping[str, Any]
Companions = Mapping[str, tuple[Mapping[str, Any], float]]  # by method: options and weight


@dataclass(frozen=True)
class Output:
    """A recorded value in our terms: a sum of losses.

    `method` starts the method's name, so it is empty for the sum over all methods of the case; `part` is empty for
    the sum over all parts of a method.
    `options` replace options of the method for this value only, and `draws` say which recorded draw (ours → ours) it
    is given instead of another.
    """

    method: str = ""
    part: str = ""
    weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, str] = field(default_factory=dict)


LOSS = Output(weighted=True)
NO_CHANGE = Output()


@dataclass(frozen=True)
class Layout:
    """Official names of one method → ours. What a file holds beyond them is refused."""

    options: Mapping[str, str] = field(default_factory=dict)  # hyper-parameter → option
    optional: Mapping[str, str] = field(default_factory=dict)  # the same, for those that only some files have
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options that the recorded revision implies
    facts: Mapping[str, Callable[[Golden], Any]] = field(default_factory=dict)  # values that hyper-parameters must have
    unused: frozenset[str] = frozenset()  # hyper-parameters that the official loss has and does not read
    weight: str | None = None  # hyper-parameter that the recipe's weight holds
    task: Callable[[HParams], Mapping[str, Any]] | None = None  # options of `task` where its loss is recorded too
    task_weight: Callable[[HParams], float] = lambda hparams: 1.0
    companions: Callable[[HParams], Companions] = lambda hparams: {}  # methods recorded in the same loss
    inputs: Mapping[str, str] = field(default_factory=dict)  # in/… → "side.field" or "side.<role>"; "….*" unstacks
    head: str = ""  # in/<head>_weight and _bias are the teacher's classifier
    parameters: Mapping[str, str] = field(default_factory=dict)  # prefix of param/… → prefix of ours
    draws: Mapping[str, str] = field(default_factory=dict)  # draw/… → ours
    outputs: Mapping[str, Output] = field(default_factory=lambda: {"loss": LOSS})  # out/… → ours
    pair_outputs: Callable[[HParams], Mapping[str, Output]] = lambda hparams: {}  # the same of single pairs of blocks
    modules: Mapping[str, str] = field(default_factory=dict)  # out/… → module of the method whose output it is


@dataclass
class Term:
    """One method of a case with its options and its weight in the recipe."""

    name: str
    options: Mapping[str, Any]
    weight: float

    def config(self, changes: Mapping[str, Any]) -> MethodConfig:
        """The method's Config, with some options replaced."""
        return get_method(self.name).Config.model_validate({**self.options, **changes})


def make_term(name: str, layout: Layout, hparams: HParams) -> Term:
    """Translate official hyper-parameters. Raises Mismatch for missing ones."""
    expected = {*layout.options, *([layout.weight] if layout.weight else [])}
    if missing := expected - hparams.keys():
        raise Mismatch(f"hparams lack {', '.join(sorted(missing))}")
    named = {**layout.options, **layout.optional}
    options = {ours: hparams[official] for official, ours in named.items() if official in hparams}
    return Term(name, {**layout.fixed, **options}, hparams[layout.weight] if layout.weight else 1.0)


def make_terms(name: str, layout: Layout, hparams: HParams) -> list[Term]:
    """The recorded method and what is recorded in the same loss: `task` first, companions last."""
    task = [Term("task", layout.task(hparams), layout.task_weight(hparams))] if layout.task else []
    companions = [Term(other, *recorded) for other, recorded in layout.companions(hparams).items()]
    return [*task, make_term(name, layout, hparams), *companions]


def recorded_outputs(golden: Golden, layout: Layout, hparams: HParams) -> dict[str, Output]:
    """Losses that the file holds and that have a counterpart, by name."""
    named = {**layout.outputs, **layout.pair_outputs(hparams)}
    return {name: output for name, output in named.items() if f"out/{name}" in golden.tensors}


def check_facts(layout: Layout, golden: Golden, hparams: HParams) -> None:
    """Read the hyper-parameters that repeat something. Raises Mismatch where they say something else."""
    for name in layout.unused & hparams.keys():
        hparams[name]
    for name, fact in layout.facts.items():
        check_fact(hparams, name, fact(golden) if name in hparams else None)


def check_fact(hparams: HParams, name: str, value: Any) -> None:
    """Read a hyper-parameter, where there is one. Raises Mismatch when it is not `value`."""
    if name in hparams and hparams[name] != value:
        raise Mismatch(f"hparams say {name} = {hparams[name]}, the rest of the file says {value}")


def constant(value: Any) -> Callable[[Golden], Any]:
    """A fact of the official formula: the one value that a hyper-parameter may have."""
    return lambda golden: value


def size(key: str, axis: int) -> Callable[[Golden], int]:
    """A fact that a tensor's shape says too."""
    return lambda golden: golden.tensors.shape(key)[axis]


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first matching prefix of an official parameter name."""
    for official, ours in prefixes.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    return name
