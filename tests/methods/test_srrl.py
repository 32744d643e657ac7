from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.errors import UserError
from kd_hf.info import Preprocessing, Shapes
from kd_hf.methods.srrl import SRRL
from kd_hf.models.handle import describe_timm
from kd_hf.models.taps import TappedModel
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import tiny_stages

CLASSES, WIDTH, CHANNELS = 7, 4, 6


def build(parts=None, teacher=(CHANNELS,), student=(WIDTH, 3, 5), **config):
    head = nn.Linear(CHANNELS, CLASSES, dtype=torch.float64).requires_grad_(False)
    shapes = [Shapes(CLASSES, {"feature": shape}) for shape in (student, teacher)]
    return SRRL(SRRL.Config(**config), *shapes, parts or {"head": head}).double()


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(method, feature, reference, logits):
    student, teacher = Outputs(logits, taps={"feature": feature}), Outputs(logits, taps={"feature": reference})
    return method(student, teacher, Target(torch.full((len(logits),), -1)), {})


def test_nothing_is_left_when_the_connected_feature_is_the_teachers():
    method, feature = build(), random(2, WIDTH, 3, 5)
    reference = method.connector(feature).mean((2, 3)).detach()
    losses = run(method, feature, reference, method.parts["head"](reference))
    assert losses == {"fm": 0, "sr": 0}
    assert all(value > 0 for value in run(method, feature, reference + 1, random(2, CLASSES)).values())


def test_a_teacher_map_counts_by_its_mean_over_positions():
    feature, teacher, logits = random(3, WIDTH, 3, 5), random(3, CHANNELS, 2, 2, seed=1), random(3, CLASSES, seed=2)
    method, on_maps = build(), build(teacher=(CHANNELS, 2, 2))
    on_maps.load_state_dict(method.state_dict())
    on_maps.parts = method.parts
    one, two = run(method, feature, teacher.mean((2, 3)), logits), run(on_maps, feature, teacher, logits)
    assert one == two


def test_the_gradient_passes_through_the_teachers_classifier_and_leaves_it_alone():
    method, feature = build(alpha=0), random(2, WIDTH, 3, 5).requires_grad_()
    head = method.parts["head"]
    run(method, feature, random(2, CHANNELS), random(2, CLASSES))["sr"].backward()
    assert feature.grad.any()
    assert head.weight.grad is None
    assert not any(parameter is head.weight for parameter in method.parameters())
    assert list(dict(method.named_parameters())) == ["connector.0.weight", "connector.1.weight", "connector.1.bias"]


def test_the_teachers_classifier_runs_in_its_own_precision():
    head = nn.Linear(CHANNELS, CLASSES).bfloat16().requires_grad_(False)
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    method = build({"head": head}).float()
    with torch.autocast("cpu", torch.float16):
        losses = run(method, random(2, WIDTH, 3, 5).float(), random(2, CHANNELS).float(), random(2, CLASSES).float())
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert losses["sr"].dtype == torch.float32


def test_wirings_differ_by_the_sample_that_the_classifier_sees():
    feature, reference, logits = random(3, WIDTH, 3, 5), random(3, CHANNELS), random(3, CLASSES, seed=3)
    method = build(wiring="last_sample")
    losses = run(method, feature, reference, logits)
    last = method.parts["head"](method.connector(feature).mean((2, 3)))[-1]
    torch.testing.assert_close(losses["sr"], (last - logits).square().mean())
    other = build({"head": method.parts["head"]})
    other.load_state_dict(method.state_dict())
    assert run(other, feature, reference, logits)["sr"] != losses["sr"]
    assert run(other, feature, reference, logits)["fm"] == losses["fm"]


def test_the_default_teacher_tap_is_the_papers_pooled_map_and_what_the_classifier_takes():
    network = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    info = describe_timm(network, "test_resnet", Preprocessing(64))
    needs = SRRL.needs(SRRL.Config(), info, info)
    tapped = TappedModel(network, info, [needs.teacher["feature"], "stage:-1"])
    with torch.no_grad():
        outputs = tapped(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        torch.testing.assert_close(outputs.taps["pre_logits"], outputs.taps["stage:-1"].mean((2, 3)))
        torch.testing.assert_close(network.get_submodule(info.head)(outputs.taps["pre_logits"]), outputs.logits)


def test_what_cannot_serve_is_refused_with_the_reason():
    student = tiny_stages("small")
    with pytest.raises(UserError, match=r"methods\.srrl needs a teacher"):
        SRRL.needs(SRRL.Config(), student, None)
    headless = replace(tiny_stages("headless"), head=None)
    with pytest.raises(UserError, match=r"'headless' has none.*mgd"):
        SRRL.needs(SRRL.Config(), student, headless)
    with pytest.raises(UserError, match=r"methods\.srrl\.student_tap: 'tokens'.*expected a map"):
        build(student=(16, WIDTH), student_tap="tokens")
    with pytest.raises(UserError, match=r"methods\.srrl\.teacher_tap.*takes 6 features.*pre_logits"):
        build(teacher=(8, 2, 2))


def test_cost_counts_the_convolution_and_the_classifier():
    method = build()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(method, random(2, WIDTH, 3, 5), random(2, CHANNELS), random(2, CLASSES))
    assert counter.get_total_flops() == 2 * 2 * method.cost().macs
