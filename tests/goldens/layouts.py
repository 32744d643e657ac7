"""How the names in recorded files map to ours: one table entry per method, nothing else is method-specific."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

HParams = Mapping[str, Any]

# constructor arguments and provenance that say nothing beyond the shapes of the tensors
IGNORED = frozenset(
    {"name", "use_this", "kind", "seed", "num_classes", "channel", "student_channels", "teacher_channels"}
)


@dataclass(frozen=True)
class Output:
    """A recorded value in our terms: a sum of losses.

    `method` is empty for the sum over all methods of the case, `part` for the sum over all parts of a method.
    `options` replace options of the method for this value only.
    """

    method: str = ""
    part: str = ""
    weighted: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


LOSS = Output(weighted=True)


@dataclass(frozen=True)
class Layout:
    """Official names of one method → ours."""

    options: Mapping[str, str] = field(default_factory=dict)  # hyper-parameter → option
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options that the recorded revision implies
    weight: str | None = None  # hyper-parameter that the recipe's weight holds
    task: Callable[[HParams], Mapping[str, Any]] | None = None  # options of `task` where its loss is recorded too
    task_weight: Callable[[HParams], float] = lambda hparams: 1.0
    inputs: Mapping[str, str] = field(default_factory=dict)  # in/… → "side.field" or "side.<role>"
    parameters: Mapping[str, str] = field(default_factory=dict)  # prefix of param/… → prefix of ours
    draws: Mapping[str, str] = field(default_factory=dict)  # draw/… → ours
    outputs: Mapping[str, Output] = field(default_factory=dict)  # out/… → ours
    ignored: frozenset[str] = frozenset()


LOGITS = {"logit_s": "student.logits", "logit_t": "teacher.logits"}
DEIT_LOGITS = {
    "student_logits": "student.logits",
    "student_logits_kd": "student.dist_logits",
    "teacher_logits": "teacher.logits",
}


def _without_alpha(hparams: HParams) -> float:
    return 1 - hparams["alpha"]


def _smoothing(hparams: HParams) -> Mapping[str, Any]:
    """The base criterion of the DeiT family; soft targets come smoothed already."""
    smoothed = hparams.get("base_criterion") == "label_smoothing_ce"
    return {"label_smoothing": hparams["smoothing"] if smoothed else 0.0}


def _deit(name: str, options: Mapping[str, str], unused: set[str]) -> Layout:
    return Layout(
        options=options,
        weight="alpha",
        task=_smoothing,
        task_weight=_without_alpha,
        inputs=DEIT_LOGITS,
        outputs={"loss": LOSS, "base_loss": Output("task"), "distillation_loss": Output(name)},
        ignored=frozenset({"base_criterion", "smoothing", "dist_token", "distillation_type"} | unused),
    )


LAYOUTS: Mapping[str, Layout] = {
    "kd": Layout(
        options={"temp": "temperature"},
        weight="alpha",
        task_weight=_without_alpha,
        inputs=LOGITS,
        outputs={"loss": LOSS},
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
    "wsld": Layout(options={"temp": "temperature"}, weight="alpha", inputs=LOGITS, outputs={"loss": LOSS}),
    "nkd": Layout(
        options={"temp": "temperature", "gamma": "gamma"},
        inputs=LOGITS,
        outputs={"loss": LOSS, "target": Output("nkd", "target"), "nontarget": Output("nkd", "nontarget")},
    ),
    "uskd": Layout(
        options={"alpha": "alpha", "beta": "beta", "mu": "mu"},
        fixed={"rank": "log_softmax"},
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
    "mgd": Layout(
        options={"lambda_mgd": "mask_ratio"},
        weight="alpha_mgd",
        inputs={"fea_s": "student.feature", "fea_t": "teacher.feature"},
        draws={"rand0": "mask"},
        outputs={"loss": LOSS},
    ),
    "deit_soft": _deit("deit_soft", {"tau": "temperature", "reduction": "reduction"}, set()),
    "deit_hard": _deit("deit_hard", {}, {"tau", "reduction"}),
}
