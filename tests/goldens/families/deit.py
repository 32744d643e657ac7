"""The DeiT family: soft and hard distillation of logits, manifold distillation and [CLS]-KD on top of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_hf.info import ModelInfo
from kd_hf.methods.cls_kd import ClsKD
from kd_hf.methods.losses import unit
from tests.goldens.case import Case, TensorCase
from tests.goldens.families.logits import without_alpha
from tests.goldens.layout import (
    LOSS,
    Companions,
    HParams,
    Layout,
    Output,
    Term,
    check_facts,
    make_terms,
    recorded_outputs,
)
from tests.goldens.networks import Feature, NetworkCase
from tests.goldens.record import Golden, Mismatch

LOGITS = {
    "student_logits": "student.logits",
    "student_logits_kd": "student.dist_logits",
    "teacher_logits": "teacher.logits",
}
RELATIONS = ("sample", "patch", "rand")
MANIFOLD = {"s_id": "student_blocks", "t_id": "teacher_blocks", "K": "K"} | {
    f"w_{part}": f"w_{part}" for part in RELATIONS
}
BLOCKS = {f"{side}_feats.{index}": f"{side}.block:{index}" for side in ("student", "teacher") for index in range(48)}
PERMUTATIONS = {f"perm.{pair}": f"perm.{pair}" for pair in range(48)}
PARTS = {
    "loss": LOSS,
    "loss_base": Output("task", weighted=True),
    "loss_dist": Output("deit_", weighted=True),
}


def criterion(name: str, hparams: HParams) -> Mapping[str, Any]:
    """Options of `task` for a base criterion; soft targets come smoothed already. Raises Mismatch."""
    if name == "label_smoothing_ce":
        return {"label_smoothing": hparams["smoothing"]}
    # the binary one sees a class as present when it has any share
    binary = {"loss": "bce", "bce_threshold": 0.0}
    options: Mapping[str, Mapping[str, Any]] = {"soft_target_ce": {}, "ce": {}, "bce": binary}
    if name not in options:
        raise Mismatch(f"unknown base criterion '{name}'")
    return options[name]


def _base(hparams: HParams) -> Mapping[str, Any]:
    return criterion(hparams["base_criterion"], hparams)


def _companion(hparams: HParams) -> Companions:
    """The logit distillation that methods of this family come with."""
    kind, alpha = hparams["distillation_type"], hparams["alpha"]
    if kind == "none":
        return {}
    return {f"deit_{kind}": ({"temperature": hparams["tau"]} if kind == "soft" else {}, alpha)}


def _two_heads(golden: Golden) -> bool:
    """Whether the student has a distillation token."""
    if "student" in golden.hparams:
        return golden.hparams["student"]["family"] == "vit_distilled"
    return "in/student_logits_kd" in golden.tensors


def _alone(options: Mapping[str, float], parts: Mapping[str, tuple[str, str]], hparams: HParams) -> dict[str, Output]:
    """What single pairs of blocks give before any factor: the method with one pair and factors of 1.

    Args:
        options: factors that become 1.
        parts: name before the pair's number in ``out/…`` → method and part.
        hparams: of the file.
    """
    outputs = {}
    for k, (ours, theirs) in enumerate(zip(hparams["s_id"], hparams["t_id"], strict=True)):
        one = {"student_blocks": (ours,), "teacher_blocks": (theirs,), **options}
        draws = {"perm.0": f"perm.{k}"}
        outputs |= {f"{name}.{k}": Output(*part, options=one, draws=draws) for name, part in parts.items()}
    return outputs


def _manifold_pairs(hparams: HParams) -> dict[str, Output]:
    factors = {f"w_{part}": 1.0 for part in RELATIONS}
    return _alone(factors, {f"layer_mf_{part}": ("manifold", part) for part in RELATIONS}, hparams)


def _cls_kd_pairs(hparams: HParams) -> dict[str, Output]:
    factors = {f"w_{part}": 1.0 for part in (*RELATIONS, "cls", "atn")} | {"beta": 1.0, "last_w": 1.0}
    parts = {f"layer_mf_{part}": part for part in RELATIONS} | {f"layer_{part}": part for part in ("cls", "atn")}
    return _alone(factors, {name: ("cls_kd", part) for name, part in parts.items()}, hparams)


def _deit(name: str, options: Mapping[str, str], unused: set[str]) -> Layout:
    kind = name.removeprefix("deit_")
    return Layout(
        options=options,
        facts={"distillation_type": lambda golden: kind, "dist_token": _two_heads},
        unused=frozenset(unused),
        weight="alpha",
        task=_base,
        task_weight=without_alpha,
        inputs=LOGITS,
        outputs={"loss": LOSS, "base_loss": Output("task"), "distillation_loss": Output(name)},
    )


LAYOUTS = {
    "deit_soft": _deit("deit_soft", {"tau": "temperature", "reduction": "reduction"}, set()),
    "deit_hard": _deit("deit_hard", {}, {"tau", "reduction"}),
    "manifold": Layout(
        options=MANIFOLD,
        optional={"max_patch_num": "max_patch_num"},
        facts={"dist_token": _two_heads},
        unused=frozenset({"tau"}),  # read where the companion is soft
        weight="beta",
        task=_base,
        task_weight=without_alpha,
        companions=_companion,
        inputs={**LOGITS, **BLOCKS},
        draws=PERMUTATIONS,
        outputs={**PARTS, **{f"loss_mf_{part}": Output("manifold", part, weighted=True) for part in RELATIONS}},
        pair_outputs=_manifold_pairs,
    ),
    "manifold/manifold_merge": Layout(
        options={**MANIFOLD, "max_patch_num": "max_patch_num"},
        inputs=BLOCKS,
        draws=PERMUTATIONS,
        outputs={"loss": LOSS, **{f"mf_{part}": Output("manifold", part) for part in RELATIONS}},
        pair_outputs=_manifold_pairs,
    ),
    "cls_kd": Layout(
        options={
            **MANIFOLD,
            **{name: name for name in ("dim_match", "w_cls", "w_atn", "last_w", "manifold", "beta", "norm_distill")},
        },
        optional={"use_projector": "use_projector", "w_norm": "w_norm"},
        fixed={"detach_weights": False},
        facts={"dist_token": _two_heads},
        unused=frozenset({"tau"}),  # read where the companion is soft
        task=_base,
        task_weight=without_alpha,
        companions=_companion,
        inputs={**LOGITS, **BLOCKS},
        parameters={"projector/": "projector."},
        draws=PERMUTATIONS,
        outputs={
            **PARTS,
            **{f"loss_mf_{part}": Output("cls_kd", part) for part in RELATIONS},
            **{f"loss_{part}": Output("cls_kd", part) for part in ("cls", "atn", "norm")},
        },
        pair_outputs=_cls_kd_pairs,
    ),
}


@dataclass
class DeiTCase(NetworkCase):
    """Whole networks: one method with its companions, all weights below ``param/``."""

    images = "images"
    networks = "param/"
    logits = ("student_logits", "teacher_logits")
    dist_logits = "student_logits_kd"
    kind = "family"
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = LAYOUTS[self.golden.method]
        check_facts(self.layout, self.golden, self.golden.hparams)
        super().__post_init__()

    def _make_terms(self) -> list[Term]:
        return make_terms(self.golden.method, self.layout, self.golden.hparams)

    def expected(self) -> Mapping[str, Output]:
        """What the method's table names, where recorded."""
        return recorded_outputs(self.golden, self.layout, self.golden.hparams)

    def _features(self, side: str, info: ModelInfo) -> Mapping[str, Feature]:
        blocks = tuple(f"block:{index}" for index in range(info.depth))
        features = {f"{side}_feats.{index}": Feature((block,)) for index, block in enumerate(blocks)}
        return {**features, f"{side}_proj_cls": Feature(blocks, self._projected)}

    def _projected(self, *blocks: Tensor) -> Tensor:
        """The class tokens of all blocks ``[depth, B, 1, D_t]`` behind [CLS]-KD's projector."""
        method = self.module.methods["cls_kd"]
        assert isinstance(method, ClsKD)
        return torch.stack([method.projector(unit(tokens)[:, :1]) for tokens in blocks])

    def _recorded(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        if name != self.golden.method:
            return "param/", {}
        names = [key for key in self.golden.group("param/") if not key.startswith(("student/", "teacher/"))]
        return "param/", {key: self.golden.tensors[f"param/{key}"] for key in names}


def _open(golden: Golden) -> Case:
    """Networks where their weights are recorded, else input tensors."""
    if "student" in golden.hparams:
        golden.hparams.get("kind")
        return DeiTCase(golden)
    kind = f"{golden.method}/{golden.hparams.get('kind')}"
    return TensorCase(golden, LAYOUTS.get(kind, LAYOUTS[golden.method]))


CASES = {"manifold": _open, "cls_kd": _open}
