from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.methods.cls_kd import ClsKD, adaptive_mean
from kd_hf.methods.manifold import Manifold
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import tiny_stages, tiny_vit
from tests.methods.build import build

BATCH, TOKENS = 3, 10
PAIRS = {"student_blocks": [0, 3], "teacher_blocks": [1, 2]}
OURS, THEIRS = ("block:0", "block:3"), ("block:1", "block:2")


def make(width=4, channels=6, method=ClsKD, **config):
    student, teacher = (dict.fromkeys(ids, (TOKENS, size)) for ids, size in ((OURS, width), (THEIRS, channels)))
    return build(method, student=student, teacher=teacher, **PAIRS, **config)


def features(width, roles, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {role: torch.randn(BATCH, TOKENS, width, dtype=torch.float64, generator=generator) for role in roles}


def run(method, student, teacher):
    outputs = [Outputs(torch.zeros(BATCH, 1), taps=value) for value in (student, teacher)]
    return method(*outputs, Target(torch.full((BATCH,), -1)), method.draw(Draws(torch.arange(BATCH))))


def combined(losses, last=4.0):
    one, two = losses
    return (one**2 + last * two**2) / (one + two)


def pairs(ours, theirs):
    return [(F.normalize(ours[o], dim=2), F.normalize(theirs[t], dim=2)) for o, t in zip(OURS, THEIRS, strict=True)]


def test_class_token_and_similarity_equal_the_formulas():
    ours, theirs = features(4, OURS), features(6, THEIRS, seed=1)
    method = make(w_cls=0.7, w_atn=1.9)
    losses = run(method, ours, theirs)
    token, similar = [], []
    for s, t in pairs(ours, theirs):
        token.append(F.mse_loss(method.projector(s[:, 0]), t[:, 0]))
        similar.append(
            F.mse_loss(torch.einsum("bd,bnd->bn", s[:, 0], s[:, 1:]), torch.einsum("bd,bnd->bn", t[:, 0], t[:, 1:]))
        )
    torch.testing.assert_close(losses["cls"], 0.7 * combined(token))
    torch.testing.assert_close(losses["atn"], 1.9 * combined(similar))


def test_relation_compares_the_class_tokens_of_the_batch_without_a_projector():
    ours, theirs = features(4, OURS), features(6, THEIRS, seed=1)
    method = make(dim_match="relation", last_w=2.5)
    assert not list(method.parameters())
    grams = [[x[:, 0] @ x[:, 0].T for x in pair] for pair in pairs(ours, theirs)]
    torch.testing.assert_close(run(method, ours, theirs)["cls"], combined([F.mse_loss(*pair) for pair in grams], 2.5))


def test_manifold_terms_are_those_of_the_method_manifold_times_beta():
    ours, theirs = features(4, OURS), features(6, THEIRS, seed=1)
    losses, alone = run(make(beta=0.5, K=11), ours, theirs), run(make(method=Manifold, K=11), ours, theirs)
    torch.testing.assert_close(
        {part: losses[part] for part in alone}, {part: value / 2 for part, value in alone.items()}
    )
    without = make(manifold=False)
    assert set(run(without, ours, theirs)) == {"cls", "atn"}
    assert not without.draw(Draws(torch.arange(BATCH)))


def test_norms_are_compared_as_shares_of_the_image():
    ours, theirs = features(4, OURS), features(6, THEIRS, seed=1)
    method = make(manifold=False, norm_distill=True, w_norm=0.3, last_w=2.0)
    lengths = [
        [F.normalize(x.norm(dim=2), dim=1) for x in (ours[o], theirs[t])] for o, t in zip(OURS, THEIRS, strict=True)
    ]
    one, two = (F.mse_loss(*pair) for pair in lengths)
    torch.testing.assert_close(run(method, ours, theirs)["norm"], 0.3 * (one + 2 * two) / 2)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_of_the_adaptive_mean(detach):
    losses = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    value = adaptive_mean(losses, factors, detach)
    value.backward()
    shares = losses.detach() / losses.detach().sum()
    flowing = 2 * factors * shares - (factors * shares**2).sum()
    torch.testing.assert_close(value.detach(), (factors * shares * losses.detach()).sum())
    torch.testing.assert_close(losses.grad, factors * shares if detach else flowing)


def test_the_flowing_gradient_turns_against_small_losses_and_the_detached_one_does_not():
    values, factors = [1.0] * 7 + [2.5], torch.tensor([1.0] * 7 + [4.0])
    signs = []
    for detach in (False, True):
        losses = torch.tensor(values, requires_grad=True)
        adaptive_mean(losses, factors, detach).backward()
        signs.append((losses.grad[:-1] < 0).all().item())
    assert signs == [True, False]


def test_the_option_reaches_both_terms():
    theirs = features(6, THEIRS, seed=1)
    gradients = []
    for detach in (False, True):
        ours = {role: value.requires_grad_() for role, value in features(4, OURS).items()}
        method = make(dim_match="relation", manifold=False, detach_weights=detach)
        losses = run(method, ours, theirs)
        gradients.append([torch.autograd.grad(losses[part], ours["block:0"], retain_graph=True)[0] for part in losses])
    for flowing, constant in zip(*gradients, strict=True):
        assert not torch.allclose(flowing, constant)


def test_a_student_equal_to_its_teacher_has_no_loss_and_a_finite_gradient():
    ours = {role: value.requires_grad_() for role, value in features(6, OURS).items()}
    theirs = {t: ours[o].detach() for o, t in zip(OURS, THEIRS, strict=True)}
    method = make(6, 6)
    assert not list(method.parameters())
    losses = run(method, ours, theirs)
    assert losses["cls"] == losses["atn"] == 0
    assert all(value < 1e-30 for value in losses.values())
    sum(losses.values()).backward()
    assert all(value.grad.abs().max() < 1e-15 for value in ours.values())


def test_a_projector_can_be_had_between_equal_widths():
    assert [name for name, _ in make(6, 6, use_projector=True).named_parameters()] == [
        f"projector.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    ]


def test_small_differences_survive_autocast():
    ours = {role: value.float() for role, value in features(64, OURS).items()}
    theirs = {t: ours[o] + 1e-3 * torch.randn(BATCH, TOKENS, 64) for o, t in zip(OURS, THEIRS, strict=True)}
    method = make(64, 64, use_projector=True, dim_match="projector").float()
    expected = run(method, ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(method, ours, theirs)
    torch.testing.assert_close(rough, expected, rtol=1e-4, atol=0)


def test_grids_need_not_be_square():
    """Three by five patches and a class token are sixteen, as many as a square of patches."""
    shapes = {f"block:{index}": (16, 4) for index in (0, 1)}
    method = build(ClsKD, student=shapes, teacher=shapes, student_blocks=[0, 1], teacher_blocks=[0, 1])
    assert method.tokens == 16


def test_what_cannot_serve_is_refused_with_the_reason():
    vit, config = tiny_vit("vit"), ClsKD.Config()
    with pytest.raises(UserError, match=r"methods\.cls_kd needs a teacher"):
        ClsKD.needs(config, vit, None)
    with pytest.raises(UserError, match=r"methods\.cls_kd\.teacher_blocks: the teacher 'cnn' has no"):
        ClsKD.needs(config, vit, tiny_stages("cnn"))
    for prefix, words in ((("cls", "dist"), "cls, dist"), ((), "none")):
        with pytest.raises(UserError, match=f"of the student 'other' have the prefix tokens: {words}.*method manifold"):
            ClsKD.needs(config, tiny_vit("other", prefix=prefix), vit)
    late = replace(vit, name="cait", block_prefix=())  # its class token is there, but joins behind these blocks
    with pytest.raises(UserError, match="of the teacher 'cait' have the prefix tokens: none"):
        ClsKD.needs(config, vit, late)
    with pytest.raises(UserError, match="17 and the teacher's 10"):
        build(ClsKD, student={"block:0": (17, 4)}, teacher={"block:0": (10, 4)}, student_blocks=[0], teacher_blocks=[0])
    with pytest.raises(UserError, match=r"methods\.cls_kd\.use_projector: .* width 4 and 6"):
        make(use_projector=False)
    with pytest.raises(ValidationError, match="set manifold: false"):
        ClsKD.Config(norm_distill=True)


def test_cost_counts_the_projector_and_the_similarities_of_the_class_tokens():
    method = make(manifold=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(method, features(4, OURS), features(6, THEIRS, seed=1))
    assert counter.get_total_flops() == 2 * BATCH * method.cost().macs
