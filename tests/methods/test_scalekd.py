from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from kd_hf.distillation.choices import Choice, taps_of
from kd_hf.distillation.module import DistillModule, build_methods
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing, Shapes, Stage
from kd_hf.methods.scalekd import ScaleKD
from kd_hf.models.load import load_model
from kd_hf.models.parts import live_part
from kd_hf.models.taps import TappedModel, tap_shapes
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import check_method, tiny_stages, tiny_vit

CNN, WIDER = tiny_stages("cnn"), tiny_stages("wider", (8, 10, 12, 16))
VIT, BIGGER = tiny_vit("vit", depth=12), tiny_vit("bigger", 16, 5)
BOTH = {"s3": (6, 8, 8), "s4": (8, 4, 4)}
TEACHER = {"target": (16, 4, 4), "entry": (12, 8, 8)}
NAMES = ["s3", "s3_alt", "s4", "s4_alt"]
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 2), "num_heads": (1, 1, 2, 2), "window_size": 2}


def tail():
    """A stand-in for the teacher's last stage."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(12, 16, 2, 2), nn.GELU(), nn.BatchNorm2d(16)).double().eval().requires_grad_(False)


def scalekd(student=BOTH, teacher=TEACHER, part=None, **config):
    torch.manual_seed(0)
    parts = {"after:stage:-2": part or tail()} if any(role.startswith("s3") for role in student) else {}
    shapes = Shapes(7, {k: v for k, v in teacher.items() if k == "target" or parts})
    return ScaleKD(ScaleKD.Config(**config), Shapes(7, student), shapes, parts).double()


def inputs(student=BOTH, teacher=TEACHER, batch=4):
    torch.manual_seed(1)
    logits = torch.zeros(batch, 7, dtype=torch.float64)
    taps = [
        {role: torch.randn(batch, *shape, dtype=torch.float64).requires_grad_() for role, shape in shapes.items()}
        for shapes in (student, teacher)
    ]
    return Outputs(logits, taps=taps[0]), Outputs(logits, taps=taps[1])


def losses(method, student, teacher):
    return method(student, teacher, Target(torch.zeros(len(student.logits), dtype=torch.long)), {})


def distance(tokens, target, alternative):
    if alternative:
        tokens, target = tokens - tokens.mean(1, keepdim=True), target - target.mean(1, keepdim=True)
    return (F.normalize(tokens, dim=-1) - F.normalize(target, dim=-1)).square().sum((1, 2)).mean()


def tokens_of(map_):
    return map_.flatten(2).transpose(1, 2)


def test_equations_by_hand():
    method, part = scalekd(alpha={"s3": (0.3, 0.2), "s4": (0.5, 0.7)}), tail()
    student, teacher = inputs()
    target = tokens_of(teacher.taps["target"])
    expected = {}
    for view, suffix, first, second in (("spatial", "", 0.3, 0.5), ("alternative", "_alt", 0.2, 0.7)):
        entry = method.projectors[f"s3_{view}"](student.taps["s3"])
        through = tokens_of(part(entry.transpose(1, 2).unflatten(2, (8, 8))))
        last = method.projectors[f"s4_{view}"](student.taps["s4"], through)
        expected[f"s3{suffix}"] = first * distance(through, target, bool(suffix))
        expected[f"s4{suffix}"] = second * distance(last, target, bool(suffix))
    found = losses(method, student, teacher)
    assert sorted(found) == NAMES
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_stage_four_trains_stage_three_through_its_queries_and_the_teacher_stays():
    part = tail()
    before = copy.deepcopy(part.state_dict())
    method = scalekd(part=part)
    student, teacher = inputs()
    found = losses(method, student, teacher)
    (found["s4"] + found["s4_alt"]).backward()
    assert student.taps["s3"].grad.any()
    assert method.projectors["s3_spatial"].table.grad.any()
    assert all(parameter.grad is not None for parameter in method.parameters())
    assert all(tap.grad is None for tap in teacher.taps.values())
    assert all(parameter.grad is None for parameter in part.parameters())
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert not any("after" in name for name in method.state_dict())


def test_only_what_learns_is_built():
    method = scalekd()
    tables = [name for name, _ in method.named_parameters() if name.endswith("table")]
    assert tables == ["projectors.s3_spatial.table", "projectors.s3_alternative.table"]
    no_last_view = scalekd(alpha={"s3": (0.08, 0.06), "s4": (0.08, 0.0)})
    assert sorted(no_last_view.projectors) == ["s3_alternative", "s3_spatial", "s4_spatial"]
    assert sorted(losses(no_last_view, *inputs())) == ["s3", "s3_alt", "s4"]
    # its tokens are the queries of stage 4
    queries_only = scalekd(alpha={"s3": (0.08, 0.0), "s4": (0.08, 0.06)})
    assert len(queries_only.projectors) == 4
    assert sorted(losses(queries_only, *inputs())) == ["s3", "s4", "s4_alt"]
    for method in (no_last_view, queries_only):
        method.zero_grad()
        sum(losses(method, *inputs()).values()).backward()
        assert all(parameter.grad is not None for parameter in method.parameters())
    with pytest.raises(UserError, match="both views of s4 have 0; leave s4 out of `taps` instead"):
        scalekd(alpha={"s3": (0.1, 0.1)})


def test_a_single_position_has_no_alternative_view():
    point = {"target": (16, 1, 1)}
    with pytest.raises(UserError, match=r"methods\.scalekd\.alpha: .* single position; use larger images, or 0"):
        scalekd({"s4": BOTH["s4"]}, point)
    assert list(scalekd({"s4": BOTH["s4"]}, point, alpha=(0.08, 0.0)).projectors) == ["s4_spatial"]


@pytest.mark.parametrize("stage", ["s3", "s4"])
def test_one_stage_alone(stage):
    student = {stage: BOTH[stage]}
    method = scalekd(student)
    assert sorted(losses(method, *inputs(student))) == [stage, f"{stage}_alt"]
    assert method.projectors[f"{stage}_spatial"].table is not None


def test_views_can_have_scales_of_their_own():
    student, teacher = inputs()
    base = losses(scalekd(), student, teacher)
    assert losses(scalekd(softmax_scale=(5.0, 5.0)), student, teacher) == base
    other = losses(scalekd(softmax_scale={"s4": (5.0, 1.0)}), student, teacher)
    assert [name for name in NAMES if other[name] != base[name]] == ["s4_alt"]


def test_sequences_are_read_without_their_prefix():
    roles = {"s3_after_1": (65, 6), "s4": (16, 8)}
    method = scalekd(roles)
    student, teacher = inputs()
    maps = losses(scalekd(), student, teacher)
    taps = {role: tokens_of(student.taps[stage]) for role, stage in (("s3_after_1", "s3"), ("s4", "s4"))}
    taps["s3_after_1"] = torch.cat([torch.randn(4, 1, 6, dtype=torch.float64), taps["s3_after_1"]], 1)
    for name, value in losses(method, Outputs(student.logits, taps=taps), teacher).items():
        torch.testing.assert_close(value, maps[name], rtol=1e-12, atol=0)


def test_the_baseline_is_a_convolution_and_the_spatial_view():
    student = {"s4": (8, 4, 4)}
    method = scalekd(student, projector="pointwise", alpha=(0.07, 0.0))
    assert sorted(name for name, _ in method.named_parameters()) == [
        "projectors.s4_spatial.align.bias",
        "projectors.s4_spatial.align.weight",
    ]
    ours, teacher = inputs(student)
    projected = method.projectors["s4_spatial"].align(tokens_of(ours.taps["s4"]))
    expected = 0.07 * distance(projected, tokens_of(teacher.taps["target"]), False)
    torch.testing.assert_close(losses(method, ours, teacher)["s4"], expected)


@pytest.mark.parametrize(
    ("student", "teacher", "config", "taps", "part"),
    [
        (CNN, WIDER, {}, {"s3": "stage:-2", "s4": "stage:-1"}, "after:stage:-2"),
        (VIT, BIGGER, {}, {"s3_after_1": "block:8", "s4": "tokens:patch"}, "after:block:-3"),
        (CNN, BIGGER, {"teacher_entry": "block:1"}, {"s3": "stage:-2", "s4": "stage:-1"}, "after:block:1"),
        (
            CNN,
            WIDER,
            {"taps": {"s4": "stage:3", "s3": "stage:2"}},
            {"s3": "stage:2", "s4": "stage:3"},
            "after:stage:-2",
        ),
        (CNN, WIDER, {"taps": {"s4": "stage:4"}}, {"s4": "stage:4"}, None),
    ],
)
def test_what_is_read(student, teacher, config, taps, part):
    needs = ScaleKD.needs(ScaleKD.Config(**config), student, teacher)
    assert dict(needs.student) == taps
    assert list(needs.student) == sorted(taps)
    assert needs.parts == ((part,) if part else ())
    assert needs.cacheable == (part is None)
    assert needs.batch_coupled
    assert not ScaleKD.needs(ScaleKD.Config(norm="layer", **config), student, teacher).batch_coupled


def test_networks_that_cannot_serve_are_refused_before_anything_is_built():
    one = ModelInfo("one", "torch", 3, Preprocessing(), stages=(Stage("body", 8),))
    with pytest.raises(UserError, match=r"one has no last stage that could run apart.*ConvNeXt.*taps for s4 only"):
        ScaleKD.needs(ScaleKD.Config(), CNN, one)
    assert not ScaleKD.needs(ScaleKD.Config(taps={"s4": "stage:4"}), CNN, one).parts
    with pytest.raises(UserError, match=r"methods\.scalekd\.taps: 'one' has no two stages or blocks"):
        ScaleKD.needs(ScaleKD.Config(), one, WIDER)
    with pytest.raises(UserError, match=r"teacher_tap: stage s3 ends in 'tokens:patch' of 'bigger'.*with 'block:4'"):
        ScaleKD.needs(ScaleKD.Config(teacher_tap="block:4"), CNN, BIGGER)
    raw = ScaleKD.needs(ScaleKD.Config(teacher_tap="block:4", taps={"s4": "stage:4"}), CNN, BIGGER)
    assert dict(raw.teacher) == {"target_after_1": "block:4"}
    with pytest.raises(UserError, match="needs a teacher"):
        ScaleKD.needs(ScaleKD.Config(), CNN, None)
    with pytest.raises(UserError, match=r"heads: 5 heads at s3 do not divide the teacher's 12 channels; .* is 4"):
        ScaleKD.needs(ScaleKD.Config(heads=5), CNN, WIDER)
    with pytest.raises(UserError, match=r"heads: 3 heads at s4 do not divide the teacher's 16"):
        ScaleKD.needs(ScaleKD.Config(heads={"s3": 3, "s4": 3}), CNN, WIDER)
    with pytest.raises(UserError, match=r"methods\.scalekd\.taps\.s4 gives shape \(8,\)"):
        scalekd({"s4": (8,)})


@pytest.mark.parametrize(
    ("channels", "heads"), [(384, 6), (512, 8), (768, 12), (1024, 16), (1536, 24), (12, 1), (200, 2), (129, 1)]
)
def test_default_heads_divide_the_width(channels, heads):
    assert ScaleKD.Config().head_count("s3", channels) == heads


@pytest.mark.parametrize(
    "config",
    [
        {"taps": {}},
        {"taps": {"s5": "stage:1"}},
        {"norm": "group"},
        {"alpha": 0.1},
        {"alpha": (-1, 0)},
        {"softmax_scale": 0},
        {"softmax_scale": (5, -1)},
    ],
)
def test_options_out_of_range(config):
    with pytest.raises(ValidationError):
        ScaleKD.Config(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"norm": "layer"},
        {"alpha": {"s3": (0.1, 0.1), "s4": (0.1, 0.0)}, "softmax_scale": 1},
        {"taps": {"s4": "stage:-1"}, "heads": 2},
        {"taps": {"s4": "stage:-1"}, "projector": "pointwise", "alpha": (0.05, 0)},
    ],
    ids=str,
)
def test_options_keep_the_contract(config):
    check_method(ScaleKD, config)


def test_cost_is_the_projectors():
    method = scalekd()
    cost = method.cost()
    assert cost.parameters == sum(parameter.numel() for parameter in method.parameters())
    assert cost.macs == sum(projector.macs() for projector in method.projectors.values())


# real networks: (student, its arguments, teacher, its arguments, pixels, options)
PAIRS = {
    "resnet-swin": ("resnet18", {}, "swin_tiny_patch4_window7_224", SWIN, 64, {}),
    "vit-swin": ("deit_tiny_patch16_224", "vit", "swin_tiny_patch4_window7_224", SWIN, 64, {"norm": "layer"}),
    "resnet-vit": ("resnet18", {}, "deit_tiny_distilled_patch16_224", "vit", 64, {"alpha": (0.016, 0.008)}),
    "resnet-convnext": ("resnet18", {}, "test_convnext", {}, 64, {}),
    "swin-transformers": (
        "swin_tiny_patch4_window7_224",
        SWIN,
        "transformers/swin",
        {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2},
        64,
        {},
    ),
}
PLAIN = {"depth": 4, "embed_dim": 16, "num_heads": 2}


def network(name, kwargs, size):
    kwargs = PLAIN if kwargs == "vit" else kwargs
    return load_model(name, pretrained=False, num_classes=5, image_size=size, kwargs=kwargs)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_step_with_real_networks_lowers_the_loss(pair):
    ours, our_kwargs, theirs, their_kwargs, size, options = PAIRS[pair]
    torch.manual_seed(0)
    student, teacher = network(ours, our_kwargs, size), network(theirs, their_kwargs, size)
    teacher.network.requires_grad_(False).eval()
    config = ScaleKD.Config(**options)
    needs = ScaleKD.needs(config, student.info, teacher.info)
    choices = [Choice("scalekd", ScaleKD, config, needs, 1.0, None, "teacher")]
    tapped = TappedModel(student, student.info, taps_of(choices))
    watched = TappedModel(teacher, teacher.info, taps_of(choices, "teacher"))
    shapes = [Shapes(5, tap_shapes(model, size)) for model in (tapped, watched)]
    parts = {"teacher": {part: live_part(teacher, part) for part in needs.parts}}
    methods = build_methods(choices, shapes[0], {"teacher": shapes[1]}, parts)
    module = DistillModule(tapped, methods, choices).train()
    frozen = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    pixels = torch.randn(4, 3, size, size)
    with torch.no_grad():
        taught = {"teacher": watched(pixels)}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def total():
        found = module(pixels, taught, Target(torch.zeros(4, dtype=torch.long)), {"scalekd": {}})
        assert sorted(found) == [f"scalekd/{name}" for name in NAMES]
        return sum(found.values())

    first = total()
    first.backward()
    assert all(p.grad is not None for p in methods["scalekd"].parameters())
    optimizer.step()
    assert total() < first
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.network.state_dict().items())
