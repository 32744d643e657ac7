"""KD and DKD of standardised logits."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from kd_hf.methods.losses import standardised
from tests.goldens.case import Case, Run, TensorCase
from tests.goldens.families.logits import LOGITS
from tests.goldens.layout import NO_CHANGE, Layout, Output
from tests.goldens.record import Golden, Mismatch

LAYOUTS = {
    "logit_std/kd": Layout(
        options={"temperature": "temperature", "logit_stand": "logit_std"},
        inputs=LOGITS,
    ),
    "logit_std/dkd": Layout(
        options={"temperature": "temperature", "logit_stand": "logit_std", "alpha": "alpha", "beta": "beta"},
        inputs=LOGITS,
    ),
}


class StandardisedCase(TensorCase):
    """KD or DKD of standardised logits, with the logits themselves and the loss on labels beside it.

    What is recorded of KD is the divergence: ours less a constant, T² times the teacher's entropy.
    """

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further the standardised logits, and the weighted cross-entropy of the recipe."""
        run, inputs, hparams = super().run(change), self.golden.group("in/"), self.golden.hparams
        values = {f"normalized_{side}": standardised(inputs[f"logit_{side}"]) for side in ("s", "t")}
        losses = dict(run.losses)
        if "kd/soft" in losses:
            temperature = hparams["temperature"]
            reference = values["normalized_t"] if hparams["logit_stand"] else inputs["logit_t"]
            entropy = torch.distributions.Categorical(logits=reference / temperature).entropy().mean()
            losses["kd/soft"] = losses["kd/soft"] - temperature**2 * entropy
        values["loss_ce"] = hparams["ce_weight"] * F.cross_entropy(inputs["logit_s"], inputs["label"])
        return replace(run, losses=losses, values={**run.values, **values})


def _open_standardised(golden: Golden) -> Case:
    hparams, kind = golden.hparams, golden.hparams["kind"]
    if kind not in ("kd", "dkd"):
        raise Mismatch(f"unknown kind '{kind}'")
    ramp = min(hparams["epoch"] / hparams["warmup"], 1.0) if "warmup" in hparams else 1.0
    case = StandardisedCase(replace(golden, method=kind), LAYOUTS[f"logit_std/{kind}"])
    case.terms = [replace(term, weight=hparams["kd_weight"] * ramp) for term in case.terms]
    return case


CASES = {"logit_std": _open_standardised}
