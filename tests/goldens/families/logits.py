"""Methods on logits, and the self-distillation USKD: KD, DKD, WSLD, NKD, USKD."""

from __future__ import annotations

from tests.goldens.layout import LOSS, HParams, Layout, Output, size
from tests.goldens.record import Golden

LOGITS = {"logit_s": "student.logits", "logit_t": "teacher.logits"}


def without_alpha(hparams: HParams) -> float:
    """The factor that KD leaves to the loss on labels."""
    return 1 - hparams["alpha"]


def _middle_width(golden: Golden) -> int:
    """Channels of the feature that USKD's weak classifier reads."""
    key = "in/fea_mid"
    return golden.tensors.shape(key)[1] if key in golden.tensors else golden.hparams["student"]["embed_dim"]


def _classes(golden: Golden) -> int:
    key = "in/logit_s"
    return golden.tensors.shape(key)[1] if key in golden.tensors else golden.hparams["num_classes"]


LAYOUTS = {
    "kd": Layout(
        options={"temp": "temperature"},
        weight="alpha",
        task_weight=without_alpha,
        inputs=LOGITS,
    ),
    "dkd": Layout(
        options={"temp": "temperature", "alpha": "alpha", "beta": "beta"},
        inputs=LOGITS,
        outputs={
            "loss": LOSS,
            "tckd_unweighted": Output("dkd", "tckd", options={"alpha": 1.0}),
            "nckd_unweighted": Output("dkd", "nckd", options={"beta": 1.0}),
        },
    ),
    "wsld": Layout(
        options={"temp": "temperature"}, facts={"num_classes": size("in/logit_s", 1)}, weight="alpha", inputs=LOGITS
    ),
    "nkd": Layout(
        options={"temp": "temperature", "gamma": "gamma"},
        inputs=LOGITS,
        outputs={"loss": LOSS, "target": Output("nkd", "target"), "nontarget": Output("nkd", "nontarget")},
    ),
    "uskd": Layout(
        options={"alpha": "alpha", "beta": "beta", "mu": "mu"},
        fixed={"rank": "log_softmax"},
        facts={"channel": _middle_width, "num_classes": _classes},
        inputs={**LOGITS, "fea_mid": "student.pooled"},
        parameters={"fc.": "weak."},
        draws={"label_top2": "label_top2"},
        outputs={
            "loss": LOSS,
            "loss_rev_87a7197": Output(weighted=True, options={"rank": "softmax"}),
            "target_unweighted": Output("uskd", "target", options={"alpha": 1.0}),
            "nontarget_unweighted": Output("uskd", "nontarget", options={"beta": 1.0}),
            "weak_unweighted": Output("uskd", "weak", options={"mu": 1.0}),
        },
    ),
}
