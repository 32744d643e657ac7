"""Features that classifiers read, the networks' own or new ones: SDD, OFA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_hf.methods.base import Method
from kd_hf.methods.ofa import LAST
from kd_hf.methods.sdd import GRID, STUDENT_HEAD
from kd_hf.outputs import Outputs
from tests.goldens.case import Case, NormedCase, Run, TensorCase, load
from tests.goldens.families.logits import LOGITS
from tests.goldens.families.pre_activations import ramp
from tests.goldens.layout import LOSS, NO_CHANGE, Layout, Output, Term, check_fact
from tests.goldens.record import Golden

SIDES = ("student", "teacher")
LAYOUTS = {
    "sdd": Layout(
        options={"kind": "kind", "temperature": "temperature"},
        optional={"alpha": "alpha", "beta": "beta", "gamma": "gamma"},
        fixed={"nontarget": "all"},  # as the official code is
        unused=frozenset({"warmup", "epoch"}),  # by SDD-KD
        inputs={f"{kind}_{side[0]}": f"{side}.feature" for kind in ("patch", "feature") for side in SIDES},
    ),
    "ofa": Layout(
        options={"ofa_temperature": "temperature", "kd_loss_weight": "alpha", "ofa_loss_weight": "beta"},
        outputs={"loss": LOSS, "loss_kd": Output("ofa", "logits")},
    ),
}


class SDDCase(TensorCase):
    """SDD on maps and both classifiers, or on the logits ``[B, K, R]`` of regions."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further the logits of regions."""
        run = super().run(change)
        if self._on_regions:
            return run
        inputs, regions = self.golden.group("in/"), {}
        for name, head, side in (("patch_s", STUDENT_HEAD, "s"), ("patch_t", "head", "t")):
            regions[name] = self.built.regions(head, inputs[f"feature_{side}"]).transpose(1, 2).detach()
        leaves = {f"in/student_fc_{name}": value for name, value in self.built.parts[STUDENT_HEAD].named_parameters()}
        return replace(run, values={**run.values, **regions}, leaves={**run.leaves, **leaves})

    @property
    def _on_regions(self) -> bool:
        return "in/patch_s" in self.golden.tensors

    def _parts(self) -> dict[str, nn.Module]:
        inputs, parts = self.golden.group("in/"), {}
        for name, side in ((STUDENT_HEAD, "student"), ("head", "teacher")):
            if self._on_regions:
                parts[name] = nn.Linear(1, self.golden.tensors.shape("in/patch_s")[1], dtype=torch.float64)
                continue
            state = {key: inputs[f"{side}_fc_{key}"] for key in ("weight", "bias")}
            parts[name] = nn.Linear(*reversed(state["weight"].shape), dtype=torch.float64)
            load(parts[name], state)
        return parts

    def _new(self, term: Term, changes: Mapping[str, Any], student: Outputs, teacher: Outputs) -> Method:
        if not self._on_regions:
            self.built = super()._new(term, changes, student, teacher)
            return self.built
        single = Outputs(student.logits, taps={"feature": student.logits.new_zeros(1, 1, GRID, GRID)})
        self.built = super()._new(term, changes, single, single)
        # what the classifiers would have given
        self.built.regions = lambda head, feature: feature.transpose(1, 2)
        return self.built


def _open_sdd(golden: Golden) -> Case:
    hparams = golden.hparams
    case = SDDCase(golden, LAYOUTS["sdd"])
    factor = hparams["kd_weight"] if hparams["kind"] == "kd" else ramp(hparams, hparams["epoch"])
    scales = {"scales": json.loads(hparams["M"])}
    case.terms = [replace(term, weight=factor, options={**term.options, **scales}) for term in case.terms]
    return case


class OFACase(NormedCase):
    """OFA; the file has one sum for all heads."""

    def _further(self, run: Run) -> Mapping[str, Tensor]:
        heads = [value.detach() for name, value in run.losses.items() if name.startswith("ofa/stage_")]
        return {"loss_ofa": torch.stack(heads).sum()}


def _open_ofa(golden: Golden) -> Case:
    hparams, stages = golden.hparams, golden.hparams["ofa_stage"]
    shapes = {stage: golden.tensors.shape(f"in/feat_s.{stage}") for stage in stages}
    prefix = hparams.get("num_tokens", 0)
    inputs, parameters, patches = {}, {}, {}
    on_maps = all(len(shape) == 4 for shape in shapes.values())
    for stage, shape in shapes.items():
        role = f"map{stage}" if on_maps else f"class{stage}_after_{prefix}" if prefix else f"tokens{stage}"
        inputs[f"feat_s.{stage}"] = f"student.{role}"
        names = {f"{block}.op.": f"{block}." for block in range(LAST - stage)} if on_maps else TOKEN_HEAD
        parameters |= {f"projector.{stage}.{name}": f"heads.{role}.{ours}" for name, ours in {**names, "": ""}.items()}
        patches[str(stage)] = list(shape[1:]) if on_maps else [shape[1] - prefix, shape[2]]
    for stage, shape in patches.items():
        check_fact(hparams["stage_shape"], stage, shape)
    widths, eps = [hparams["feature_dim_s"], hparams["feature_dim_t"]], hparams["ofa_eps"]
    layout = replace(
        LAYOUTS["ofa"],
        fixed={"eps": tuple(eps) if len(eps) > 1 else eps[0], "width": max(widths) if on_maps else widths[0]},
        inputs={**LOGITS, **inputs},
        parameters=parameters,
    )
    return OFACase(golden, layout)


# of the head on tokens, in the order of its four steps
TOKEN_HEAD = {"0.fn.": "merges.", "1.": "blocks.", "3.": "classifier."}


CASES = {"sdd": _open_sdd, "ofa": _open_ofa}
