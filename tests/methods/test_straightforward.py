"""Every loss and its gradients equal its straightforward form, and stay finite where that one does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kd_hf.info import Shapes
from kd_hf.methods.cls_kd import ClsKD
from kd_hf.methods.cross_attention import CrossAttentionProjector, mimicking, without_mean
from kd_hf.methods.deit_soft import DeiTSoft
from kd_hf.methods.dist import DIST
from kd_hf.methods.dkd import DKD
from kd_hf.methods.kd import KD
from kd_hf.methods.manifold import Manifold
from kd_hf.methods.mgd import MGD
from kd_hf.methods.nkd import NKD
from kd_hf.methods.srrl import SRRL
from kd_hf.methods.uskd import USKD
from kd_hf.methods.vitkd import ViTKD
from kd_hf.methods.vkd import VkD
from kd_hf.methods.wsld import WSLD
from kd_hf.outputs import Outputs, Target
from tests.methods import straightforward as plain
from tests.methods.build import build, logits, run

LABEL = torch.tensor([0, 3, 6, 2, 2])
MIXED = 0.7 * F.one_hot(LABEL, 7).double() + 0.3 * F.one_hot(LABEL.flip(0), 7)


def features(*shape, seed=5):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agree(ours, expected, *leaves):
    """Value, and gradients of all leaves (and parameters), of two scalars."""
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=0)
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)


def total(losses):
    return torch.stack(list(losses.values())).sum()


LOGIT_LOSSES = {
    "kd": (KD, lambda s, t, y, **k: plain.kd(s, t, **k), {"temperature": 4.0}),
    "deit_soft": (DeiTSoft, lambda s, t, y, **k: plain.deit_soft(s, t, **k), {"temperature": 3.0}),
    "nkd": (NKD, plain.nkd, {"temperature": 3.0, "gamma": 3.5}),
    "dkd": (DKD, plain.dkd, {"temperature": 4.0, "alpha": 0.7, "beta": 8.0}),
    "wsld": (WSLD, plain.wsld, {"temperature": 4.0}),
}


@pytest.mark.parametrize("temperature", [1.0, None])
@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_losses_on_logits(name, temperature):
    method, form, options = LOGIT_LOSSES[name]
    options = options if temperature is None else {**options, "temperature": temperature}
    student, teacher = logits().requires_grad_(), logits(seed=1)
    losses = run(build(method, **options), student, teacher, label=LABEL)
    agree(total(losses), form(student, teacher, LABEL, **options), student)


def test_nkd_with_mixed_labels():
    student, teacher = logits().requires_grad_(), logits(seed=1)
    losses = run(build(NKD), student, teacher, label=LABEL, soft=MIXED)
    agree(total(losses), plain.nkd(student, teacher, MIXED), student)


@pytest.mark.parametrize("mixed", [False, True])
def test_uskd(mixed):
    method, student, feature = build(USKD, student={"pooled": (4,)}), logits().requires_grad_(), features(5, 4)
    losses = run(method, student, label=LABEL, soft=MIXED if mixed else None, taps={"pooled": feature})
    expected = plain.uskd(student, method.weak(feature), MIXED if mixed else LABEL)
    agree(total(losses), expected, student, feature, *method.parameters())


def outputs(ours, theirs, logits_s=None, logits_t=None):
    blank = torch.zeros(2, 1, dtype=torch.float64)
    sides = (Outputs(blank if z is None else z, taps=f) for z, f in ((logits_s, ours), (logits_t, theirs)))
    return *sides, Target(torch.full((2,), -1))


def test_mgd():
    method = build(MGD, student={"feature": (4, 3, 5)}, teacher={"feature": (6, 3, 5)})
    ours, theirs, noise = features(2, 4, 3, 5), features(2, 6, 3, 5, seed=6).detach(), torch.rand(2, 6, 1, 1)
    losses = method(*outputs({"feature": ours}, {"feature": theirs}), {"mask": noise})
    expected = plain.mgd(ours, theirs, method.align, method.generation, noise)
    agree(total(losses), expected, ours, *method.parameters())


def test_srrl():
    head = torch.nn.Linear(6, 7).double().requires_grad_(False)
    shapes = Shapes(7, {"feature": (4, 3, 3)}), Shapes(7, {"feature": (6,)})
    method = SRRL(SRRL.Config(alpha=2, beta=5), *shapes, {"head": head}).double()
    ours, theirs, judged = features(2, 4, 3, 3), features(2, 6, seed=6).detach(), features(2, 7, seed=7).detach()
    losses = method(*outputs({"feature": ours}, {"feature": theirs}, logits_t=judged), {})
    expected = plain.srrl(ours, theirs, judged, method.connector, head, alpha=2, beta=5)
    agree(total(losses), expected, ours, *method.parameters())


def generated(channels=6):
    """ViTKD on 4×4 tokens with a mask token other than 0."""
    roles = ("block:0", "block:1", "high")
    sizes = {"student": dict.fromkeys(roles, (16, 4)), "teacher": dict.fromkeys(roles, (16, channels))}
    method = build(ViTKD, **sizes, mask_ratio=0.3)
    torch.nn.init.normal_(method.mask_token)
    ours = [features(2, 16, 4, seed=seed) for seed in range(3)]
    theirs = [features(2, 16, channels, seed=seed).detach() for seed in range(3, 6)]
    return method, ours, theirs, outputs(*(dict(zip(roles, side, strict=True)) for side in (ours, theirs)))


@pytest.mark.parametrize("channels", [4, 6])
def test_vitkd(channels):
    method, ours, theirs, given = generated(channels)
    noise = torch.rand(2, 16)
    learned = method.align_low, method.align_high, method.mask_token, method.generation
    expected = plain.vitkd(ours[:2], theirs[:2], ours[2], theirs[2], *learned, noise, ratio=0.3)
    agree(total(method(*given, {"noise": noise})), expected, *ours, *method.parameters())


def blocks(method, channels=6, **config):
    roles = ("block:0", "block:1")
    sizes = {"student": dict.fromkeys(roles, (10, 4)), "teacher": dict.fromkeys(roles, (10, channels))}
    method = build(method, **sizes, student_blocks=(0, 1), teacher_blocks=(0, 1), **config)
    ours = [features(2, 10, 4, seed=seed) for seed in range(2)]
    theirs = [features(2, 10, channels, seed=seed).detach() for seed in range(2, 4)]
    return method, ours, theirs, outputs(*(dict(zip(roles, side, strict=True)) for side in (ours, theirs)))


def test_manifold():
    method, ours, theirs, given = blocks(Manifold, K=7)
    chosen = [torch.randperm(20)[:7] for _ in ours]
    losses = method(*given, {f"perm.{k}": each for k, each in enumerate(chosen)})
    agree(total(losses), plain.manifold(ours, theirs, chosen), *ours)


def test_cls_kd():
    method, ours, theirs, given = blocks(ClsKD, manifold=False)
    expected = plain.cls_kd(ours, theirs, method.projector)
    agree(total(method(*given, {})), expected, *ours, *method.parameters())


def test_vkd():
    tokens, map_ = features(2, 9, 4), features(2, 6, 3, 3, seed=6).detach()
    student, teacher = logits(2).requires_grad_(), logits(2, seed=1)
    method = build(VkD, student={"feature": (9, 4)}, teacher={"feature": (6, 3, 3)}, alpha=0.5, gamma=2)
    projector = plain.orthogonal_linear(4, 6, torch.float64)
    method.projector.set_base(projector.parametrizations.weight[0].base)
    with torch.no_grad():
        method.projector.original.copy_(projector.parametrizations.weight.original)
    losses = method(*outputs({"feature": tokens}, {"feature": map_}, student, teacher), {})
    expected = plain.vkd(tokens, map_, student, teacher, projector, alpha=0.5, gamma=2)
    agree(total(losses), expected, tokens, student)


@pytest.mark.parametrize("alternative", [False, True])
def test_the_mimicking_of_scalekd_equals_the_cosine_transform(alternative):
    ours, theirs = features(2, 15, 8), features(2, 15, 8, seed=6).detach() + 3

    def view(tokens):
        return without_mean(tokens) if alternative else tokens

    found = mimicking(view(ours), F.normalize(view(theirs), dim=-1)).mean()
    agree(found, plain.mimicking(ours, theirs, (3, 5), alternative), ours)


@pytest.mark.parametrize("own_queries", [True, False])
def test_the_projector_of_scalekd(own_queries):
    ours = CrossAttentionProjector((10, 4, 6), 12, (3, 5), 3, 5.0, "batch", own_queries).double()
    expected = plain.CrossAttentionProjector(ours).double()
    feature, queries, pull = features(2, 10, 4, 6), features(2, 15, 12, seed=6), features(2, 15, 12, seed=7).detach()
    shared = [ours.conv.weight, ours.position, ours.query.weight, ours.out.bias, ours.expand.weight]
    shared += [ours.table] if own_queries else [queries]
    values = [(module(feature, None if own_queries else queries) * pull).sum() for module in (ours, expected)]
    agree(*values, feature, *shared)


CERTAIN = {"kd": KD, "nkd": NKD, "dkd": DKD, "wsld": WSLD, "deit_soft": DeiTSoft, "uskd": USKD}


@pytest.mark.parametrize("gap", [40.0, 100.0])
@pytest.mark.parametrize("name", CERTAIN)
def test_finite_and_right_where_probabilities_round_to_one_and_zero(name, gap):
    """In float32 as in float64: a target that has all, or none, of the probability of student, teacher or both."""
    ours, theirs = logits(4, scale=0.5), logits(4, seed=1, scale=0.5)
    ours[:, 0] += torch.tensor([gap, -gap, gap, -gap])
    theirs[:, 0] += torch.tensor([gap, gap, -gap, -gap])
    feature = {"pooled": features(4, 4).detach()}
    taps = feature if name == "uskd" else {}
    torch.manual_seed(0)
    method = build(CERTAIN[name], student=dict.fromkeys(taps, (4,)))
    found = {}
    for dtype in (torch.float32, torch.float64):
        student = ours.to(dtype).requires_grad_()
        given = {role: value.to(dtype) for role, value in taps.items()}
        losses = run(method.to(dtype), student, theirs.to(dtype), label=[0] * 4, taps=given)
        total(losses).backward()
        found[dtype] = [*(value.detach() for value in losses.values()), student.grad]
        assert all(torch.isfinite(value).all() for value in found[dtype])
    for single, double in zip(*found.values(), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-6)


COMPILED = [(method, {}) for method in CERTAIN.values()]
COMPILED += [
    (NKD, {"temperature": 3.0}),
    (KD, {"logit_std": True}),
    (DIST, {}),
    (Manifold, {"K": 7}),
    (ClsKD, {"K": 7}),
    (ViTKD, {}),
]


@pytest.mark.parametrize(("method", "config"), COMPILED, ids=lambda value: getattr(value, "name", str(value)))
def test_one_graph_under_compile(method, config):
    """Traced as a whole by torch.compile, without breaks; "aot_eager" runs the traced forward and backward."""
    if method in (Manifold, ClsKD):
        built, ours, _, given = blocks(method, **config)
        draws, leaves = {f"perm.{k}": torch.arange(7) for k in range(2)}, ours
    elif method is ViTKD:
        built, ours, _, given = generated()
        draws, leaves = {"noise": torch.rand(2, 16)}, ours
    else:
        built = build(method, student={"pooled": (4,)} if method is USKD else {}, **config)
        leaves, draws = [logits().requires_grad_()], {}
        taps = {"pooled": features(5, 4)} if method is USKD else {}
        given = Outputs(leaves[0], taps=taps), Outputs(logits(seed=1)), Target(LABEL)
    torch.compiler.reset()
    compiled = torch.compile(lambda: total(built(*given, draws)), backend="aot_eager", fullgraph=True)
    agree(compiled(), total(built(*given, draws)), *leaves)
