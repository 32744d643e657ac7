"""How the names in recorded files map to ours: one table entry per method, nothing else is method-specific."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

HParams = Mapping[str, Any]
Companions = Mapping[str, tuple[Mapping[str, Any], float]]  # by method: options and weight

# constructor arguments and provenance that say nothing beyond the shapes of the tensors
IGNORED = frozenset(
    {"name", "use_this", "kind", "seed", "num_classes", "channel", "student_channels", "teacher_channels"}
)


@dataclass(frozen=True)
class Output:
    """A recorded value in our terms: a sum of losses.

    `method` starts the method's name, so it is empty for the sum over all methods of the case; `part` is empty for
    the sum over all parts of a method.
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
    optional: Mapping[str, str] = field(default_factory=dict)  # the same, for those that only some files have
    fixed: Mapping[str, Any] = field(default_factory=dict)  # options that the recorded revision implies
    weight: str | None = None  # hyper-parameter that the recipe's weight holds
    task: Callable[[HParams], Mapping[str, Any]] | None = None  # options of `task` where its loss is recorded too
    task_weight: Callable[[HParams], float] = lambda hparams: 1.0
    companions: Callable[[HParams], Companions] = lambda hparams: {}  # methods recorded in the same loss
    inputs: Mapping[str, str] = field(default_factory=dict)  # in/… → "side.field" or "side.<role>"; "….*" unstacks
    head: str = ""  # in/<head>_weight and _bias are the teacher's classifier
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


def _vkd_task(hparams: HParams) -> Mapping[str, Any]:
    """The base criterion of VkD."""
    smoothed = hparams["criterion"] == "label_smoothing_ce"
    return {"label_smoothing": hparams["smoothing"] if smoothed else 0.0}


def _deit_companion(hparams: HParams) -> Companions:
    """The logit distillation that methods of the DeiT family come with."""
    kind = hparams["distillation_type"]
    if kind == "none":
        return {}
    return {f"deit_{kind}": ({"temperature": hparams["tau"]} if kind == "soft" else {}, hparams["alpha"])}


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


RELATIONS = ("sample", "patch", "rand")
DEIT_RECIPE = frozenset({"alpha", "tau", "distillation_type", "base_criterion", "smoothing", "dist_token"})
DEIT_NETWORKS = frozenset({"img_size", "patch_size", "student", "teacher"})
DEIT_PARTS = {
    "loss": LOSS,
    "loss_base": Output("task", weighted=True),
    "loss_dist": Output("deit_", weighted=True),
}
MANIFOLD = {"s_id": "student_blocks", "t_id": "teacher_blocks", "K": "K"} | {
    f"w_{part}": f"w_{part}" for part in RELATIONS
}
BLOCKS = {f"{side}_feats.{index}": f"{side}.block:{index}" for side in ("student", "teacher") for index in range(24)}
PERMUTATIONS = {f"perm.{pair}": f"perm.{pair}" for pair in range(24)}

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
    "srrl": Layout(
        options={"alpha": "alpha", "beta": "beta"},
        inputs={"fea_s": "student.feature", "fea_t": "teacher.feature", "logit_t": "teacher.logits"},
        head="teacher_fc",
        parameters={"Connectors.": "connector."},
        outputs={
            "loss": LOSS,
            "loss_last_sample_wiring": Output(weighted=True, options={"wiring": "last_sample"}),
            "fm_unweighted": Output("srrl", "fm", options={"alpha": 1.0}),
            "sr_unweighted": Output("srrl", "sr", options={"beta": 1.0}),
        },
    ),
    "vitkd": Layout(
        options={"alpha_vitkd": "alpha", "beta_vitkd": "beta", "lambda_vitkd": "mask_ratio"},
        inputs={
            "low_s": "student.block:*",
            "low_t": "teacher.block:*",
            "high_s": "student.high",
            "high_t": "teacher.high",
        },
        parameters={"align2.": "align_low.", "align.": "align_high."},
        draws={"rand0": "noise"},
        outputs={"loss": LOSS, "lr_weighted": Output("vitkd", "mimic"), "gen_weighted": Output("vitkd", "generation")},
        ignored=frozenset({"student_dims", "teacher_dims"}),
    ),
    "manifold": Layout(
        options=MANIFOLD,
        optional={"max_patch_num": "max_patch_num"},
        weight="beta",
        task=_smoothing,
        task_weight=_without_alpha,
        companions=_deit_companion,
        inputs={**DEIT_LOGITS, **BLOCKS},
        draws=PERMUTATIONS,
        outputs={
            **DEIT_PARTS,
            **{f"loss_mf_{part}": Output("manifold", part, weighted=True) for part in RELATIONS},
        },
        ignored=DEIT_RECIPE | DEIT_NETWORKS,
    ),
    "manifold/manifold_merge": Layout(
        options={**MANIFOLD, "max_patch_num": "max_patch_num"},
        inputs=BLOCKS,
        draws=PERMUTATIONS,
        outputs={"loss": LOSS, **{f"mf_{part}": Output("manifold", part) for part in RELATIONS}},
    ),
    "cls_kd": Layout(
        options={
            **MANIFOLD,
            **{name: name for name in ("dim_match", "w_cls", "w_atn", "last_w", "manifold", "beta", "norm_distill")},
        },
        optional={"use_projector": "use_projector", "w_norm": "w_norm"},
        fixed={"detach_weights": False},
        task=_smoothing,
        task_weight=_without_alpha,
        companions=_deit_companion,
        inputs={**DEIT_LOGITS, **BLOCKS},
        parameters={"projector/": "projector."},
        draws=PERMUTATIONS,
        outputs={
            **DEIT_PARTS,
            **{f"loss_mf_{part}": Output("cls_kd", part) for part in RELATIONS},
            **{f"loss_{part}": Output("cls_kd", part) for part in ("cls", "atn", "norm")},
        },
        ignored=DEIT_RECIPE | DEIT_NETWORKS,
    ),
    "vkd": Layout(
        options={"alpha": "alpha", "gamma": "gamma", "orthogonal_map": "map"},
        task=_vkd_task,
        inputs={
            "student_patch_tokens": "student.feature",
            "teacher_feature_map": "teacher.feature",
            "student_logits_cls": "student.logits",
            "student_logits_dist": "student.dist_logits",
            "teacher_logits": "teacher.logits",
        },
        outputs={
            "loss": LOSS,
            "xe_loss": Output("task"),
            "kl_loss": Output("vkd", "logits"),
            "repr_distill_loss": Output("vkd", "feature"),
        },
        ignored=frozenset({"criterion", "smoothing", "mixup_lambda", "kl_T", "layer_norm_eps", "smooth_l1_beta"})
        | {"student_dim", "teacher_dim", "use_trivialization"},
    ),
    "scalekd": Layout(
        parameters={
            "pos_embed": "position",
            "proj_student.0.": "conv.",
            "proj_student.1.": "conv_norm.",
            "proj_pos.0.": "query_in.",
            "pos_attention.q.": "query.",
            "pos_attention.k.": "key_value.",
            "pos_attention.proj.": "out.",
            "ffn.layers.0.0.": "expand.",
            "ffn.layers.1.": "contract.",
            "query.weight": "table",
        },
        outputs={
            "loss": LOSS,
            "ori_loss": Output("task", weighted=True),
            "loss_kd": Output("kd", weighted=True),
            "loss_spat": Output("scalekd", "s4"),
            "loss_alt": Output("scalekd", "s4_alt"),
            **{f"loss_{part}": Output("scalekd", part) for part in ("s3", "s3_alt", "s4", "s4_alt")},
        },
    ),
    "scalekd/kd": Layout(
        options={"temp": "temperature"},
        weight="alpha",
        task_weight=_without_alpha,
        inputs={"student_logits": "student.logits", "teacher_logits": "teacher.logits"},
        outputs={"loss": LOSS, "loss_kd": LOSS},
        ignored=frozenset({"classes", "batch"}),
    ),
    "deit_soft": _deit("deit_soft", {"tau": "temperature", "reduction": "reduction"}, set()),
    "deit_hard": _deit("deit_hard", {}, {"tau", "reduction"}),
}


def layout_of(method: str, hparams: HParams) -> Layout:
    """The entry for a method's files, or the one for their kind where that differs."""
    return LAYOUTS.get(f"{method}/{hparams.get('kind')}", LAYOUTS[method])
