"""Every method of the package keeps the public contract, and the contract's check can fail."""

from __future__ import annotations

import pytest
import torch
from pydantic import ConfigDict

from kd_hf.errors import UserError
from kd_hf.methods import get_method, method_names
from kd_hf.methods.at import AT
from kd_hf.methods.base import Method, Needs, Reference
from kd_hf.methods.cls_kd import ClsKD
from kd_hf.methods.crd import CRD
from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.dist import DIST
from kd_hf.methods.dkd import DKD
from kd_hf.methods.fitnet import FitNet
from kd_hf.methods.kd import KD
from kd_hf.methods.manifold import Manifold
from kd_hf.methods.mgd import MGD
from kd_hf.methods.nkd import NKD
from kd_hf.methods.pkt import PKT
from kd_hf.methods.rkd import RKD
from kd_hf.methods.sp import SP
from kd_hf.methods.srrl import SRRL
from kd_hf.methods.task import Task
from kd_hf.methods.uskd import USKD
from kd_hf.methods.vid import VID
from kd_hf.testing import check_method

OPTIONS = [
    (Task, {"label_smoothing": 0.1}),
    (Task, {"loss": "bce", "label_smoothing": 0.1}),
    (Task, {"loss": "bce", "bce_reduction": "sum"}),
    (KD, {"temperature": 4}),
    (DKD, {"temperature": 4, "beta": 8}),
    (NKD, {"temperature": 3, "gamma": 3.5}),
    (USKD, {"rank": "log_softmax"}),
    (USKD, {"tap": "pre_logits"}),
    (DeiTSoft, {"temperature": 3}),
    (DeiTSoft, {"reduction": "numel"}),
    (MGD, {"mask_ratio": 0.5, "student_tap": "stage:-2", "teacher_tap": "stage:-2"}),
    (SRRL, {"teacher_tap": "stage:-1", "beta": 5}),
    (SRRL, {"wiring": "last_sample"}),
    (Manifold, {"student_blocks": [3, 0], "teacher_blocks": [1, 1], "K": 10}),
    (ClsKD, {"dim_match": "relation", "detach_weights": True}),
    (ClsKD, {"manifold": False, "norm_distill": True, "last_w": 1}),
    *((method, {"logit_std": True, "temperature": 2}) for method in (KD, DKD, NKD, DIST)),
    *((method, {"gather": True}) for method in (SP, RKD, PKT, DIST)),
    (SP, {"student_tap": "stage:-2", "teacher_tap": "pre_logits"}),
    (RKD, {"squared": True, "normalise": True}),
    (RKD, {"student_tap": "stage:-1", "teacher_tap": "stage:-1"}),
    (AT, {"p": 3}),
    (VID, {"learn_variance": False, "initial_variance": 1}),
    (FitNet, {"student_tap": "stage:1", "teacher_tap": "stage:2"}),
    (CRD, {"negatives": 20, "positive": "relax"}),
    (CRD, {"negatives": 5, "replacement": True, "momentum": 0.9, "dim": 7}),
]


@pytest.mark.parametrize("name", method_names())
def test_defaults_keep_the_contract(name):
    check_method(get_method(name))


@pytest.mark.parametrize(("method", "config"), OPTIONS, ids=lambda value: getattr(value, "name", str(value)))
def test_options_keep_the_contract(method, config):
    check_method(method, config)


class Honest(Method):
    """Mean squared logits; the methods below each break one rule."""

    name = "honest"
    paper = Reference("none", "https://example.org")

    @classmethod
    def needs(cls, cfg, student, teacher):
        return Needs(teacher_logits=True)

    def forward(self, student, teacher, target, draws):
        # always float32, as a method of another package may do
        return {"square": (student.logits.float() - teacher.logits.float().detach()).square().mean()}


class LeaksToTeacher(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": (student.logits - teacher.logits).square().mean()}


class SumsTheBatch(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": student.logits.square().sum()}


class UsesGlobalRandomness(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": (student.logits * torch.rand(())).square().mean()}


class ReturnsVector(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": student.logits.square().mean(1)}


class ReturnsNan(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": student.logits.sum() * torch.nan}


class ForgetsItsParameter(Honest):
    def __init__(self, *args):
        super().__init__(*args)
        self.unused = torch.nn.Linear(3, 3)


class TakesAnything(Honest):
    class Config(Honest.Config):
        model_config = ConfigDict(extra="allow")


class RoundsToHalf(Honest):
    def forward(self, student, teacher, target, draws):
        return {"square": (1000 + student.logits.mean()) - 1000}


class IgnoresItsTap(Honest):
    @classmethod
    def needs(cls, cfg, student, teacher):
        return Needs(student={"feature": "stage:-1"}, teacher_logits=True)


class RegistersTheTeacher(Honest):
    @classmethod
    def needs(cls, cfg, student, teacher):
        return Needs(teacher_logits=True, parts=("head",))

    def __init__(self, cfg, student, teacher, parts):
        super().__init__(cfg, student, teacher, parts)
        self.head = parts["head"]


class ReadsUndeclaredLogits(Honest):
    @classmethod
    def needs(cls, cfg, student, teacher):
        return Needs(teacher={"feature": "stage:-1"})


class RefusesAll(Honest):
    @classmethod
    def needs(cls, cfg, student, teacher):
        raise UserError("no network will do")


def test_an_honest_method_passes():
    check_method(Honest)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LeaksToTeacher, "reaches the teacher"),
        (SumsTheBatch, "mean over its halves"),
        (UsesGlobalRandomness, "global generator"),
        (ReturnsVector, "not a scalar"),
        (ReturnsNan, "is nan"),
        (ForgetsItsParameter, "no gradient reaches parameter 'unused.weight'"),
        (TakesAnything, "unknown options"),
        (RoundsToHalf, "under bfloat16"),
        (IgnoresItsTap, "no gradient reaches student tap 'feature'"),
        (RegistersTheTeacher, "is registered"),
        (ReadsUndeclaredLogits, "does not declare"),
        (RefusesAll, "refuses every network.*no network will do"),
    ],
)
def test_a_broken_rule_is_named(method, message):
    with pytest.raises(AssertionError, match=message):
        check_method(method)
