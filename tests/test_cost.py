"""Costs against counts by hand and against what a real step holds."""

from __future__ import annotations

import pytest
import torch

from kd_hf.assemble import assemble
from kd_hf.cost import memory_bytes, step_cost
from tests.runs import recipe


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
