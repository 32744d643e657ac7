"""Run recorded files through our methods and compare every loss, part and gradient, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_hf.methods import method_names
from tests.goldens.case import Case, KeyedCase, Run, TensorCase
from tests.goldens.families import layouts, openers
from tests.goldens.layout import NO_CHANGE, Output
from tests.goldens.networks import NetworkCase
from tests.goldens.options import PLAIN, Option
from tests.goldens.record import Golden, Mismatch, NotCovered
from tests.goldens.replay import replay
from tests.goldens.trajectory import Trajectory, is_trajectory

LIMIT = 1e-9
# Values this small are differences of numbers near 1, so their own size says nothing about rounding.
FLOOR = 1e-6
# A gradient that cancels (of a bias before BatchNorm) is recorded as the rounding of its summands.
NOISE = 1e-13
TRAJECTORIES = "trajectories"  # the folder of recorded trainings
# What rounding to float32 changes, relative to a number.
SINGLE = 2.0**-24


@dataclass(frozen=True)
class Row:
    """The outcome for one file; `error` is the worst relative error, None when nothing could be compared."""

    method: str
    case: str
    error: float | None
    status: str
    exceptions: tuple[str, ...] = ()  # what the file itself says is not as in the recipe


def passed(row: Row) -> bool:
    """Whether everything in the file agreed."""
    return row.status == "ok"


def failed(row: Row) -> bool:
    """Whether something in the file did not."""
    return row.status.startswith("FAILED")


def relative_error(ours: Tensor, theirs: Tensor, rounding: float = 0.0) -> float:
    """Largest absolute difference over the largest recorded magnitude; infinite when shapes differ or NaN.

    `rounding` is what storing may have changed, relative to each number; as much is not counted.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    if max(ours.abs().max(), theirs.abs().max()) < NOISE:
        return 0.0
    difference = ((ours - theirs).abs() - rounding * theirs.abs()).clamp(min=0)
    error = (difference.max() / theirs.abs().max().clamp(min=FLOOR)).item()
    return error if error == error else float("inf")


def compare(case: Case | KeyedCase) -> dict[str, float]:
    """Relative error of everything recorded, by key. Raises Mismatch when the file holds more than is compared."""
    if isinstance(case, KeyedCase):
        return _keyed(case)
    golden, base = case.golden, case.run()
    errors = _losses(case, base)
    for name, value in base.values.items():
        for key in (name, f"out/{name}"):
            if key in golden.tensors:
                errors[key] = relative_error(value, golden.tensors[key], SINGLE * (key in golden.single))
    if "out/loss" not in errors:
        raise Mismatch("the file holds no out/loss")
    errors |= _gradients(golden, base)
    # other ways of running do not repeat what has options of its own
    if max(errors.values()) <= LIMIT and golden.option == PLAIN and (unread := golden.unread()):
        raise Mismatch(f"nothing reads {', '.join(unread)}")
    return errors


def _keyed(case: KeyedCase) -> dict[str, float]:
    golden, values = case.golden, case.values()
    names = values.keys() & golden.tensors.keys()
    errors = {name: relative_error(values[name].detach(), golden.tensors[name]) for name in sorted(names)}
    if not errors or (unread := golden.unread()):
        raise Mismatch(f"nothing reads {', '.join(unread)}" if errors else "the file holds no tensors")
    return errors


def _losses(case: Case, base: Run) -> dict[str, float]:
    """Relative errors of the recorded losses; those under the same options share a run."""
    golden, errors = case.golden, {}
    runs: list[tuple[Output, Run]] = [(NO_CHANGE, base)]
    for name, output in case.expected().items():
        if (output.options or output.draws) and golden.option != PLAIN:
            continue
        run = next((run for o, run in runs if (o.options, o.draws) == (output.options, output.draws)), None)
        if run is None:
            run = case.run(output)
            runs.append((output, run))
        errors[f"out/{name}"] = relative_error(run.value(output).detach(), golden.tensors[f"out/{name}"])
    return errors


def _gradients(golden: Golden, base: Run) -> dict[str, float]:
    """Relative errors of the recorded gradients of the total."""
    gradients = golden.group("grad/")
    if stray := [name for name in gradients if name not in base.leaves]:
        raise Mismatch(f"grad/{', grad/'.join(stray)} has no counterpart")
    if gradients:
        base.value(Output(weighted=True)).backward()
    errors = {}
    for name, gradient in gradients.items():
        leaf = base.leaves[name]
        ours = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        errors[f"grad/{name}"] = relative_error(ours, gradient)
    return errors


def open_case(golden: Golden) -> Case | KeyedCase:
    """The case of a file. Raises NotCovered when there is no such method."""
    tables, method = layouts(), golden.method
    opener = openers().get(method)
    if opener is not None:
        return opener(golden)
    if method not in tables:
        raise NotCovered("no table for this method" if method in method_names() else "method not there")
    if golden.group("student/"):
        return NetworkCase(golden)
    kind = f"{method}/{golden.hparams['kind']}" if "kind" in golden.hparams else method
    return TensorCase(golden, tables.get(kind, tables[method]))


def runs_with(file: Path, option: Option) -> bool:
    """Whether an option is for a file: trainings are replayed as they were recorded."""
    return option == PLAIN or file.parent.name != TRAJECTORIES


def check_file(file: Path, option: Option = PLAIN) -> Row:
    """Check one file; never raises for what is wrong with the file."""
    method, case, exceptions = file.parent.name, file.stem, ()
    try:
        if method == TRAJECTORIES or is_trajectory(file):
            differences = replay(Trajectory.read(file))
            errors, exceptions = differences.errors, tuple(differences.exceptions)
        else:
            errors = compare(open_case(Golden.read(file, option)))
    except NotCovered as reason:
        return Row(method, case, None, str(reason))
    except Exception as reason:  # whatever a file holds, the others are checked too
        return Row(method, case, None, f"FAILED {type(reason).__name__}: {' '.join(str(reason).split())}")
    worst = max(errors, key=lambda key: errors[key])
    status = "ok" if errors[worst] <= LIMIT else f"FAILED {worst}"
    return Row(method, case, errors[worst], status, exceptions)
