from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kd_hf.errors import UserError
from kd_hf.info import Stage
from kd_hf.methods.uskd import CLASS_TOKEN, NORMED, POOLED, USKD
from kd_hf.testing import tiny_stages, tiny_vit
from tests.methods.build import build, logits, run

LABEL = [0, 3, 6, 2, 2]


def vectors(seed=3):
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uskd(role=POOLED, shape=(4,), **config):
    torch.manual_seed(0)
    return build(USKD, student={role: shape}, **config)


def by_hand(method, z, f, label, rank):
    """The three unweighted parts for index labels, one sample at a time."""
    p, sigma = z.softmax(1), method.weak(f).softmax(1)
    squares = torch.stack([p[n, y] ** 2 for n, y in enumerate(label)])
    parts = {"target": 0.0, "nontarget": 0.0, "weak": 0.0}
    for n, y in enumerate(label):
        v = squares[n] + 1 - squares.mean()
        parts["target"] -= v * p[n, y].log() / len(label)
        g = p[n] if rank == "softmax" else p[n].log()
        score = sigma[n] / (1 - sigma[n, y] + 1e-6) + g / (1 - g[y] + 1e-6)
        zeta = torch.zeros(z.shape[1], dtype=z.dtype)
        for place, k in enumerate(sorted(range(z.shape[1]), key=lambda k: -score[k].item())):
            zeta[k] = 0 if k == y else 1 / (place + 1)
        keep = [k for k in range(z.shape[1]) if k != y]
        parts["nontarget"] -= (zeta[keep] / zeta.sum() * z[n, keep].log_softmax(0)).sum() / len(label)
        smooth = 0.9 * F.one_hot(torch.tensor(y), z.shape[1]).double() + 0.1 / z.shape[1]
        parts["weak"] -= (smooth * sigma[n].log()).sum() / len(label)
    return parts


@pytest.mark.parametrize("rank", ["softmax", "log_softmax"])
def test_equations_by_hand(rank):
    method = uskd(rank=rank, alpha=1, beta=1, mu=1)
    parts = run(method, logits(), label=LABEL, taps={POOLED: vectors()})
    for name, expected in by_hand(method, logits(), vectors(), LABEL, rank).items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-10, atol=0, msg=name)


def test_only_the_weak_part_trains_the_weak_head_and_the_feature():
    method, z, f = uskd(), logits().requires_grad_(), vectors().requires_grad_()
    parts = run(method, z, label=LABEL, taps={POOLED: f})
    strong = torch.autograd.grad(parts["target"] + parts["nontarget"], [z, f, method.weak.weight], allow_unused=True)
    assert strong[0].any()
    assert strong[1:] == (None, None)
    parts["weak"].backward()
    assert z.grad is None
    assert f.grad.any()


def test_mixed_labels_have_two_targets():
    one, two = (F.one_hot(torch.tensor(label), 7).double() for label in (LABEL, [1, 4, 0, 5, 6]))
    z = logits()
    parts = run(uskd(), z, label=LABEL, soft=0.6 * one + 0.4 * two, taps={POOLED: vectors()})
    p = z.softmax(1)
    first, second = p[range(5), LABEL], p[range(5), [1, 4, 0, 5, 6]]
    expected = sum(-((q**2 + v - (q**2).mean()) * q.log()).mean() for q, v in ((first, 0.6), (second, 0.4)))
    torch.testing.assert_close(parts["target"], expected, rtol=1e-12, atol=0)


def test_the_second_target_of_a_pure_row_is_fixed_and_can_be_given():
    soft = F.one_hot(torch.tensor(LABEL), 7).double()
    taps = {POOLED: vectors()}
    own = run(uskd(), logits(), label=LABEL, soft=soft, taps=taps)
    first_other = [1, 0, 0, 0, 0]
    same = {"label_top2": torch.tensor([LABEL, first_other]).T}
    other = {"label_top2": torch.tensor([LABEL, [5] * 5]).T}
    assert own == run(uskd(), logits(), label=LABEL, soft=soft, taps=taps, draws=same)
    assert own["nontarget"] != run(uskd(), logits(), label=LABEL, soft=soft, taps=taps, draws=other)["nontarget"]


def test_a_sample_without_label_is_not_in_the_batch_mean_either():
    z, f = logits().requires_grad_(), vectors()
    partly = run(uskd(), z, label=[*LABEL[:4], -1], taps={POOLED: f})
    known = run(uskd(), z[:4], label=LABEL[:4], taps={POOLED: f[:4]})
    for name, value in known.items():
        torch.testing.assert_close(partly[name], value * 4 / 5, rtol=1e-12, atol=0)


def test_finite_when_the_student_is_certain():
    z = torch.tensor([[120.0, 0.0, 0.0, 1.0], [-120.0, 0.0, 0.0, 1.0]], requires_grad=True)
    method = build(USKD, classes=4, student={POOLED: (4,)}).float()
    parts = run(method, z, label=[0, 0], taps={POOLED: torch.ones(2, 4)})
    sum(parts.values()).backward()
    assert all(torch.isfinite(value) for value in parts.values())
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("student", "role", "tap"),
    [
        (tiny_stages("cnn"), POOLED, "stage:-2"),
        (tiny_stages("swin", layout="NHWC"), NORMED, "stage:-2"),
        (tiny_vit("vit", depth=12), CLASS_TOKEN, "block:5"),
        (tiny_vit("distilled", prefix=("cls", "dist")), CLASS_TOKEN, "block:1"),
        (tiny_vit("pooled", prefix=()), POOLED, "block:1"),
        (tiny_vit("shallow", depth=1), CLASS_TOKEN, "block:0"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_default_feature_of_each_family(student, role, tap):
    needs = USKD.needs(USKD.Config(), student, None)
    assert dict(needs.student) == {role: tap}
    assert needs.batch_coupled


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("resnet18", {}, {POOLED: "layer3"}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, {NORMED: "layers.2"}),
        ("deit_tiny_patch16_224", {"embed_dim": 12}, {CLASS_TOKEN: "blocks.5"}),
        ("deit_tiny_distilled_patch16_224", {"embed_dim": 12}, {CLASS_TOKEN: "blocks.5"}),
    ],
)
def test_default_feature_of_real_networks_is_the_published_one(name, kwargs, expected):
    import timm

    from kd_hf.info import Preprocessing
    from kd_hf.models.handle import describe_timm
    from kd_hf.models.taps import resolve_tap

    with torch.device("meta"):
        info = describe_timm(timm.create_model(name, **kwargs), name, Preprocessing())
    needs = USKD.needs(USKD.Config(), info, None)
    assert {role: resolve_tap(info, tap).path for role, tap in needs.student.items()} == expected


def test_a_chosen_tap_is_read_in_its_own_way():
    def role(tap, student):
        return next(iter(USKD.needs(USKD.Config(tap=tap), student, None).student))

    mixed = replace(tiny_stages("hybrid"), stages=(Stage("a", 4), Stage("b", 6, "NHWC")))
    assert [role(tap, mixed) for tap in ("stage:1", "stage:2", "stage:-1", "stage:-2")] == [
        POOLED,
        NORMED,
        NORMED,
        POOLED,
    ]
    vit = tiny_vit("vit")
    assert [role(tap, vit) for tap in ("tokens", "block:0", "tokens:patch")] == [CLASS_TOKEN, CLASS_TOKEN, POOLED]


def test_maps_and_sequences_become_vectors():
    feature = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    method = uskd(shape=(4, 3, 3))
    pooled = run(method, logits(), label=LABEL, taps={POOLED: feature})
    assert pooled["weak"] == run(method, logits(), label=LABEL, taps={POOLED: feature.flatten(2).mean(2)})["weak"]

    normed = uskd(NORMED, (4, 3, 3))
    expected = F.layer_norm(feature.permute(0, 2, 3, 1), (4,)).mean((1, 2))
    weak = run(normed, logits(), label=LABEL, taps={NORMED: feature})["weak"]
    torch.testing.assert_close(weak, run(method, logits(), label=LABEL, taps={POOLED: expected})["weak"])

    tokens = torch.randn(5, 10, 4, dtype=torch.float64)
    token = run(uskd(CLASS_TOKEN, (10, 4)), logits(), label=LABEL, taps={CLASS_TOKEN: tokens})
    assert token["weak"] == run(method, logits(), label=LABEL, taps={POOLED: tokens[:, 0]})["weak"]


def test_what_cannot_work_is_refused():
    bare = replace(tiny_stages("bare"), stages=())
    with pytest.raises(UserError, match=r"methods\.uskd\.tap: 'bare' has no stages or blocks"):
        USKD.needs(USKD.Config(), bare, None)
    with pytest.raises(UserError, match="2 are too few"):
        build(USKD, classes=2, student={POOLED: (4,)})
