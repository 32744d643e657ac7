"""Distillation of tokens: what the losses are blind to, what they see, and edge cases that must stay finite."""

from __future__ import annotations

import pytest
import torch

from kd_hf.detection.data.stage import Images
from kd_hf.detection.methods.token_matching import ViDTTokens, VkDTokens, standardise_channels
from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.detection.networks.load import describe_detector
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing, Shapes
from kd_hf.outputs import Outputs, Target
from tests.detection.tiny import batch, tiny_network

INFO = ModelInfo("vidt", "kd_hf", 5, Preprocessing())
TARGET = Target(torch.zeros(2))
LEVELS = ((3, 4), (2, 2))
ROLES = ("patch_0", "patch_1", "body", "neck")


def tokens(width=8, seed=0):
    torch.manual_seed(seed)
    taps = {f"patch_{level}": torch.randn(2, width, *size) for level, size in enumerate(LEVELS)}
    taps |= {"body": torch.randn(2, 5, width), "neck": torch.randn(2, 3, 5, width)}
    return {role: tap.double() for role, tap in taps.items()}


def masks():
    found = {}
    for level, size in enumerate(LEVELS):
        mask = torch.ones(2, *size, dtype=torch.bool)
        mask[1, :, -1] = False
        found[f"valid_{level}"] = mask
    return found


def build(method, student, teacher, **options):
    shapes = [Shapes(5, {role: tuple(tap.shape[1:]) for role, tap in taps.items()}) for taps in (student, teacher)]
    return method(method.Config(levels=len(LEVELS), **options), *shapes, {}).double()


def loss_of(method, student, teacher):
    none = torch.zeros(2, 5)
    parts = method(Outputs(none, taps=student), Outputs(none, taps=teacher), TARGET, {})
    return sum(parts.values()), parts


def channels_last(role, tap):
    return tap.movedim(1, -1) if role.startswith("patch") else tap


def test_vidt_tokens_against_the_formula():
    student, teacher = tokens(), tokens(seed=1)
    found, parts = loss_of(build(ViDTTokens, student, teacher), student, teacher)
    assert set(parts) == {"tokens"}
    total = 0.0
    for role in ROLES:
        difference = channels_last(role, student[role] - teacher[role])
        total += (difference**2).sum(-1).sqrt().mean() * (3 if role == "neck" else 1)
    torch.testing.assert_close(found, total.sqrt())


def test_vkd_tokens_against_the_formula():
    student, teacher = tokens(6), tokens(8, seed=1)
    method = build(VkDTokens, student, teacher)
    found, parts = loss_of(method, student, teacher)
    assert set(parts) == {"patch", "body", "neck"}
    total = 0.0
    for role in ROLES:
        ours, theirs = (channels_last(role, taps[role]).flatten(0, -2) for taps in (student, teacher))
        weight = method.projectors[role].projection.weight()
        torch.testing.assert_close(weight.T @ weight, torch.eye(6).double(), rtol=0, atol=1e-6)
        ours, theirs = ((rows - rows.mean(0)) / rows.std(0) for rows in (ours @ weight.T, theirs))
        total += torch.nn.functional.smooth_l1_loss(ours, theirs)
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize("map", ["auto", "qr", "householder"])
def test_vkd_undoes_a_rotation_and_any_scale_of_the_teachers_channels(map):
    student = tokens()
    method = build(VkDTokens, student, student, map=map)
    factors = 1 + torch.rand(8).double()
    teacher = {}
    for role, tap in student.items():
        rows = channels_last(role, tap) @ method.projectors[role].projection.weight().detach().T * factors + 3
        teacher[role] = rows.movedim(-1, 1) if role.startswith("patch") else rows
    torch.testing.assert_close(loss_of(method, student, teacher)[0].item(), 0.0, rtol=0, atol=1e-12)
    assert loss_of(method, student, tokens(seed=1))[0] > 1


def test_affine_parameters_do_not_learn():
    student, teacher = tokens(), tokens(seed=1)
    method = build(VkDTokens, student, teacher, affine=True)
    plain = build(VkDTokens, student, teacher)
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if not k.endswith(("scale", "bias"))})
    found = loss_of(method, student, teacher)[0]
    torch.testing.assert_close(found, loss_of(plain, student, teacher)[0])
    found.backward()
    for projector in method.projectors.values():
        assert max(projector.scale.grad.abs().max(), projector.bias.grad.abs().max()) < 1e-12
        assert projector.projection.original.grad.abs().max() > 1e-4


@pytest.mark.parametrize("method", [ViDTTokens, VkDTokens])
def test_masked_tokens_leave_the_padding_out(method):
    student, teacher, valid = {**tokens(), **masks()}, tokens(seed=1), masks()
    counting, masked = (build(method, student, teacher, masked=flag) for flag in (False, True))
    masked.load_state_dict(counting.state_dict())
    needs = method.needs(masked.cfg, INFO, INFO)
    assert needs.student["valid_1"] == "valid:1" and not any("valid" in role for role in needs.teacher)
    assert not any("valid" in role for role in method.needs(counting.cfg, INFO, INFO).student)
    before = loss_of(masked, student, teacher)[0]
    unmasked = {role: tap for role, tap in student.items() if not role.startswith("valid")}
    all_before = loss_of(counting, unmasked, teacher)[0]
    for level in range(2):
        hole = ~valid[f"valid_{level}"][:, None].expand_as(student[f"patch_{level}"])
        student[f"patch_{level}"] = student[f"patch_{level}"].masked_fill(hole, 100.0)
        unmasked[f"patch_{level}"] = student[f"patch_{level}"]
    torch.testing.assert_close(loss_of(masked, student, teacher)[0], before, rtol=0, atol=0)
    assert (loss_of(counting, unmasked, teacher)[0] - all_before).abs() > 1e-3


@pytest.mark.parametrize("method", [ViDTTokens, VkDTokens])
def test_equal_networks_and_constant_channels_stay_finite(method):
    student = tokens()
    student["body"][..., 2] = 4.0
    teacher = {role: tap.clone() for role, tap in student.items()}
    leaves = {role: tap.requires_grad_() for role, tap in student.items()}
    loss, _ = loss_of(build(method, leaves, teacher), leaves, teacher)
    loss.backward()
    assert loss.isfinite() and all(leaf.grad.isfinite().all() for leaf in leaves.values())
    constant = torch.full((4, 3), 2.0, requires_grad=True)
    standardise_channels(constant).sum().backward()
    assert constant.grad.isfinite().all()
    assert standardise_channels(torch.ones(1, 3)).abs().max() == 0


@pytest.mark.parametrize("method", [ViDTTokens, VkDTokens])
def test_gradient(method):
    student, teacher = tokens(), tokens(seed=1)
    built = build(method, student, teacher)
    leaves = [tap.requires_grad_() for tap in student.values()]

    def loss(*taps):
        return loss_of(built, dict(zip(student, taps, strict=True)), teacher)[0]

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    theirs = {role: tap.requires_grad_() for role, tap in teacher.items()}
    loss_of(built, student, theirs)[0].backward()
    assert all(tap.grad is None for tap in theirs.values())


@pytest.mark.parametrize("method", [ViDTTokens, VkDTokens])
def test_half_precision_tokens_are_compared_in_full(method):
    student, teacher = tokens(), tokens(seed=1)
    built = build(method, student, teacher).float()
    halves = [{role: tap.to(torch.bfloat16) for role, tap in taps.items()} for taps in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(built, *halves)[0]
    assert found.dtype == torch.float32
    widened = [{role: tap.float() for role, tap in taps.items()} for taps in halves]
    torch.testing.assert_close(found, loss_of(built, *widened)[0])


def test_networks_that_do_not_fit_are_refused():
    narrow, wide = tokens(6), tokens(8)
    with pytest.raises(UserError, match=r"methods.vidt_tokens: .*patch_0 tokens are 6×3×4, the teacher's 8×3×4"):
        build(ViDTTokens, narrow, wide)
    build(VkDTokens, narrow, wide)
    fewer = {**wide, "body": wide["body"][:, :4]}
    with pytest.raises(UserError, match=r"methods.vkd_tokens: .*body tokens are 5×8, the teacher's 4×8.*queries"):
        build(VkDTokens, wide, fewer)
    with pytest.raises(UserError, match="needs a teacher"):
        VkDTokens.needs(VkDTokens.Config(), INFO, None)


def test_cost():
    method = build(VkDTokens, tokens(6), tokens(8))
    cost = method.cost()
    assert cost.macs == (12 + 4 + 5 + 15) * 6 * 8
    assert cost.parameters == sum(p.numel() for p in method.parameters()) == 4 * 6 * 8
    assert ViDTTokens.weight == VkDTokens.weight == 4


@pytest.mark.parametrize("method", [ViDTTokens, VkDTokens])
def test_two_networks(method):
    """From images to a gradient in the student, through one pass of each."""
    pixels, mask = batch()
    images = Images(pixels, mask == 0)
    student, teacher = tiny_network(), tiny_network(seed=5, embed_dim=16)
    cfg = method.Config(masked=True)
    needs = method.needs(cfg, INFO, INFO)
    assert set(needs.student.values()) == {f"{kind}:{n}" for kind in ("map", "valid") for n in range(4)} | {
        "body",
        "neck",
    }
    taps = TappedDetector(student, describe_detector(student, "student"), list(needs.student.values()))(images).taps
    ours = {role: taps[tap] for role, tap in needs.student.items()}
    with torch.no_grad():
        taps = TappedDetector(teacher, describe_detector(teacher, "teacher"), list(needs.teacher.values()))(images).taps
    theirs = {role: taps[tap] for role, tap in needs.teacher.items()}
    shapes = [Shapes(5, {role: tuple(tap.shape[1:]) for role, tap in found.items()}) for found in (ours, theirs)]
    built = method(cfg, *shapes, {}).double()
    loss_of(built, ours, theirs)[0].backward()
    assert student.backbone.patch_embed.proj.weight.grad.abs().max() > 0
    assert student.decoder[1].mlp.fc2.weight.grad.abs().max() > 0
