"""Recorded networks for CIFAR, whose weights and images are not stored but generated from their names."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_hf.convert.repdistiller import NETWORKS, our_name
from kd_hf.models.handle import ModelHandle
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from tests.goldens.case import KeyedCase
from tests.goldens.record import Golden, Mismatch

SIZE, CLASSES = 32, 100
# modules of ours whose output mdistiller counts as stage 0, by the start of its network's name
_STEMS = {"resnet": "relu", "wrn": "conv1", "vgg": "block0", "Mobile": "conv1", "ShuffleV1": "relu"}
_STEMS |= {"ShuffleV2": "relu1", "ResNet": "act1"}


def generated(name: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers u in [0, 1) that a name stands for, in C order."""
    with np.errstate(over="ignore"):
        state = np.uint32(zlib.crc32(name.encode())) + np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(
            0x9E3779B9
        )
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            state ^= state >> np.uint32(shift)
            state *= np.uint32(factor)
        state ^= state >> np.uint32(16)
    return torch.from_numpy(state / 2.0**32).reshape(shape)


def weight_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that a network's official name stands for."""
    unit, last = generated(name, shape), name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last in ("running_mean", "bias"):
        return 0.2 * (2 * unit - 1)
    if last == "running_var" or len(shape) == 1:
        return 0.5 + unit
    return (2 * unit - 1) * (3 / np.prod(shape[1:])) ** 0.5


def images(count: int) -> Tensor:
    """Pixels ``[count, 3, 32, 32]``."""
    return 4 * generated("images", (count, 3, SIZE, SIZE)) - 2


def official_names(handle: ModelHandle) -> dict[str, str]:
    """Names of a network's tensors here, by their official ones."""
    back = {"downsample": "shortcut", "fc": "linear"} if our_name("linear", handle) == "fc" else {}
    return {".".join(back.get(part, part) for part in name.split(".")): name for name in handle.network.state_dict()}


def network(name: str, kwargs: Mapping[str, Any] | None = None) -> ModelHandle:
    """One of mdistiller's networks in float64 and eval mode, filled by the generator."""
    if name not in NETWORKS:
        raise Mismatch(f"unknown network '{name}'")
    # it passes the maps of a Wide ResNet through the next BatchNorm a second time
    twice = {"norms_count_twice": True} if name.startswith("wrn") else {}
    handle = load_model(NETWORKS[name], kwargs=twice | dict(kwargs or {}))
    shapes = handle.network.state_dict()
    names = official_names(handle)
    state = {ours: weight_of(official, tuple(shapes[ours].shape)) for official, ours in names.items()}
    handle.network.double().load_state_dict(state)
    return handle


class ZooCase(KeyedCase):
    """A network alone: what it gives in eval mode, and one pass in train mode."""

    def values(self) -> Mapping[str, Tensor]:
        """See :class:`KeyedCase`."""
        hparams = self.golden.hparams
        handle = network(hparams["model"], {"num_labels": hparams["num_classes"]})
        counts = {"parameters": handle.info.parameters, "state_keys": len(handle.network.state_dict())}
        if wrong := [f"{count} {key}" for key, count in counts.items() if count != hparams[key]]:
            raise Mismatch(f"{hparams['model']} has {', '.join(wrong)}")
        evaluated = _evaluated(self.golden, handle, hparams["model"], hparams["batch_eval"])
        return evaluated | _trained(self.golden, handle)


def _evaluated(golden: Golden, handle: ModelHandle, name: str, count: int) -> dict[str, Tensor]:
    """Everything recorded in eval mode, by key."""
    stem = next(module for start, module in _STEMS.items() if name.startswith(start))
    taps = {"feats.0": f"module:{stem}", "pooled_feat": "pre_logits"}
    for index, stage in enumerate(handle.info.stages, 1):
        taps[f"feats.{index}"] = f"stage:{index}"
        if stage.preact:
            taps[f"preact_feats.{index}"] = f"preact:{index}"
    model = TappedModel(handle, handle.info, list(taps.values())).eval()
    golden.option.frozen(model)
    outputs = model(golden.option.tensor(images(2)[:count]))
    values = {"out/logits": outputs.logits}
    for key, tap in taps.items():
        value = outputs.taps[tap]
        if value.ndim == 4:
            values |= {f"out/{key}.mean": value.mean((2, 3)), f"out/{key}.at": value[:, :, 0, 1]}
        else:
            values[f"out/{key}"] = value
    return values


def _trained(golden: Golden, handle: ModelHandle) -> dict[str, Tensor]:
    """The logits of a pass in train mode and the statistics after it, by key."""
    golden.option.student(handle.network)
    values = {"out/train_logits": handle.network.train()(golden.option.tensor(images(2)))}
    state = handle.network.state_dict()
    statistics = {official: ours for official, ours in official_names(handle).items() if "running_" in official}
    return values | {f"out/train/{official}": state[ours].clone() for official, ours in statistics.items()}


CASES = {"zoo": ZooCase}
