"""Methods on features: MGD, SRRL, ViTKD."""

from __future__ import annotations

from collections.abc import Callable

from tests.goldens.layout import LOSS, Layout, Output, size
from tests.goldens.record import Golden


def _width(side: str) -> Callable[[Golden], int]:
    """Channels of ViTKD's features of one side, given as tensors or as a network."""
    key = f"in/high_{side[0]}"

    def fact(golden: Golden) -> int:
        return golden.tensors.shape(key)[-1] if key in golden.tensors else golden.hparams[side]["embed_dim"]

    return fact


CHANNELS = {"student_channels": size("in/fea_s", 1), "teacher_channels": size("in/fea_t", 1)}

LAYOUTS = {
    "mgd": Layout(
        options={"lambda_mgd": "mask_ratio"},
        facts=CHANNELS,
        weight="alpha_mgd",
        inputs={"fea_s": "student.feature", "fea_t": "teacher.feature"},
        draws={"rand0": "mask"},
    ),
    "srrl": Layout(
        options={"alpha": "alpha", "beta": "beta"},
        facts=CHANNELS,
        inputs={"fea_s": "student.feature", "fea_t": "teacher.feature", "logit_t": "teacher.logits"},
        head="teacher_fc",
        parameters={"Connectors.": "connector."},
        outputs={
            "loss": LOSS,
            "loss_last_sample_wiring": Output(weighted=True, options={"wiring": "last_sample"}),
            "fm_unweighted": Output("srrl", "fm", options={"alpha": 1.0}),
            "sr_unweighted": Output("srrl", "sr", options={"beta": 1.0}),
        },
        modules={"fea_s_connected": "connector"},
    ),
    "vitkd": Layout(
        options={"alpha_vitkd": "alpha", "beta_vitkd": "beta", "lambda_vitkd": "mask_ratio"},
        facts={"student_dims": _width("student"), "teacher_dims": _width("teacher")},
        inputs={
            "low_s": "student.block:*",
            "low_t": "teacher.block:*",
            "high_s": "student.high",
            "high_t": "teacher.high",
        },
        parameters={"align2.": "align_low.", "align.": "align_high."},
        draws={"rand0": "noise"},
        outputs={"loss": LOSS, "lr_weighted": Output("vitkd", "mimic"), "gen_weighted": Output("vitkd", "generation")},
    ),
}
