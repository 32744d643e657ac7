"""Gradient checkpointing changes neither gradients nor the statistics of BatchNorm."""

import copy

import pytest
import timm
import torch
from torch import nn

from kd_hf.errors import UserError
from kd_hf.models.recompute import CountOnce, enable_checkpointing
from tests.models.families import tiny_timm, tiny_transformers


def step(network, pixels, freeze=()):
    """Everything a training step leaves behind: gradients and buffers."""
    network.train()
    for name in freeze:
        network.get_submodule(name).eval()
    output = network(pixels)
    getattr(output, "logits", output).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in network.named_buffers()}


def same(left, right):
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def checkpointed(network):
    again = copy.deepcopy(network)
    enable_checkpointing(again)
    return again


@pytest.mark.parametrize("source", ["resnet18", "test_resnet", "regnety_002"])
def test_statistics_count_a_batch_once(source):
    handle, size = tiny_timm(source)
    pixels = torch.randn(4, 3, size, size)
    plain, careless, careful = handle.network, checkpointed(handle.network), checkpointed(handle.network)
    CountOnce(careful)
    for _ in range(2):  # the second time from statistics that have moved
        expected = step(plain, pixels)
        assert not same(step(careless, pixels), expected)
        assert same(step(careful, pixels), expected)


def test_layers_in_eval_mode_stay_as_they_are():
    handle, size = tiny_timm("resnet18")
    pixels, network = torch.randn(4, 3, size, size), checkpointed(handle.network)
    CountOnce(network)
    before = {name: buffer.clone() for name, buffer in network.layer1.named_buffers()}
    assert same(step(network, pixels, ["layer1"]), step(handle.network, pixels, ["layer1"]))
    assert all(before[name].equal(buffer) for name, buffer in network.layer1.named_buffers())


def test_a_layer_may_be_called_by_itself():
    handle, size = tiny_timm("resnet18")
    network = checkpointed(handle.network)
    CountOnce(network)
    with pytest.raises(RuntimeError):
        network(torch.randn(4, 5, size, size))  # a pass that fails is over too
    network.train()
    before = {name: buffer.clone() for name, buffer in network.bn1.named_buffers()}
    network.bn1(torch.randn(4, 64, 8, 8))
    assert all(before[name].equal(buffer) for name, buffer in network.bn1.named_buffers())


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (lambda: nn.Linear(2, 2), "Linear"),
        (lambda: tiny_transformers("resnet").network, "ResNetForImageClassification"),
        (lambda: timm.create_model("inception_v3"), "InceptionV3"),
    ],
)
def test_a_network_without_it_is_refused(network, name):
    with pytest.raises(UserError, match=rf"train\.activation_checkpointing: {name} does not support it"):
        enable_checkpointing(network())
