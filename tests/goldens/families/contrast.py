"""CRD: steps on two banks, whose rows and normalisers are recorded before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd_hf.info import Shapes
from kd_hf.methods import get_method
from kd_hf.methods.crd import CRD
from kd_hf.outputs import Outputs, Target
from tests.goldens.case import Run, load
from tests.goldens.layout import LOSS, NO_CHANGE, Layout, Output, check_facts, make_terms
from tests.goldens.record import Golden

# the first view is the student's
NAMES = {"memory_v1": "memory_s", "memory_v2": "memory_t", "z_v1": "z_s", "z_v2": "z_t"}

LAYOUTS = {
    "crd": Layout(
        options={"feat_dim": "dim", "nce_k": "negatives", "nce_t": "temperature", "nce_m": "momentum"},
        weight="feat_weight",
    ),
}


@dataclass(frozen=True)
class Numbered:
    """Training images of two classes in turn; which one an image is of decides nothing where negatives are given."""

    count: int

    def __len__(self) -> int:
        return self.count

    def labels(self) -> np.ndarray:
        """All labels."""
        return np.arange(self.count) % 2


@dataclass
class ContrastCase:
    """Steps of CRD on one pair of banks."""

    golden: Golden

    def __post_init__(self) -> None:
        layout = LAYOUTS["crd"]
        check_facts(layout, self.golden, self.golden.hparams)
        self.terms = make_terms("crd", layout, self.golden.hparams)

    def expected(self) -> Mapping[str, Output]:
        """The sum over steps, and every step."""
        steps = {f"loss{suffix}": Output("crd", f"step{suffix}", weighted=True) for suffix in self._suffixes()}
        return {
            **{name: output for name, output in steps.items() if f"out/{name}" in self.golden.tensors},
            "loss": LOSS,
        }

    def _suffixes(self) -> list[str]:
        hparams = self.golden.hparams
        return [f".{step}" for step in range(hparams["steps"])] if "steps" in hparams else [""]

    def run(self, change: Output = NO_CHANGE) -> Run:
        """Build the method with the recorded banks, and take the steps one after the other."""
        inputs, option = self.golden.group("in/"), self.golden.option
        first = self._suffixes()[0]
        built = self._build(*(inputs[f"pooled_{side}{first}"].shape[1] for side in ("s", "t")))
        state = self.golden.group("param/")
        parameters = dict(built.named_parameters())
        load(built, {**built.state_dict(), **{name: state[name] for name in state}, **self._memory(inputs)})
        leaves = {f"param/{name}": parameters[name] for name in state}
        option.trained(built)
        losses: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for suffix in self._suffixes():
            pooled = inputs[f"pooled_s{suffix}"].clone().requires_grad_()
            leaves[f"in/pooled_s{suffix}"] = pooled
            parts = built(*self._step(pooled, suffix))
            losses[f"crd/step{suffix}"] = torch.stack(list(parts.values())).sum()
            for official, ours in NAMES.items():
                values[f"{official}{suffix}"] = getattr(built, ours).clone()
        return Run(self.terms, losses, values, leaves)

    def _step(self, pooled: Tensor, suffix: str) -> tuple[Outputs, Outputs, Target, Mapping[str, Tensor]]:
        draws, blank = self.golden.group("draw/"), pooled.new_zeros(len(pooled), 1)
        index, theirs = draws[f"index{suffix}"], self.golden.group("in/")[f"pooled_t{suffix}"]
        target = Target(torch.zeros_like(index), None, index)
        outputs = (Outputs(blank, taps={"feature": pooled}), Outputs(blank, taps={"feature": theirs}))
        return *outputs, target, {"contrast_index": draws[f"contrast_index{suffix}"]}

    def _build(self, width: int, channels: int) -> CRD:
        (term,) = self.terms
        student = Shapes(2, {"feature": (width,)}, samples=Numbered(self.golden.hparams["num_data"]))
        built = get_method("crd")(term.config({}), student, Shapes(2, {"feature": (channels,)}), {}).double()
        assert isinstance(built, CRD)
        return built

    def _memory(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Banks and normalisers before the first step."""
        scalars = {NAMES[f"z_{view}"]: self.golden.hparams[f"z_{view}"] for view in ("v1", "v2")}
        banks = {NAMES[f"memory_{view}"]: inputs[f"memory_{view}"] for view in ("v1", "v2")}
        return banks | {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}


CASES = {"crd": ContrastCase}
