"""Logits matched at other temperatures than one of both networks: TTM, WTTM, CTKD, MLKD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_hf.methods.base import Method
from kd_hf.methods.ctkd import CTKD
from kd_hf.outputs import Outputs
from tests.goldens.case import Case, Run, TensorCase
from tests.goldens.families.logits import LOGITS
from tests.goldens.layout import LOSS, NO_CHANGE, HParams, Layout, Output, Term
from tests.goldens.record import Golden

SIDES = ("student", "teacher")
STRONG = {f"logit_{side[0]}_strong": f"{side}.strong" for side in SIDES}


def _other(name: str) -> Callable[[HParams], Mapping[str, tuple[Mapping[str, Any], float]]]:
    """The twin whose loss is recorded beside a method's own."""
    return lambda hparams: {name: ({"gamma": hparams["ttm_l"]}, 0.0)}


def _matching(twin: str) -> Layout:
    return Layout(
        options={"ttm_l": "gamma"},
        weight="beta",
        companions=_other(twin),
        inputs=LOGITS,
        outputs={"loss": LOSS, "ttm_unweighted": Output("ttm"), "wttm_unweighted": Output("wttm")},
    )


LAYOUTS = {
    "ttm": _matching("wttm"),
    "wttm": _matching("ttm"),
    "ctkd": Layout(
        options={"kind": "kind", "t_start": "t_start", "t_end": "t_end"},
        optional={"dkd_alpha": "alpha", "dkd_beta": "beta"},
        weight="weight",
        inputs=LOGITS,
        parameters={"global_T": "level"},
        outputs={"loss": LOSS, "loss_unweighted": Output()},
    ),
    "mlkd": Layout(
        options={"temperature": "temperature", "logit_stand": "logit_std"},
        fixed={"wiring": "as_executed"},
        weight="kd_weight",
        inputs={**{f"logit_{side[0]}_weak": f"{side}.logits" for side in SIDES}, **STRONG},
        outputs={
            "loss": LOSS,
            "loss_kd": Output("mlkd", "kd", weighted=True),
            "loss_cc": Output("mlkd", "class", weighted=True),
            "loss_bc": Output("mlkd", "batch", weighted=True),
        },
    ),
}


class CTKDCase(TensorCase):
    """CTKD at a recorded λ."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further T."""
        run = super().run(change)
        return replace(run, values={**run.values, "temperature": self.temperature})

    def _build(self, term: Term, change: Output, student: Outputs, teacher: Outputs) -> Method:
        built = super()._build(term, change, student, teacher)
        assert isinstance(built, CTKD)
        reversal = torch.tensor(self.golden.hparams["lambda"], dtype=torch.float64)
        built.register_forward_pre_hook(lambda module, given: (*given[:3], {**given[3], "reversal": reversal}))
        self.temperature = built.temperature(reversal).detach()
        return built


class MLKDCase(TensorCase):
    """MLKD on logits of two views, with the loss on labels of both beside it."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further the weighted cross-entropy of the recipe."""
        run, inputs = super().run(change), self.golden.group("in/")
        views = [F.cross_entropy(inputs[f"logit_s_{view}"], inputs["label"]) for view in ("weak", "strong")]
        return replace(run, values={**run.values, "loss_ce": self.golden.hparams["ce_weight"] * sum(views)})

    def _outputs(self, side: str, inputs: Mapping[str, Tensor]) -> Outputs:
        outputs = super()._outputs(side, inputs)
        return Outputs(outputs.logits, strong=Outputs(outputs.taps["strong"]))


def _open_ctkd(golden: Golden) -> Case:
    return CTKDCase(golden, LAYOUTS["ctkd"])


def _open_mlkd(golden: Golden) -> Case:
    return MLKDCase(golden, LAYOUTS["mlkd"])


CASES = {"ctkd": _open_ctkd, "mlkd": _open_mlkd}
