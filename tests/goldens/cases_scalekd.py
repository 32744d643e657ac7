"""Recorded cases of ScaleKD: its projector and its loss alone, the pass through a teacher's end, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kd_hf.methods import get_method
from kd_hf.methods.base import Method, Outputs
from kd_hf.methods.cross_attention import CrossAttentionProjector, mimicking, without_mean
from kd_hf.methods.losses import batch_mean
from kd_hf.methods.scalekd import VIEWS, ScaleKD
from kd_hf.models.handle import ModelHandle, Origin, describe_timm
from kd_hf.models.info import Preprocessing, Shapes
from kd_hf.models.parts import last_stage_entry, live_part
from tests.goldens.check import Case, Golden, Mismatch, Run, TensorCase, Term, load, rename
from tests.goldens.layouts import LAYOUTS, Layout, Output

HParams = Mapping[str, Any]
LAYOUT = LAYOUTS["scalekd"]
NORMS = {"v1_bn": "batch", "v2_bn": "batch", "v1_ln2d": "layer"}
SWIN = {
    "stages.2.downsample.": "layers.3.downsample.",
    "stages.3.": "layers.3.",
    "norm3.": "norm.",
    ".attn.w_msa.": ".attn.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
}
BEIT = {
    "layers.22.": "blocks.1.",
    "layers.23.": "blocks.2.",
    ".ln1.": ".norm1.",
    ".ln2.": ".norm2.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
}


def open_scalekd(golden: Golden) -> Case:
    """The case of a file, by its hyper-parameter `part`."""
    part = golden.hparams["part"]
    if part == "kd":
        return TensorCase(replace(golden, method="kd", hparams=_without(golden.hparams, "part")), LAYOUTS["scalekd/kd"])
    cases = {"cap": CapCase, "dfm": LossCase, "fd": MethodCase, "tpp": MethodCase, "full": MethodCase}
    if part not in cases:
        raise Mismatch(f"unknown part '{part}'")
    return cases[part](in_our_names(golden))


def _without(hparams: HParams, *names: str) -> HParams:
    return {name: value for name, value in hparams.items() if name not in names}


def in_our_names(golden: Golden) -> Golden:
    """The same file with parameters and their gradients as our modules hold them; keys and values are one layer."""
    tensors = {}
    for key, value in golden.tensors.items():
        prefix = next((prefix for prefix in ("grad/param/", "param/") if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        if not prefix or name.startswith("teacher/"):
            tensors[key] = value
            continue
        stage, _, rest = name.rpartition("projector_")
        owner = ""
        if stage:
            owner, rest = f"projectors.{stage.rstrip('.')}_{VIEWS[int(rest[0])]}.", rest[2:]
        if rest.startswith("pos_attention.v."):
            continue
        if rest.startswith("pos_attention.k."):
            value = torch.cat([value, golden.tensors[key.replace("pos_attention.k.", "pos_attention.v.")]])
        shape = {"pos_embed": value.shape[1:], "proj_pos.0.weight": value.shape[:2], "align.weight": value.shape[:2]}
        owner = "projectors.s4_spatial." if rest.startswith("align.") else owner
        tensors[prefix + owner + rename(rest, LAYOUT.parameters)] = value.reshape(shape.get(rest, value.shape))
    return replace(golden, tensors=tensors)


def load_known(module: nn.Module, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load what a module has; what it does not build stays a leaf without gradient. Returns leaves by recorded name."""
    own = module.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    load(module, {**counters, **{name: value for name, value in recorded.items() if name in own}})
    leaves = {f"param/{name}": value for name, value in recorded.items() if name not in own}
    return leaves | {f"param/{name}": value for name, value in module.named_parameters()}


@dataclass
class ScaleKDCase:
    """What the cases have in common: recorded inputs as leaves, losses under the method's name."""

    golden: Golden
    layout: Layout = LAYOUT
    terms: list[Term] = field(init=False)
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = [Term("scalekd", {}, 1.0)]

    def expected(self) -> Mapping[str, Output]:
        """Recorded outputs that have a counterpart."""
        return {name: output for name, output in self.layout.outputs.items() if f"out/{name}" in self.golden.tensors}

    def _leaves(self) -> dict[str, Tensor]:
        """Fresh inputs; returns those with a recorded gradient."""
        self.inputs = {name: value.clone() for name, value in self.golden.group("in/").items()}
        found = {f"in/{name}": value for name, value in self.inputs.items() if f"grad/in/{name}" in self.golden.tensors}
        for leaf in found.values():
            leaf.requires_grad_()
        self.inputs = {name: self.golden.option.tensor(value) for name, value in self.inputs.items()}
        return found

    def _target(self) -> Tensor:
        name = "teacher_s4" if "teacher_s4" in self.inputs else "teacher_feat"
        return self.inputs[name]


class LossCase(ScaleKDCase):
    """The loss of given tokens."""

    def run(self, changes: Mapping[str, Any]) -> Run:
        """Both views."""
        leaves = self._leaves()
        goal = _tokens(self._target())
        names: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
            "s4": ("tokens_spat", lambda tokens: tokens),
            "s4_alt": ("tokens_freq", without_mean),
        }
        losses = {}
        for alpha, (name, (tokens, view)) in zip(self.golden.hparams["alpha"], names.items(), strict=True):
            wanted = nn.functional.normalize(view(goal), dim=-1)
            losses[f"scalekd/{name}"] = alpha * batch_mean(mimicking(view(self.inputs[tokens]), wanted))
        return Run(self.terms, losses, {}, leaves)


class CapCase(ScaleKDCase):
    """One projector."""

    def run(self, changes: Mapping[str, Any]) -> Run:
        """The projector, and the spatial loss of its tokens."""
        hparams, leaves = self.golden.hparams, self._leaves()
        feature = self.inputs["student_feat"]
        projector = CrossAttentionProjector(
            tuple(feature.shape[1:]),
            hparams["teacher_dims"],
            tuple(hparams["query_hw"]),
            hparams["num_heads"],
            hparams["softmax_scale"],
            NORMS[hparams["variant"]],
            own_queries=not hparams["external_query"],
        ).double()
        leaves |= load_known(projector, self.golden.group("param/"))
        projector.train(hparams["bn_training"])
        self.golden.option.trained(projector)
        tokens = projector(feature, self.inputs.get("query"))
        wanted = nn.functional.normalize(_tokens(self._target()), dim=-1)
        loss = hparams["alpha"] * batch_mean(mimicking(tokens, wanted))
        values = {"tokens": tokens.detach()}
        for name, buffer in projector.conv_norm.named_buffers():
            values[f"after/proj_student.1.{name}"] = buffer
        return Run(self.terms, {"scalekd/s4": loss}, values, leaves)


class MethodCase(ScaleKDCase):
    """The method, with a teacher's last stage from recorded weights, and the losses recorded beside it."""

    def __post_init__(self) -> None:
        hparams = self.golden.hparams
        self.terms = [Term("scalekd", _options(hparams), 1.0)]
        kd = hparams.get("kd")
        if kd:
            self.terms.append(Term("kd", {"temperature": kd["temp"]}, kd["alpha"]))
        if "ce" in hparams:
            self.terms.append(Term("task", _task(hparams["ce"]), 1 - kd["alpha"] if kd else 1.0))

    def run(self, changes: Mapping[str, Any]) -> Run:
        """All recorded methods on the recorded features and logits."""
        leaves = self._leaves()
        outputs = self._outputs()
        shapes = [Shapes(out.logits.shape[1], {k: tuple(v.shape[1:]) for k, v in out.taps.items()}) for out in outputs]
        part = {"after": _teacher_end(self.golden)} if "t" in self.golden.hparams else {}
        values: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            built = get_method(term.name)(term.config(changes), *shapes, part).double()
            if isinstance(built, ScaleKD):
                recorded = self.golden.group("param/")
                leaves |= load_known(built, {k: v for k, v in recorded.items() if not k.startswith("teacher/")})
                _watch(built, values)
            losses |= {f"{term.name}/{k}": v for k, v in _run(built, outputs, self.golden).items()}
        # a view with factor 0 is recorded as 0; ours does not name it
        for name in ("s3", "s3_alt", "s4", "s4_alt"):
            losses.setdefault(f"scalekd/{name}", torch.zeros((), dtype=torch.float64))
        return Run(self.terms, losses, values, leaves)

    def _outputs(self) -> tuple[Outputs, Outputs]:
        hparams, inputs = self.golden.hparams, self.inputs
        taps = {stage: inputs[f"student_{stage}"] for stage in ("s3", "s4") if f"student_{stage}" in inputs}
        teacher = {"target": self._target()}
        if "s3" in taps:
            # read for its shape only
            teacher["entry"] = torch.empty(1, hparams["s3"]["teacher_dims"], *hparams["s3"]["query_hw"])
        none = torch.zeros(1, 1)
        student = Outputs(inputs.get("student_logits", none), taps=taps or {"s4": inputs["student_feat"]})
        return student, Outputs(inputs.get("teacher_logits", none), taps=teacher)


def _run(method: Method, outputs: tuple[Outputs, Outputs], golden: Golden) -> dict[str, Tensor]:
    golden.option.trained(method)
    return method.train()(*outputs, golden.target(), {})


def _tokens(feature: Tensor) -> Tensor:
    return feature.flatten(2).transpose(1, 2)


def _options(hparams: HParams) -> dict[str, Any]:
    if hparams["part"] == "fd":
        return {"projector": "pointwise", "alpha": (hparams["alpha_fd"], 0.0)}
    stages = {stage: hparams[stage] for stage in ("s3", "s4") if stage in hparams}
    (norm,) = {NORMS[block["variant"]] for block in stages.values()}
    return {
        "norm": norm,
        "alpha": {stage: tuple(block["alpha"]) for stage, block in stages.items()},
        "heads": {stage: block["num_heads"] for stage, block in stages.items()},
        "softmax_scale": {stage: block["softmax_scale"] for stage, block in stages.items()},
    }


def _task(criterion: HParams) -> dict[str, Any]:
    options: Mapping[str, dict[str, Any]] = {
        "ce": {},
        "label_smooth": {"label_smoothing": criterion.get("eps")},
        "bce": {"loss": "bce", "bce_reduction": "sum"},
    }
    return options[criterion["type"]]


def _watch(method: ScaleKD, values: dict[str, Tensor]) -> None:
    """Collect what the stage-3 projectors and the teacher's end give, under the recorded names."""
    names = dict(zip(VIEWS, ("spat", "freq"), strict=True))
    if not method.parts:
        return
    for view, name in names.items():
        if f"s3_{view}" in method.projectors:
            method.projectors[f"s3_{view}"].register_forward_hook(
                lambda module, inputs, output, name=name: values.update({f"proj_{name}": output.detach()})
            )

    def after_teacher(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        views = method.views["s3"]
        for view, tokens in zip(views, _tokens(output.detach()).chunk(len(views)), strict=True):
            values[f"tokens_{names[view]}"] = tokens

    method.parts["after"].register_forward_hook(after_teacher)


def _teacher_end(golden: Golden) -> nn.Module:
    """The recorded last stage as the end of a network of timm."""
    recorded, spec = golden.group("param/teacher/"), golden.hparams["t"]
    build = {"swin": _swin, "beit": _beit}[spec["teacher"]]
    network, state = build(spec, recorded)
    network = network.double().requires_grad_(False).eval()
    own = network.state_dict()
    if unknown := state.keys() - own.keys():
        raise Mismatch(f"the teacher has no {', '.join(sorted(unknown))}")
    load(network, {**own, **state})
    golden.option.frozen(network)
    info = describe_timm(network, "teacher", Preprocessing())
    return live_part(ModelHandle(network, info, Origin("timm", "teacher")), f"after:{last_stage_entry(info)}")


def _swin(spec: HParams, recorded: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    network = SwinTransformer(
        embed_dim=spec["embed_dims"], depths=(1, 1, 1, spec.get("depth4", 2)), num_heads=spec["heads"], num_classes=2
    )
    state = {}
    for name, value in recorded.items():
        if ".downsample." in name:
            # the four merged pixels: (channel, row, column) there, (column, row, channel) in timm
            merged = value.unflatten(-1, (-1, 2, 2))
            value = merged.movedim(-3, -1).transpose(-3, -2).flatten(-3)
        state[_timm_name(name, SWIN)] = value
    return network, state


def _beit(spec: HParams, recorded: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    width = spec["teacher_width"]
    network = VisionTransformer(
        img_size=32,
        embed_dim=width,
        depth=3,
        num_heads=spec["teacher_heads"],
        mlp_ratio=spec["teacher_ff"] / width,
        global_pool="avg",
        fc_norm=True,
        num_classes=2,
    )
    return network, {_timm_name(name, BEIT): value for name, value in recorded.items()}


def _timm_name(name: str, replacements: Mapping[str, str]) -> str:
    for official, ours in replacements.items():
        name = name.replace(official, ours)
    return name
