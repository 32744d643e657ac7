"""FitNet, AT and VID: maps of two networks that are compared one by one."""

from __future__ import annotations

from dataclasses import replace

import torch

from kd_hf.methods.vid import log_scale_of
from tests.goldens.case import Case, NormedCase, Run, TensorCase
from tests.goldens.layout import LOSS, NO_CHANGE, Layout, Output, constant
from tests.goldens.record import Golden

STAGES = range(1, 8)
MAPS = {f"feats_{side[0]}.{stage}": f"{side}.map{stage - 1}" for side in ("student", "teacher") for stage in STAGES}
UNWEIGHTED = {"loss": LOSS, "loss_unweighted": Output()}


def _stages(method: str) -> dict[str, Output]:
    return {**UNWEIGHTED, **{f"stage.{stage}": Output(method, f"stage{stage}") for stage in STAGES}}


LAYOUTS = {
    "fitnet": Layout(
        unused=frozenset({"hint_layer"}),  # where the maps were taken
        weight="feat_weight",
        inputs={"hint_s": "student.hint", "hint_t": "teacher.hint"},
        outputs=UNWEIGHTED,
    ),
    "at": Layout(options={"p": "p"}, weight="feat_weight", inputs=MAPS, outputs=_stages("at")),
    "vid": Layout(
        options={"init_pred_var": "initial_variance"},
        facts={"eps": constant(1e-5)},
        weight="feat_weight",
        inputs=MAPS,
        parameters={"": "stages."},
        outputs=_stages("vid"),
    ),
}


class VIDCase(TensorCase):
    """A case of VID, with what its variances start from."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further λ before the first step."""
        run, start = super().run(change), log_scale_of(self.golden.hparams["init_pred_var"])
        return replace(run, values={**run.values, "init_log_scale": torch.tensor(start, dtype=torch.float64)})


def _open_fitnet(golden: Golden) -> Case:
    return NormedCase(golden, LAYOUTS["fitnet"])


def _open_vid(golden: Golden) -> Case:
    return VIDCase(golden, LAYOUTS["vid"])


CASES = {"fitnet": _open_fitnet, "vid": _open_vid}
