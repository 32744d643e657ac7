"""SP, RKD, PKT and DIST: losses that compare the images of a batch with each other."""

from __future__ import annotations

from tests.goldens.case import Case, TensorCase
from tests.goldens.families.logits import LOGITS
from tests.goldens.layout import LOSS, Layout, Output, constant
from tests.goldens.record import Golden

POOLED = {"pooled_s": "student.feature", "pooled_t": "teacher.feature"}
# the same methods as other code recorded them: without a weight
SIDES = {"student": "student.feature", "teacher": "teacher.feature"}
UNWEIGHTED = {"loss": LOSS, "loss_unweighted": Output()}

LAYOUTS = {
    "sp": Layout(
        weight="feat_weight",
        inputs={"feat_s": "student.feature", "feat_t": "teacher.feature"},
        outputs=UNWEIGHTED,
    ),
    "sp/sides": Layout(inputs=SIDES),
    "rkd": Layout(
        options={"distance_weight": "distance_weight", "angle_weight": "angle_weight", "squared": "squared"},
        facts={"eps": constant(1e-12)},
        weight="feat_weight",
        inputs=POOLED,
        outputs={
            "loss": LOSS,
            "distance": Output("rkd", "distance", options={"distance_weight": 1.0}),
            "angle": Output("rkd", "angle", options={"angle_weight": 1.0}),
        },
    ),
    "rkd/sides": Layout(
        options={"distance_weight": "distance_weight", "angle_weight": "angle_weight"},
        optional={"with_l2_norm": "normalise"},
        inputs=SIDES,
        outputs={"loss": LOSS, "distance": Output("rkd", "distance"), "angle": Output("rkd", "angle")},
    ),
    "pkt": Layout(weight="feat_weight", inputs=POOLED, outputs=UNWEIGHTED),
    "dist": Layout(
        options={"tau": "temperature", "beta": "beta", "gamma": "gamma"},
        weight="kd_loss_weight",
        inputs=LOGITS,
        outputs={
            "loss": LOSS,
            "inter": Output("dist", "inter", options={"beta": 1.0}),
            "intra": Output("dist", "intra", options={"gamma": 1.0}),
        },
    ),
}


def _open_sides(golden: Golden) -> Case:
    sides = golden.tensors.keys() >= {"in/student", "in/teacher"}
    return TensorCase(golden, LAYOUTS[f"{golden.method}/sides" if sides else golden.method])


CASES = {"sp": _open_sides, "rkd": _open_sides}
