from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing, Shapes
from kd_hf.methods.vkd import VkD, standardise, whiten
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import check_method, tiny_stages, tiny_vit

CNN, WIDER = tiny_stages("cnn"), tiny_stages("wider", (8, 10, 12, 16))
VIT, DISTILLED = tiny_vit("vit"), tiny_vit("distilled", prefix=("cls", "dist"))
STUDENT, TEACHER = {"feature": (9, 12)}, {"feature": (20, 3, 5)}


def vkd(student=STUDENT, teacher=TEACHER, **config):
    torch.manual_seed(0)
    return VkD(VkD.Config(**config), Shapes(7, student), Shapes(7, teacher), {}).double()


def inputs(seed=0, batch=6, dist=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    student = Outputs(normal(batch, 7), normal(batch, 7) if dist else None, {"feature": normal(batch, 9, 12)})
    return student, Outputs(normal(batch, 7), None, {"feature": 3 * normal(batch, 20, 3, 5) + 1})


def losses(method, student, teacher):
    return method(student, teacher, Target(torch.full((len(student.logits),), -1)), {})


def test_equations_by_hand():
    method = vkd(alpha=0.5, gamma=2)
    student, teacher = inputs()
    projected = student.taps["feature"].mean(1) @ method.projector.weight().T
    wanted = teacher.taps["feature"].mean((2, 3))
    wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    difference = (projected - wanted).abs()
    feature = torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean()
    q, p = teacher.logits.softmax(1), student.logits.softmax(1)
    found = losses(method, student, teacher)
    torch.testing.assert_close(found["feature"], 0.5 * feature)
    torch.testing.assert_close(found["logits"], 2 * (q * (q / p).log()).sum(1).mean())


def test_logits_go_to_the_distillation_head_and_features_to_patches_only():
    method = vkd()
    student, teacher = inputs(dist=True)
    sum(losses(method, student, teacher).values()).backward()
    assert student.logits.grad is None
    assert student.dist_logits.grad.any()
    prefixed = vkd(student={"feature_after_2": (11, 12)})
    tokens = torch.randn(6, 11, 12, dtype=torch.float64, requires_grad=True)
    losses(prefixed, Outputs(student.logits, None, {"feature_after_2": tokens}), teacher)["feature"].backward()
    assert not tokens.grad[:, :2].any()
    assert tokens.grad[:, 2:].abs().min() > 0


def test_a_factor_of_zero_leaves_its_part_out():
    student, teacher = inputs()
    assert losses(vkd(gamma=0), student, teacher).keys() == {"feature"}
    logits_only = vkd(alpha=0)
    assert losses(logits_only, student, teacher).keys() == {"logits"}
    assert not list(logits_only.parameters())
    with pytest.raises(UserError, match="alpha and gamma are both 0"):
        VkD.needs(VkD.Config(alpha=0, gamma=0), CNN, WIDER)


def test_normalisations():
    features = torch.randn(40, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    standard = standardise(features)
    torch.testing.assert_close(standard, F.batch_norm(features, None, None, training=True))
    white = whiten(features, 1e-9)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert white.mean(0).abs().max() < 1e-12
    assert torch.isfinite(whiten(features[:3].float(), 1e-3)).all(), "fewer images than channels"


@pytest.mark.parametrize("name", ["layer_norm", "standardise", "whiten", "none"])
def test_which_side_is_normalised(name):
    student, teacher = inputs()
    values = {
        side: losses(vkd(normalise=name, normalise_side=side), student, teacher)["feature"]
        for side in ("teacher", "both")
    }
    assert (values["teacher"] == values["both"]) == (name == "none")


def test_squared_error_of_the_paper():
    student, teacher = inputs()
    method = vkd(distance="mse", normalise="none")
    projected = student.taps["feature"].mean(1) @ method.projector.weight().T
    expected = (projected - teacher.taps["feature"].mean((2, 3))).square().mean()
    torch.testing.assert_close(losses(method, student, teacher)["feature"], expected)


@pytest.mark.parametrize("kind", ["householder", "matrix_exp", "qr"])
@pytest.mark.parametrize("truncated_signs", [False, True])
def test_weight_decay_kills_the_projection_only_where_asked_for(kind, truncated_signs):
    method = vkd(map=kind, truncated_signs=truncated_signs, gamma=0).float()
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-4, weight_decay=0.05)
    for step in range(100):
        student, teacher = inputs(step)
        leaf = student.taps["feature"].detach().float().requires_grad_()
        optimizer.zero_grad()
        losses(method, Outputs(student.logits, None, {"feature": leaf}), teacher)["feature"].backward()
        optimizer.step()
    dead = truncated_signs and kind == "householder"
    weight = method.projector.weight()
    assert bool(weight.any()) != dead
    assert bool(leaf.grad.any()) != dead
    if not dead:
        torch.testing.assert_close(weight.T @ weight, torch.eye(12), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "taps", "dist_head"),
    [
        (CNN, WIDER, ({"feature": "stage:-1"}, {"feature": "stage:-1"}), False),
        (VIT, WIDER, ({"feature": "tokens:patch"}, {"feature": "stage:-1"}), False),
        (DISTILLED, VIT, ({"feature": "tokens:patch"}, {"feature": "tokens:patch"}), True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_defaults_read_the_final_features(student, teacher, taps, dist_head):
    needs = VkD.needs(VkD.Config(), student, teacher)
    assert (dict(needs.student), dict(needs.teacher)) == taps
    assert needs.dist_head == dist_head
    assert needs.teacher_logits
    assert not needs.batch_coupled


def test_chosen_taps_and_other_classes():
    needs = VkD.needs(VkD.Config(student_tap="block:1", teacher_tap="pre_logits", gamma=0), DISTILLED, WIDER)
    assert dict(needs.student) == {"feature_after_2": "block:1"}
    assert not needs.dist_head
    others = ModelInfo("others", "torch", 5, Preprocessing(), stages=WIDER.stages)
    VkD.needs(VkD.Config(gamma=0), CNN, others)
    with pytest.raises(UserError, match="5 classes"):
        VkD.needs(VkD.Config(), CNN, others)
    with pytest.raises(UserError, match="has no named stages or tokens; give a tap"):
        VkD.needs(VkD.Config(), ModelInfo("bare", "torch", 11, Preprocessing()), WIDER)


@pytest.mark.parametrize("key", [{"alpha": -1}, {"map": "cayley"}, {"shrinkage": 0}])
def test_options_out_of_range(key):
    with pytest.raises(ValidationError):
        VkD.Config(**key)


@pytest.mark.parametrize(
    "config",
    [
        {"map": "qr", "distance": "mse"},
        {"map": "matrix_exp", "normalise": "standardise", "normalise_side": "both"},
        {"normalise": "whiten", "shrinkage": 0.1},
        {"alpha": 0.0},
        {"gamma": 0.0, "student_tap": "stage:-1", "teacher_tap": "stage:-1"},
        {"truncated_signs": True},
    ],
    ids=str,
)
def test_options_keep_the_contract(config):
    check_method(VkD, config)
    check_method(VkD, config, tiny_stages("wide", (8, 10, 12, 16)), tiny_stages("narrow"))


@pytest.mark.parametrize(("kind", "passes"), [("householder", 4), ("matrix_exp", 3), ("qr", 1)])
def test_cost_per_image(kind, passes):
    cost = vkd(map=kind).cost()
    assert cost.parameters == 12 * 20
    assert cost.macs == passes * 12 * 20
