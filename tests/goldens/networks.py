"""Recorded cases that start from images: networks, taps and methods run together as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kd_hf.distill import Choice, DistillModule, build_methods, taps_of
from kd_hf.methods import get_method
from kd_hf.methods.base import Outputs
from kd_hf.models.handle import describe_timm
from kd_hf.models.info import ModelInfo, Preprocessing, Shapes
from kd_hf.models.taps import TappedModel, tap_shapes
from tests.goldens.check import Golden, NotCovered, Run, Term, load, make_term, make_terms, rename
from tests.goldens.layouts import LAYOUTS, LOSS, Output


@dataclass(frozen=True)
class Kind:
    """How a recorded network is built: its class, arguments beyond those recorded, and its classifiers."""

    network: Callable[..., nn.Module] = VisionTransformer
    arguments: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ("head",)


KINDS: Mapping[str, Kind] = {
    "deit": Kind(),
    "deit3": Kind(arguments={"init_values": 1.0, "no_embed_class": True}),
    "vit": Kind(),
    "vit_distilled": Kind(VisionTransformerDistilled, heads=("head", "head_dist")),
    "cait": Kind(Cait),
}


@dataclass
class NetworkCase:
    """A student (and a teacher) from recorded weights, `task` with label smoothing, and the recorded losses."""

    images: ClassVar[str] = "image"  # in/…
    networks: ClassVar[str] = ""  # what comes before student/ and teacher/ in names of weights and gradients
    logits: ClassVar[tuple[str, str]] = ("logit_s", "logit_t")  # out/…
    kind: ClassVar[str] = "kind"  # the hyper-parameter that names a network's kind
    golden: Golden
    terms: list[Term] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = self._make_terms()

    def _make_terms(self) -> list[Term]:
        hparams = self.golden.hparams
        names = {key: key.removeprefix("loss_") for key in hparams["losses"]}
        if uncovered := sorted(set(names.values()) - LAYOUTS.keys()):
            raise NotCovered(f"not covered: {', '.join(uncovered)}")
        terms = [make_term(name, LAYOUTS[name], hparams["losses"][key]) for key, name in names.items()]
        scale = 1.0
        for key, name in names.items():
            scale *= LAYOUTS[name].task_weight(hparams["losses"][key])
        return [Term("task", {"label_smoothing": hparams["label_smoothing"]}, scale), *terms]

    def expected(self) -> Mapping[str, Output]:
        """Total, task and each method, where recorded."""
        named = {"loss": LOSS, "ori_loss": Output("task", weighted=True)}
        named |= {f"loss_{term.name}": Output(term.name, weighted=True) for term in self.terms}
        return {name: output for name, output in named.items() if f"out/{name}" in self.golden.tensors}

    def run(self, changes: Mapping[str, Any]) -> Run:
        """One training step's forward pass."""
        size = self._image_size()
        networks = {side: self._network(side) for side in ("student", "teacher") if side in self.golden.hparams}
        infos = {side: describe_timm(net, side, Preprocessing(size)) for side, net in networks.items()}
        option = self.golden.option
        choices = [self._choice(term, infos) for term in self.terms]
        two_heads = any(choice.needs.dist_head for choice in choices)
        student = TappedModel(networks["student"], infos["student"], taps_of(choices), two_heads)
        shapes = {"student": Shapes(infos["student"].num_classes, tap_shapes(student, size))}
        pixels = option.tensor(self.golden.tensors[f"in/{self.images}"])
        teachers: dict[str, Outputs] = {}
        if "teacher" in networks:
            model = TappedModel(networks["teacher"], infos["teacher"], taps_of(choices, "teacher")).eval()
            shapes["teacher"] = Shapes(infos["teacher"].num_classes, tap_shapes(model, size))
            option.frozen(model)
            with torch.no_grad():
                teachers["teacher"] = model(pixels)
        taught = {name: shape for name, shape in shapes.items() if name == "teacher"}
        methods = build_methods(choices, shapes["student"], taught, {"teacher": {}})
        module = DistillModule(student, methods, choices).double().train()
        weights = networks["student"].named_parameters()
        leaves: dict[str, Tensor] = {f"{self.networks}student/{name}": value for name, value in weights}
        leaves |= self._load_methods(module.methods)
        option.student(networks["student"])
        option.trained(module)
        losses = module(pixels, teachers, self.golden.target(), {term.name: self._draws(term) for term in self.terms})
        outputs = [student.eval()(pixels), *teachers.values()]
        values = {name: output.logits.detach() for name, output in zip(self.logits, outputs, strict=False)}
        return Run(self.terms, losses, values, leaves)

    def _image_size(self) -> int:
        size = self.golden.hparams["img_size"]
        return size if isinstance(size, int) else size[0]

    def _network(self, side: str) -> nn.Module:
        hparams = self.golden.hparams
        spec = dict(hparams[side])
        name = spec.pop(self.kind)
        if name not in KINDS:
            raise NotCovered(f"not covered: network '{name}'")
        kind = KINDS[name]
        # the width of the other network, which no network of ours needs to know
        spec.pop("embed_dim_t", None)
        shared = {key: hparams[key] for key in ("patch_size", "num_classes")}
        network = kind.network(img_size=self._image_size(), **shared, **spec, **kind.arguments).double()
        network.pretrained_cfg = {"classifier": kind.heads}
        load(network, self.golden.group(f"{self.networks}{side}/"))
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
            prefix, recorded = self._recorded(name)
            renamed = {rename(key, LAYOUTS[name].parameters): key for key in recorded}
            load(method, {ours: recorded[key] for ours, key in renamed.items()})
            parameters = method.named_parameters()
            leaves |= {f"{prefix}{renamed[ours]}": value for ours, value in parameters if ours in renamed}
        return leaves

    def _recorded(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        """What comes before the names of a method's parameters, and the parameters."""
        prefix = f"param/loss_{name}."
        return prefix, self.golden.group(prefix)

    def _draws(self, term: Term) -> dict[str, Tensor]:
        recorded = self.golden.group("draw/")
        known = LAYOUTS[term.name].draws if term.name in LAYOUTS else {}
        return {ours: recorded[name] for name, ours in known.items() if name in recorded}


@dataclass
class DeiTCase(NetworkCase):
    """The same as the DeiT family records it: one method with its companions, all weights below ``param/``."""

    images = "images"
    networks = "param/"
    logits = ("student_logits", "teacher_logits")
    kind = "family"

    def _make_terms(self) -> list[Term]:
        return make_terms(self.golden.method, LAYOUTS[self.golden.method], self.golden.hparams)

    def expected(self) -> Mapping[str, Output]:
        """What the method's table names, where recorded."""
        named = LAYOUTS[self.golden.method].outputs
        return {name: output for name, output in named.items() if f"out/{name}" in self.golden.tensors}

    def _recorded(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        found = self.golden.group("param/") if name == self.golden.method else {}
        return "param/", {key: value for key, value in found.items() if not key.startswith(("student/", "teacher/"))}
