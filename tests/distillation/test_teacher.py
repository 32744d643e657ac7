"""Teachers: frozen, in their own mode and precision, and run no further than they are read."""

import pytest
import torch

from kd_hf.distillation.teacher import Teacher
from kd_hf.models.taps import TappedModel
from kd_hf.recipe.config import TeacherConfig, TrainConfig
from tests.detection import detectors
from tests.models.families import tiny_timm


def teacher_of(name="test_resnet", taps=("stage:1",), train=None, **block):
    handle, size = tiny_timm(name)
    cfg = TeacherConfig(model=name, **block)
    args = TrainConfig(output_dir=".", **train or {})
    tapped = TappedModel(handle, handle.info, taps)
    return Teacher("teacher", cfg, handle, tapped, torch.device("cpu"), args), torch.randn(2, 3, size, size)


def test_a_loss_can_save_what_a_teacher_says():
    teacher, pixels = teacher_of()
    outputs = teacher(pixels)
    weight = torch.ones((), requires_grad=True)
    (sum((tensor * weight).square().sum() for tensor in outputs.tensors())).backward()
    assert weight.grad > 0
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in outputs.tensors())


def test_it_says_what_the_network_gives():
    teacher, pixels = teacher_of(taps=("stage:1", "stage:-1"))
    outputs = teacher(pixels)
    with torch.no_grad():
        expected = teacher.model(pixels)
    assert outputs.logits.equal(expected.logits)
    assert all(outputs.taps[tap].equal(expected.taps[tap]) for tap in expected.taps)


def test_taps_are_in_its_own_precision_and_logits_in_float32():
    teacher, pixels = teacher_of(train={"bf16": True})
    with torch.autocast("cpu", torch.float16):
        outputs = teacher(pixels)
    assert outputs.logits.dtype == torch.float32 and outputs.taps["stage:1"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "network", "norm"), [("eval", False, False), ("batch_stats", False, True), ("train", True, True)]
)
def test_its_mode_is_held_whatever_others_do_to_the_network(mode, network, norm):
    teacher, pixels = teacher_of(mode=mode)
    teacher.model.train(not network)
    teacher(pixels)
    norms = [module for module in teacher.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and teacher.model.network.training == network
    assert all(module.training == norm for module in norms)


def test_it_stops_after_its_last_tap_where_its_logits_are_not_read():
    teacher, pixels = teacher_of(taps=("stage:2",))
    expected = teacher(pixels)
    head = []
    teacher.handle.network.get_submodule(teacher.info.head).register_forward_hook(lambda *_: head.append(1))
    outputs = teacher(pixels, whole=False)
    assert not head and outputs.logits.shape == (2, 0)
    assert outputs.taps["stage:2"].equal(expected.taps["stage:2"])


@pytest.mark.parametrize("kind", ["kd_hf_vidt", "deformable_detr"])
def test_what_a_detector_says_can_be_saved_too(kind):
    handle = detectors.handle(kind)
    cfg, args = TeacherConfig(model=kind), TrainConfig(output_dir=".")
    teacher = Teacher("teacher", cfg, handle, detectors.detector(kind, ["neck"]), torch.device("cpu"), args)
    outputs = teacher(detectors.images(), whole=False)
    found = outputs.tensors()
    assert any(outputs.boxes is tensor for tensor in found) and len(found) >= 3
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in found)
