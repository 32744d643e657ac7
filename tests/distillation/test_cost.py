"""Costs against counts by hand and against what a real step holds."""

from __future__ import annotations

import pytest
import torch

from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.cost import memory_bytes, network_macs, step_cost
from kd_hf.info import Preprocessing
from kd_hf.models.handle import ModelHandle, Origin, describe_torch
from tests.runs import recipe


class Looking(torch.nn.Module):
    """A classifier whose path depends on what it sees."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 10)

    def forward(self, pixels):
        """Logits ``[B, 10]``."""
        means = pixels.mean((2, 3))
        return self.head(means if means.sum() > 0 else -means)


def planned(tmp_path, *blocks):
    run = recipe(tmp_path, *blocks)
    return run, assemble(run, num_classes=10, device="meta")


def test_published_counts(tmp_path):
    """4.09 and 8.74 G multiply–accumulates at 224 px, as timm and the papers give them."""
    blocks = {
        "student": {"model": "resnet50"},
        "teacher": {"model": "swin_small_patch4_window7_224", "pretrained": False},
        "methods": {"task": {"weight": 1.0}},
        "data": {"image_size": 224},
    }
    _, parts = planned(tmp_path, blocks)
    cost = step_cost(parts)
    assert cost.flops["student"] / 2e9 == pytest.approx(4.09, abs=0.01)
    assert cost.flops["teacher"] / 2e9 == pytest.approx(8.74, abs=0.02)
    assert cost.relative == pytest.approx(1 + 8.74 / (3 * 4.09), abs=0.01)


def test_methods_count_forward_and_backward(tmp_path):
    teacher = {"model": "test_resnet", "pretrained": False, "num_classes": 10}
    blocks = {"student": {"model": "test_resnet"}, "teacher": teacher, "methods": {"mgd": {}}}
    _, parts = planned(tmp_path, blocks)
    cost = step_cost(parts)
    own = 2 * parts.module.methods["mgd"].cost().macs
    assert own > 0
    student = cost.flops["student"]
    assert cost.relative == pytest.approx((3 * student + cost.flops["teacher"] + 3 * own) / (3 * student))


def test_activations_are_those_of_a_real_step(tmp_path):
    run, parts = planned(tmp_path, {"student": {"model": "test_resnet"}})
    real = assemble(run, num_classes=10).module.student
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = real.train()(torch.zeros(8, 3, 32, 32))
    assert held.logits.shape == (8, 10)
    assert sum(kept.values()) / 8 == pytest.approx(step_cost(parts).activation_bytes, rel=0.05)


def test_memory_follows_the_recipe(tmp_path):
    run, parts = planned(tmp_path, {"train": {"optim": "momentum"}})
    cost = step_cost(parts)
    trained = sum(parameter.numel() for parameter in parts.module.parameters())
    plain = memory_bytes(parts, cost, run.train)
    assert plain["weights"] == plain["gradients"] == plain["optimiser"] == 4 * trained
    assert "average" not in plain
    changes = {"optim": "adamw", "bf16": True, "per_device_train_batch_size": 16}
    other = memory_bytes(parts, cost, run.train.model_copy(update=changes))
    assert other["optimiser"] == 8 * trained
    assert other["activations"] == plain["activations"]  # twice the images in half the bytes


def test_training_mode_is_as_it_was(tmp_path):
    _, parts = planned(tmp_path)
    modes = [module.training for module in parts.module.modules()]
    step_cost(parts)
    assert [module.training for module in parts.module.modules()] == modes


def test_networks_with_weights_are_counted_like_those_without(tmp_path):
    swin = {"model": "swin_tiny_patch4_window7_224", "kwargs": {"window_size": 4, "depths": [1, 1, 1, 1]}}
    blocks = {
        "student": {"model": "test_efficientnet"},
        "teacher": {**swin, "pretrained": False, "num_classes": 10},
        "methods": {"mgd": {}},  # reads taps of both
    }
    run, parts = planned(tmp_path, blocks)
    real = assemble(run, num_classes=10)
    before = {key: value.clone() for key, value in real.module.state_dict().items()}
    state = torch.get_rng_state()
    found = network_macs(real)
    assert found == {name: flops // 2 for name, flops in step_cost(parts).flops.items()}
    assert found["student"] > 0 and found["teacher"] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.equal(before[key]) for key, value in real.module.state_dict().items())
    assert real.module.student(torch.zeros(1, 3, 32, 32)).logits.device.type == "cpu"


def test_a_network_that_looks_at_values_is_left_out(tmp_path):
    run = recipe(tmp_path, {"teacher": {"model": "test_resnet", "pretrained": False}})
    network = Looking()
    info = describe_torch(network, "looking", 10, Preprocessing(32))
    parts = assemble(run, num_classes=10, given={"student": ModelHandle(network, info, Origin("torch", "looking"))})
    assert network_macs(parts).keys() == {"teacher"}
