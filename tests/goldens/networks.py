"""Recorded cases that start from images: networks, taps and methods run together as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kd_hf.distillation.choices import Choice, taps_of
from kd_hf.distillation.module import DistillModule, build_methods
from kd_hf.info import ModelInfo, Preprocessing, Shapes
from kd_hf.methods import get_method
from kd_hf.models.handle import describe_timm
from kd_hf.models.taps import TappedModel, tap_shapes
from kd_hf.outputs import Outputs
from tests.goldens.case import Run, load, recorded_draws
from tests.goldens.families import layouts
from tests.goldens.layout import LOSS, NO_CHANGE, Output, Term, check_facts, make_term, rename
from tests.goldens.record import Golden, Mismatch


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


@dataclass(frozen=True)
class Feature:
    """A recorded feature: taps of a network and what is made of them."""

    taps: tuple[str, ...]
    form: Callable[..., Tensor] = lambda tap: tap


@dataclass
class NetworkCase:
    """A student (and a teacher) from recorded weights, `task` with label smoothing, and the recorded losses."""

    images: ClassVar[str] = "image"  # in/…
    networks: ClassVar[str] = ""  # what comes before student/ and teacher/ in names of weights and gradients
    logits: ClassVar[tuple[str, str]] = ("logit_s", "logit_t")  # out/…
    dist_logits: ClassVar[str] = ""  # out/…, of the student's second head
    kind: ClassVar[str] = "kind"  # the hyper-parameter that names a network's kind
    golden: Golden
    terms: list[Term] = field(init=False)
    infos: dict[str, ModelInfo] = field(init=False)
    module: DistillModule = field(init=False)

    def __post_init__(self) -> None:
        self.terms = self._make_terms()

    def _make_terms(self) -> list[Term]:
        hparams, tables = self.golden.hparams, layouts()
        names = {key: key.removeprefix("loss_") for key in hparams["losses"]}
        if unknown := sorted(set(names.values()) - tables.keys()):
            raise Mismatch(f"unknown losses {', '.join(unknown)}")
        terms, scale = [], 1.0
        for key, name in names.items():
            options, layout = hparams["losses"][key], tables[name]
            check_facts(layout, self.golden, options)
            terms.append(make_term(name, layout, options))
            scale *= layout.task_weight(options)
        return [Term("task", {"label_smoothing": hparams["label_smoothing"]}, scale), *terms]

    def expected(self) -> Mapping[str, Output]:
        """Total, task and each method, where recorded."""
        named = {"loss": LOSS, "ori_loss": Output("task", weighted=True)}
        named |= {f"loss_{term.name}": Output(term.name, weighted=True) for term in self.terms}
        return {name: output for name, output in named.items() if f"out/{name}" in self.golden.tensors}

    def run(self, change: Output = NO_CHANGE) -> Run:
        """One training step's forward pass."""
        size, option = self._image_size(), self.golden.option
        networks = {side: self._network(side) for side in ("student", "teacher") if side in self.golden.hparams}
        self.infos = {side: describe_timm(net, side, Preprocessing()) for side, net in networks.items()}
        choices = [self._choice(term, change) for term in self.terms]
        two_heads = any(choice.needs.dist_head for choice in choices)
        models = {
            side: TappedModel(network, self.infos[side], self._taps(side, choices), two_heads and side == "student")
            for side, network in networks.items()
        }
        shapes = {side: self._shapes(side, tap_shapes(model, size)) for side, model in models.items()}
        values: dict[str, Tensor] = {}
        for side, model in models.items():
            self._watch(side, model, values)
        pixels = option.tensor(self.golden.tensors[f"in/{self.images}"])
        student, teachers = models.pop("student"), {}
        for side, model in models.items():
            option.frozen(model)
            with torch.no_grad():
                teachers[side] = model.eval()(pixels)
        taught = {name: shape for name, shape in shapes.items() if name == "teacher"}
        methods = build_methods(choices, shapes["student"], taught, {"teacher": {}})
        self.module = module = DistillModule(student, methods, choices).double().train()
        weights = networks["student"].named_parameters()
        leaves: dict[str, Tensor] = {f"{self.networks}student/{name}": value for name, value in weights}
        leaves |= self._load_methods(module.methods)
        option.student(networks["student"])
        option.trained(module)
        draws = {term.name: self._draws(term, change) for term in self.terms}
        losses = module(pixels, teachers, self.golden.target(), draws)
        return Run(self.terms, losses, values, leaves)

    def _shapes(self, side: str, taps: Mapping[str, tuple[int, ...]]) -> Shapes:
        info = self.infos[side]
        return Shapes(info.num_classes, taps, info.width, len(info.block_prefix))

    def _taps(self, side: str, choices: Sequence[Choice]) -> tuple[str, ...]:
        """What the methods read of a network, and what recorded features are made of."""
        read = taps_of(choices, None if side == "student" else side)
        recorded = (tap for _, feature in self._recorded_features(side) for tap in feature.taps)
        return tuple(dict.fromkeys((*read, *recorded)))

    def _recorded_features(self, side: str) -> list[tuple[str, Feature]]:
        features = self._features(side, self.infos[side]).items()
        return [(name, feature) for name, feature in features if f"out/{name}" in self.golden.tensors]

    def _watch(self, side: str, model: TappedModel, values: dict[str, Tensor]) -> None:
        """Note logits and recorded features whenever a network runs."""
        name, features = self.logits[side == "teacher"], self._recorded_features(side)

        def note(module: nn.Module, inputs: Any, outputs: Outputs) -> None:
            values[name] = outputs.logits.detach()
            if outputs.dist_logits is not None:
                values[self.dist_logits] = outputs.dist_logits.detach()
            for key, feature in features:
                values[key] = feature.form(*(outputs.taps[tap].detach() for tap in feature.taps)).detach()

        model.register_forward_hook(note)

    def _features(self, side: str, info: ModelInfo) -> Mapping[str, Feature]:
        """Features under their recorded names: what ViTKD and USKD read, whichever of them runs."""
        prefix, letter = len(info.block_prefix), side[0]
        return {
            f"feat_{letter}_low": Feature(
                ("block:0", "block:1"), lambda *blocks: torch.stack([block[:, prefix:] for block in blocks], 1)
            ),
            f"feat_{letter}_high": Feature(("tokens:patch",)),
            f"feat_{letter}_mid_cls": Feature((f"block:{info.depth // 2 - 1}",), lambda block: block[:, 0]),
        }

    def _image_size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.golden.hparams["img_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _network(self, side: str) -> nn.Module:
        hparams = self.golden.hparams
        spec = dict(hparams[side])
        name = spec.pop(self.kind)
        if name not in KINDS:
            raise Mismatch(f"unknown network '{name}'")
        kind, width = KINDS[name], spec.pop("embed_dim_t", None)
        if width is not None and width != hparams["teacher"]["embed_dim"]:
            raise Mismatch(f"the {side}'s embed_dim_t = {width} is not the teacher's width")
        shared = {key: hparams[key] for key in ("patch_size", "num_classes")}
        try:
            network = kind.network(img_size=self._image_size(), **shared, **spec, **kind.arguments).double()
        except TypeError as error:
            raise Mismatch(f"the {side} '{name}' is not made with these values: {error}") from error
        network.pretrained_cfg = {"classifier": kind.heads}
        prefix = f"{self.networks}{side}/"
        load(network, self.golden.group(prefix))
        return network

    def _choice(self, term: Term, change: Output) -> Choice:
        method = get_method(term.name)
        config = term.config(change.options if term.name == self.golden.method else {})
        needs = method.needs(config, self.infos["student"], self.infos.get("teacher"))
        reads = bool(needs.teacher or needs.teacher_logits)
        return Choice(term.name, method, config, needs, term.weight, None, "teacher" if reads else None)

    def _load_methods(self, methods: nn.ModuleDict) -> dict[str, Tensor]:
        """Load the recorded parameters; returns them as leaves by their recorded names."""
        leaves: dict[str, Tensor] = {}
        for name, method in methods.items():
            prefix, recorded = self._recorded(name)
            table = layouts()[name].parameters if recorded else {}
            renamed = {rename(key, table): key for key in recorded}
            load(method, {ours: recorded[key] for ours, key in renamed.items()})
            parameters = method.named_parameters()
            leaves |= {f"{prefix}{renamed[ours]}": value for ours, value in parameters if ours in renamed}
        return leaves

    def _recorded(self, name: str) -> tuple[str, Mapping[str, Tensor]]:
        """What comes before the names of a method's parameters, and the parameters."""
        prefix = f"param/loss_{name}."
        return prefix, self.golden.group(prefix)

    def _draws(self, term: Term, change: Output) -> Mapping[str, Tensor]:
        return recorded_draws(self.golden, layouts()[term.name], change) if term.name in layouts() else {}
