"""OFA: heads on maps or tokens of the student's stages, and the loss that makes more of the label."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.kd import KD
from kd_hf.methods.ofa import OFA, MapHead, PatchMerging, TokenHead, enhanced
from kd_hf.testing import tiny_stages, tiny_vit
from tests.methods import straightforward as plain
from tests.methods.build import build, logits, run

LABEL = torch.tensor([0, 3, 6, 2, 2])


def taps(student, **config):
    return dict(OFA.needs(OFA.Config(**config), student, tiny_stages("teacher")).student)


def run_own(label=LABEL, **config):
    """The loss of the student's own logits, with one head beside it that is not looked at."""
    method = build(OFA, student={"map4": (4, 2, 2)}, **config)
    feature = torch.zeros(5, 4, 2, 2, dtype=torch.float64)
    return run(method, logits(), logits(seed=1), label=label, taps={"map4": feature})


@pytest.mark.parametrize("eps", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_straightforward_form_has_the_same_value_and_gradient(eps, temperature):
    method = build(OFA, student={"map4": (4, 2, 2)}, eps=eps, temperature=temperature, alpha=0.5, beta=2)
    student, teacher = logits().requires_grad_(), logits(seed=1)
    feature = torch.randn(5, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    found = run(method, student, teacher, label=LABEL, taps={"map4": feature})
    own = plain.ofa(student, teacher, LABEL, eps, temperature)
    head = plain.ofa(method.heads["map4"](feature), teacher, LABEL, eps, temperature)
    torch.testing.assert_close(found["logits"], 0.5 * own, rtol=1e-11, atol=0)
    torch.testing.assert_close(found["stage_4"], 2 * head, rtol=1e-11, atol=0)
    leaves = [student, feature, *method.parameters()]
    pairs = zip(
        torch.autograd.grad(found["logits"] + found["stage_4"], leaves),
        torch.autograd.grad(0.5 * own + 2 * head, leaves),
        strict=True,
    )
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-14)


def test_without_an_exponent_it_is_kd():
    expected = run(build(KD), logits(), logits(seed=1))["soft"]
    torch.testing.assert_close(run_own(eps=1)["logits"], expected)


def test_without_a_label_all_classes_are_treated_alike():
    q = logits().softmax(1)
    found = enhanced(q, torch.tensor([-1, 3, 6, 2, 2]), 1.5)
    torch.testing.assert_close(found[0], q[0] ** 1.5)
    torch.testing.assert_close(found[1, 3], (q[1, 3] + 1) ** 1.5 - 1)
    assert q.isfinite().all() and not torch.equal(found[1], q[1] ** 1.5)


def test_every_head_has_its_own_exponent_and_the_last_one_is_for_the_logits():
    student = {"map3": (4, 4, 4), "map4": (6, 2, 2)}
    method = build(OFA, student=student, eps=(1.0, 1.5, 2.0))
    features = {role: torch.randn(5, *shape, dtype=torch.float64) for role, shape in student.items()}
    found = run(method, logits(), logits(seed=1), label=LABEL, taps=features)
    heads = {role: method.heads[role](feature) for role, feature in features.items()}
    for name, judged, eps in (
        ("stage_3", heads["map3"], 1.0),
        ("stage_4", heads["map4"], 1.5),
        ("logits", logits(), 2.0),
    ):
        torch.testing.assert_close(found[name], plain.ofa(judged, logits(seed=1), LABEL, eps))


def test_a_large_gap_of_logits_stays_finite_in_float32():
    method = build(OFA, classes=3, student={"map4": (4, 2, 2)}).float()
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    found = run(method, student, student.detach().flip(1), label=[2], taps={"map4": torch.zeros(1, 4, 2, 2)})
    found["logits"].backward()
    assert found["logits"].isfinite() and student.grad.isfinite().all()


def test_which_features_have_a_head():
    assert taps(tiny_stages("four")) == {f"map{i}": f"stage:{i - 5}" for i in (1, 2, 3, 4)}
    assert taps(tiny_stages("three", (4, 6, 8))) == {f"map{i}": f"stage:{i - 5}" for i in (2, 3, 4)}
    assert taps(tiny_stages("five", (4, 4, 6, 8, 8))) == taps(tiny_stages("four"))
    assert taps(tiny_stages("swin", layout="NHWC")) == {f"tokens{i}": f"stage:{i - 5}" for i in (1, 2, 3, 4)}
    deep = taps(tiny_vit("vit", depth=12))
    assert deep == {f"class{i}_after_1": f"block:{b}" for i, b in ((1, 1), (2, 3), (3, 9), (4, 11))}
    shallow = taps(tiny_vit("vit", depth=4))
    assert shallow == {"class2_after_1": "block:0", "class3_after_1": "block:2", "class4_after_1": "block:3"}
    assert list(taps(tiny_vit("mixer", prefix=()))) == ["tokens2", "tokens3", "tokens4"]
    assert list(taps(tiny_vit("gap", prefix=("reg0", "reg1")))) == [f"tokens{i}_after_2" for i in (2, 3, 4)]
    named = taps(tiny_stages("four"), taps={4: "module:end", 2: "stage:2"})
    assert named == {"map2": "stage:2", "map4": "module:end"}


def test_heads_end_in_the_larger_of_both_final_widths():
    shapes = Shapes(7, {"map1": (4, 8, 8), "map4": (16, 2, 2)}), Shapes(7, {}, width=24)
    heads = OFA(OFA.Config(), *shapes, {}).heads
    assert [head[-1].in_features for head in heads.values()] == [24, 24]
    assert [block[-3].out_channels for block in list(heads["map1"])[:3]] == [8, 16, 24]
    assert OFA(OFA.Config(width=10), *shapes, {}).heads["map4"][0].out_channels == 10


def test_coupling_is_that_of_batchnorm():
    coupled = [
        OFA.needs(OFA.Config(**config), student, tiny_stages("teacher")).batch_coupled
        for student, config in (
            (tiny_stages("cnn"), {}),
            (tiny_stages("cnn"), {"taps": {4: "stage:-1"}}),
            (tiny_vit("vit"), {}),
        )
    ]
    assert coupled == [True, False, False]


@pytest.mark.parametrize(
    ("side", "merges", "left"), [(7, 0, 7), (13, 0, 13), (14, 1, 7), (16, 1, 8), (28, 2, 7), (56, 3, 7)]
)
def test_tokens_are_merged_until_seven_a_side_are_left(side, merges, left):
    head = TokenHead((4, side, side), 1, 8 if merges else 4, 3, 0)
    seen = []
    head.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    assert head(torch.randn(2, side * side, 4)).shape == (2, 3)
    assert len(head.merges) == merges and seen == [(2, left * left, 8 if merges else 4)]
    linear = [isinstance(merge.activation, torch.nn.Identity) for merge in head.merges]
    assert linear == [False] * (merges - 1) + [True] if merges > 1 else linear == [False] * merges


def test_neighbours_are_joined_column_by_column():
    tokens, merge = torch.arange(16.0).view(1, 16, 1), PatchMerging(4, 1, 4, torch.nn.Identity())
    merge.norm, merge.reduction = torch.nn.Identity(), torch.nn.Identity()
    grid = tokens.view(4, 4)
    expected = torch.stack([grid[row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=2)
    assert torch.equal(merge(tokens)[0], expected.flatten(0, 1))


def test_the_class_token_speaks_where_there_is_one_and_other_prefixes_are_left_out():
    tokens = torch.randn(2, 2 + 9, 8)
    for role, kept in (("class4_after_2", 11), ("tokens4_after_2", 9)):
        method = build(OFA, student={role: (11, 8)}).float()
        calls = []
        for part in (method.heads[role].blocks, method.heads[role].classifier):
            part.register_forward_hook(lambda module, given, output, calls=calls: calls.append((given[0], output)))
        run(method, torch.zeros(2, 7), torch.zeros(2, 7), label=[0, 1], taps={role: tokens})
        (given, output), (read, _) = calls
        assert given.shape[1] == kept
        torch.testing.assert_close(read, output[:, 0] if role.startswith("class") else output.mean(1))


@pytest.mark.parametrize(
    "head", [lambda: MapHead((4, 8, 6), 2, 12, 5), lambda: TokenHead((8, 14, 14), 2, 8, 5, 1)], ids=["map", "tokens"]
)
def test_the_cost_of_a_head_is_what_it_multiplies(head):
    from torch.utils.flop_counter import FlopCounterMode

    made = head().eval()
    for block in getattr(made, "blocks", ()):
        block.attn.fused_attn = False  # whose products the counter does not know on a CPU
    feature = torch.randn(1, 4, 8, 6) if isinstance(made, MapHead) else torch.randn(1, 197, 8)
    with FlopCounterMode(display=False) as counter:
        made(feature)
    assert made.macs == counter.get_total_flops() // 2


def test_what_has_no_head_is_refused():
    with pytest.raises(UserError, match="eps has 3 values, and 'four' has 4 stages with a head; give 5"):
        taps(tiny_stages("four"), eps=(1, 2, 3))
    with pytest.raises(ValidationError, match="`eps` has 2 values; 2 stages and the logits need one each"):
        OFA.Config(taps={1: "stage:1", 2: "stage:2"}, eps=(1, 2))
    for shape, width, prefix in (((6, 7, 7), 6, 0), ((8, 7, 7), 12, 0), ((8, 14, 14), 12, 1), ((8, 15, 15), 8, 0)):
        with pytest.raises(UserError, match=rf"no head for {shape[1]}×{shape[2]} tokens of {shape[0]} channels"):
            TokenHead(shape, 1, width, 3, prefix)
    with pytest.raises(UserError, match=r"methods\.ofa\.taps: 'bare' has no stages or blocks"):
        taps(tiny_stages("bare", ()))
