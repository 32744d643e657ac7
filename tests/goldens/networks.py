"""Recorded cases that start from images: networks, taps and methods run together as in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kd_hf.distill import Choice, DistillModule, build_methods, taps_of
from kd_hf.methods import get_method
from kd_hf.methods.base import Outputs
from kd_hf.models.handle import describe_timm
from kd_hf.models.info import ModelInfo, Preprocessing, Shapes
from kd_hf.models.taps import TappedModel, tap_shapes
from tests.goldens.check import Golden, NotCovered, Run, Term, load, make_term, rename
from tests.goldens.layouts import LAYOUTS, LOSS, Output

# constructor arguments beyond those recorded
KINDS: Mapping[str, Mapping[str, Any]] = {"deit": {}, "deit3": {"init_values": 1.0, "no_embed_class": True}}


@dataclass
class NetworkCase:
    """A student (and a teacher) from recorded weights, `task` with label smoothing, and the recorded losses."""

    golden: Golden
    terms: list[Term] = field(init=False)

    def __post_init__(self) -> None:
        hparams = self.golden.hparams
        names = {key: key.removeprefix("loss_") for key in hparams["losses"]}
        if uncovered := sorted(set(names.values()) - LAYOUTS.keys()):
            raise NotCovered(f"not covered: {', '.join(uncovered)}")
        terms = [make_term(name, LAYOUTS[name], hparams["losses"][key]) for key, name in names.items()]
        scale = 1.0
        for key, name in names.items():
            scale *= LAYOUTS[name].task_weight(hparams["losses"][key])
        self.terms = [Term("task", {"label_smoothing": hparams["label_smoothing"]}, scale), *terms]

    def expected(self) -> Mapping[str, Output]:
        """Total, task and each method, where recorded."""
        named = {"loss": LOSS, "ori_loss": Output("task", weighted=True)}
        named |= {f"loss_{term.name}": Output(term.name, weighted=True) for term in self.terms}
        return {name: output for name, output in named.items() if f"out/{name}" in self.golden.tensors}

    def run(self, changes: Mapping[str, Any]) -> Run:
        """One training step's forward pass."""
        size = self.golden.hparams["img_size"]
        networks = {side: self._network(side) for side in ("student", "teacher") if side in self.golden.hparams}
        infos = {side: describe_timm(net, side, Preprocessing(size)) for side, net in networks.items()}
        choices = [self._choice(term, infos) for term in self.terms]
        student = TappedModel(networks["student"], infos["student"], taps_of(choices))
        shapes = {"student": Shapes(infos["student"].num_classes, tap_shapes(student, size))}
        pixels = self.golden.tensors["in/image"]
        teachers: dict[str, Outputs] = {}
        if "teacher" in networks:
            model = TappedModel(networks["teacher"], infos["teacher"], taps_of(choices, "teacher")).eval()
            shapes["teacher"] = Shapes(infos["teacher"].num_classes, tap_shapes(model, size))
            with torch.no_grad():
                teachers["teacher"] = model(pixels)
        taught = {name: shape for name, shape in shapes.items() if name == "teacher"}
        methods = build_methods(choices, shapes["student"], taught, {"teacher": {}})
        module = DistillModule(student, methods, choices).double().train()
        leaves: dict[str, Tensor] = {f"student/{name}": value for name, value in networks["student"].named_parameters()}
        leaves |= self._load_methods(module.methods)
        losses = module(pixels, teachers, self.golden.target(), {term.name: self._draws(term) for term in self.terms})
        values = {"logit_s": student(pixels).logits.detach()}
        if teachers:
            values["logit_t"] = teachers["teacher"].logits
        return Run(self.terms, losses, values, leaves)

    def _network(self, side: str) -> nn.Module:
        hparams = self.golden.hparams
        spec = dict(hparams[side])
        kind = spec.pop("kind")
        if kind not in KINDS:
            raise NotCovered(f"not covered: network '{kind}'")
        shared = {key: hparams[key] for key in ("img_size", "patch_size", "num_classes")}
        network = VisionTransformer(**shared, **spec, **KINDS[kind]).double()
        load(network, self.golden.group(f"{side}/"))
        return network

    @staticmethod
    def _choice(term: Term, infos: Mapping[str, ModelInfo]) -> Choice:
        method, config = get_method(term.name), term.config({})
        needs = method.needs(config, infos["student"], infos.get("teacher"))
        reads = bool(needs.teacher or needs.teacher_logits)
        return Choice(term.name, method, config, needs, term.weight, None, "teacher" if reads else None)

    def _load_methods(self, methods: nn.ModuleDict) -> dict[str, Tensor]:
        """Load the recorded parameters; returns them as leaves by their recorded names."""
        leaves: dict[str, Tensor] = {}
        for name, method in methods.items():
            recorded = self.golden.group(f"param/loss_{name}.")
            renamed = {rename(key, LAYOUTS[name].parameters): key for key in recorded}
            load(method, {ours: recorded[key] for ours, key in renamed.items()})
            parameters = method.named_parameters()
            leaves |= {f"param/loss_{name}.{renamed[ours]}": value for ours, value in parameters if ours in renamed}
        return leaves

    def _draws(self, term: Term) -> dict[str, Tensor]:
        recorded = self.golden.group("draw/")
        known = LAYOUTS[term.name].draws if term.name in LAYOUTS else {}
        return {ours: recorded[name] for name, ours in known.items() if name in recorded}
