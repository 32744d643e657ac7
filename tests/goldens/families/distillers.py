"""Recorded distillers: generated networks as a pair, and what several methods say of them; this proves the taps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kd_hf.distillation.choices import Choice, taps_of
from kd_hf.distillation.module import DistillModule, build_methods
from kd_hf.info import ModelInfo, Shapes
from kd_hf.methods import get_method
from kd_hf.methods.vid import log_scale_of
from kd_hf.models.handle import ModelHandle
from kd_hf.models.parts import live_part
from kd_hf.models.taps import TappedModel, tap_shapes
from kd_hf.outputs import Outputs, Target
from tests.goldens.case import KeyedCase
from tests.goldens.families.zoo import CLASSES, SIZE, generated, images, network, weight_of
from tests.goldens.record import Mismatch

T = 4.0


@dataclass(frozen=True)
class Official:
    """mdistiller's weight of a method on CIFAR-100, our options where they are not the defaults, and its names."""

    weight: float
    options: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()  # replacements in the names of our parameters and buffers
    ramp: int = 1  # epochs over which the weight rises
    teacher: str = "eval"  # its mode


METHODS: Mapping[str, Official] = {
    "kd": Official(0.9, {"temperature": T}),
    "dkd": Official(1.0, {"temperature": T, "alpha": 1.0, "beta": 8.0}, ramp=20),
    "fitnet": Official(100.0),
    "at": Official(1000.0),
    "sp": Official(3000.0),
    "rkd": Official(1.0),
    "pkt": Official(30000.0),
    "vid": Official(1.0, names=(("stages.", ""),)),
    "crd": Official(0.8, names=(("memory_s", "memory_v1"), ("memory_t", "memory_v2"))),
    "ofd": Official(1e-3, teacher="train"),
    "reviewkd": Official(
        5.0,
        {"preact": False},
        (("levels.", "abfs."), (".reduce.", ".conv1."), (".expand.", ".conv2."), (".gate.", ".att_conv.0.")),
        ramp=20,
    ),
}
_UNSET = ("z_s", "z_t")  # stay as they begin


@dataclass(frozen=True)
class Images:
    """Training images of which only the number counts."""

    count: int

    def __len__(self) -> int:
        return self.count

    def labels(self) -> np.ndarray:
        """One image of each class."""
        return np.arange(self.count)


class DistillerCase(KeyedCase):
    """A student in train mode under a teacher, and what each of several methods says of them."""

    def values(self) -> Mapping[str, Tensor]:
        """See :class:`KeyedCase`."""
        hparams = self.golden.hparams
        if unknown := [name for name in hparams["methods"] if name not in METHODS]:
            raise Mismatch(f"unknown methods {', '.join(unknown)}")
        impossible = hparams["not_possible_in_mdistiller"]
        if both := [name for name in impossible if impossible[name] and name in hparams["methods"]]:
            raise Mismatch(f"{', '.join(both)} both recorded and impossible")
        self._check_shapes(network(hparams["student"]), network(hparams["teacher"]))
        student = network(hparams["student"])
        teachers = {mode: network(hparams["teacher"]) for mode in ("eval", "train")}
        module = self._module(student, teachers)
        pixels, label = self.golden.option.tensor(images(len(hparams["label"]))), torch.tensor(hparams["label"])
        taught = {mode: self._taught(mode, handle, module, pixels) for mode, handle in teachers.items()}
        logits: list[Tensor] = []
        module.student.register_forward_hook(lambda part, inputs, outputs: logits.append(outputs.logits))
        target = Target(label, row=torch.tensor(hparams["index"]))
        draws = {"crd": {"contrast_index": torch.tensor(hparams["contrast_index"])}}
        losses = module(pixels, taught, target, {name: draws.get(name, {}) for name in module.choices})
        totals = {}
        for name in module.choices:
            parts = [value for part, value in losses.items() if part.partition("/")[0] == name]
            totals[name] = self._weight(name) * torch.stack(parts).sum()
        values = {f"out/{name}": total for name, total in totals.items()}
        if "kd" in totals:  # ours is the cross-entropy, theirs the divergence
            values["out/kd"] = totals["kd"] - self._weight("kd") * _entropy(taught["eval"].logits, T)
        values["out/loss_ce"] = functional.cross_entropy(logits[0], label)
        values |= {"out/train_logits": logits[0], "out/teacher_logits": taught["eval"].logits}
        return values | self._gradients(student, totals)

    def _module(self, student: ModelHandle, teachers: Mapping[str, ModelHandle]) -> DistillModule:
        """Student and methods with generated weights."""
        option, hparams = self.golden.option, self.golden.hparams
        infos = {mode: handle.info for mode, handle in teachers.items()}
        choices = [self._choice(name, student.info, infos) for name in hparams["methods"]]
        tapped = TappedModel(student, student.info, taps_of(choices))
        shapes = {
            mode: Shapes(CLASSES, tap_shapes(TappedModel(handle, handle.info, taps_of(choices, mode)), SIZE))
            for mode, handle in teachers.items()
        }
        parts = {
            mode: {
                part: live_part(handle, part)
                for choice in choices
                if choice.teacher == mode
                for part in choice.needs.parts
            }
            for mode, handle in teachers.items()
        }
        own = Shapes(CLASSES, tap_shapes(tapped, SIZE))
        methods = build_methods(choices, own, shapes, parts, samples=Images(hparams["num_data"]))
        module = DistillModule(tapped, methods, choices).double().train()
        for name, method in module.named_methods():
            _fill(name, method)
        option.student(student.network)
        option.trained(module)
        return module

    def _taught(self, mode: str, handle: ModelHandle, module: DistillModule, pixels: Tensor) -> Outputs:
        model = TappedModel(handle, handle.info, taps_of(list(module.choices.values()), mode))
        self.golden.option.frozen(model)
        with torch.no_grad():
            outputs: Outputs = model.train(mode == "train")(pixels)
        return outputs

    def _choice(self, name: str, student: ModelInfo, teachers: Mapping[str, ModelInfo]) -> Choice:
        method, official = get_method(name), METHODS[name]
        options = dict(official.options)
        if name == "crd":
            options["negatives"] = len(self.golden.hparams["contrast_index"][0]) - 1
        config = method.Config.model_validate(options)
        needs = method.needs(config, student, teachers[official.teacher])
        return Choice(name, method, config, needs, self._weight(name), None, official.teacher)

    def _weight(self, name: str) -> float:
        official, hparams = METHODS[name], self.golden.hparams
        weight = hparams["reviewkd"]["weight"] if name == "reviewkd" else official.weight
        return weight * min(hparams["epoch"] / official.ramp, 1.0)

    def _check_shapes(self, student: ModelHandle, teacher: ModelHandle) -> None:
        """ReviewKD's tables, which are not needed here, must be what the networks give."""
        hparams = self.golden.hparams
        if "reviewkd" not in hparams["methods"]:
            return
        for side, handle in (("in", student), ("out", teacher)):
            stages = [f"stage:{index + 1}" for index in range(len(handle.info.stages))]
            shapes = tap_shapes(TappedModel(handle, handle.info, [*stages, "pre_logits"]), SIZE)
            tables = {
                "shapes" if side == "in" else "out_shapes": [1, *(shapes[stage][1] for stage in reversed(stages))],
                f"{side}_channels": [shapes[tap][0] for tap in (*stages, "pre_logits")],
            }
            for name, table in tables.items():
                if hparams["reviewkd"][name] != table:
                    raise Mismatch(f"reviewkd.{name} {hparams['reviewkd'][name]} instead of {table}")

    def _gradients(self, student: ModelHandle, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each total with respect to the student's first convolution."""
        first = next(path for path, part in student.network.named_modules() if isinstance(part, nn.Conv2d))
        weight = student.network.get_parameter(f"{first}.weight")
        rows = self.golden.hparams["grad_rows"]
        return {
            f"grad/{name}/{first}.weight": torch.autograd.grad(total, weight, retain_graph=True)[0][:rows]
            for name, total in totals.items()
        }


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    """T² times the mean entropy of softmax(z / T)."""
    log_p = (logits / temperature).log_softmax(1)
    return -(temperature**2) * (log_p.exp() * log_p).sum(1).mean()


def _fill(name: str, method: nn.Module) -> None:
    """Fill what a method has by the generator, under its official names."""
    state = method.state_dict()
    for key, value in state.items():
        official = key
        for ours, theirs in METHODS[name].names:
            official = official.replace(ours, theirs)
        if key in _UNSET:
            continue
        if key.endswith("log_scale"):  # as it begins, in full precision
            value.fill_(log_scale_of(5.0))
        elif key.startswith("memory"):
            value.copy_((2 * generated(f"{name}/{official}", tuple(value.shape)) - 1) / (value.shape[1] / 3) ** 0.5)
        else:
            value.copy_(weight_of(f"{name}/{official}", tuple(value.shape)))


CASES = {"e2e": DistillerCase}
