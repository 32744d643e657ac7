"""Recorded cases of ScaleKD: its projector and its loss alone, the pass through a teacher's end, and all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kd_hf.info import Preprocessing, Shapes
from kd_hf.methods import get_method
from kd_hf.methods.base import Method
from kd_hf.methods.cross_attention import CrossAttentionProjector, mimicking, without_mean
from kd_hf.methods.losses import batch_mean
from kd_hf.methods.scalekd import VIEWS, ScaleKD
from kd_hf.models.handle import ModelHandle, Origin, describe_timm
from kd_hf.models.parts import last_stage_entry, live_part
from kd_hf.outputs import Outputs
from tests.goldens.case import Case, Run, TensorCase, load
from tests.goldens.families.logits import without_alpha
from tests.goldens.layout import LOSS, NO_CHANGE, HParams, Layout, Output, Term, check_fact, rename, size
from tests.goldens.record import Golden, Mismatch, Tensors

LAYOUT = Layout(
    parameters={
        "pos_embed": "position",
        "proj_student.0.": "conv.",
        "proj_student.1.": "conv_norm.",
        "proj_pos.0.": "query_in.",
        "pos_attention.q.": "query.",
        "pos_attention.k.": "key.",
        "pos_attention.v.": "value.",
        "pos_attention.proj.": "out.",
        "norm.": "norm.",
        "ffn.layers.0.0.": "expand.",
        "ffn.layers.1.": "contract.",
        "query.weight": "table",
    },
    outputs={
        "loss": LOSS,
        "ori_loss": Output("task", weighted=True),
        "loss_kd": Output("kd", weighted=True),
        "loss_spat": Output("scalekd", "s4"),
        "loss_alt": Output("scalekd", "s4_alt"),
        **{f"loss_{part}": Output("scalekd", part) for part in ("s3", "s3_alt", "s4", "s4_alt")},
    },
)
LOGITS = Layout(
    options={"temp": "temperature"},
    facts={"classes": size("in/student_logits", 1), "batch": size("in/student_logits", 0)},
    weight="alpha",
    task_weight=without_alpha,
    inputs={"student_logits": "student.logits", "teacher_logits": "teacher.logits"},
    outputs={"loss": LOSS, "loss_kd": LOSS},
)
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
        return TensorCase(replace(golden, method="kd"), LOGITS)
    cases = {"cap": CapCase, "dfm": LossCase, "fd": MethodCase, "tpp": MethodCase, "full": MethodCase}
    if part not in cases:
        raise Mismatch(f"unknown part '{part}'")
    return cases[part](in_our_names(golden))


def in_our_names(golden: Golden) -> Golden:
    """The same file with parameters and their gradients as our modules hold them."""
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
        shape = {"pos_embed": value.shape[1:], "proj_pos.0.weight": value.shape[:2], "align.weight": value.shape[:2]}
        owner = "projectors.s4_spatial." if rest.startswith("align.") else owner
        tensors[prefix + owner + rename(rest, LAYOUT.parameters)] = value.reshape(shape.get(rest, value.shape))
    return replace(golden, tensors=Tensors(tensors))


def load_known(module: nn.Module, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load what a module has. Returns leaves by recorded name.

    Layers of the official projectors that no gradient reaches are not built: they stay leaves without gradient.
    """
    own = module.state_dict()
    layers = tuple(LAYOUT.parameters.values())
    if stray := [name for name in recorded.keys() - own.keys() if not _own_name(name).startswith(layers)]:
        raise Mismatch(f"no projector has {', '.join(sorted(stray))}")
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    load(module, {**counters, **{name: value for name, value in recorded.items() if name in own}})
    leaves = {f"param/{name}": value for name, value in recorded.items() if name not in own}
    return leaves | {f"param/{name}": value for name, value in module.named_parameters()}


def _own_name(name: str) -> str:
    """A parameter's name in its projector."""
    return name.split(".", 2)[2] if name.startswith("projectors.") else name


@dataclass
class ScaleKDCase:
    """What the cases have in common: recorded inputs as leaves, losses under the method's name."""

    names: ClassVar[tuple[str, ...]] = ()  # of inputs
    golden: Golden
    layout: Layout = LAYOUT
    terms: list[Term] = field(init=False)
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.terms = [Term("scalekd", {}, 1.0)]
        self._check()

    def _check(self) -> None:
        """Read the hyper-parameters that repeat shapes."""
        golden = self.golden
        check_fact(golden.hparams, "batch", golden.tensors.shape(f"in/{self._target_name()}")[0])

    def expected(self) -> Mapping[str, Output]:
        """Recorded outputs that have a counterpart."""
        return {name: output for name, output in self.layout.outputs.items() if f"out/{name}" in self.golden.tensors}

    def _leaves(self) -> dict[str, Tensor]:
        """Fresh inputs; returns those with a recorded gradient."""
        recorded = self.golden.group("in/")
        self.inputs = {name: recorded[name].clone() for name in self.names if name in recorded}
        found = {f"in/{name}": value for name, value in self.inputs.items() if f"grad/in/{name}" in self.golden.tensors}
        for leaf in found.values():
            leaf.requires_grad_()
        self.inputs = {name: self.golden.option.tensor(value) for name, value in self.inputs.items()}
        return found

    def _target_name(self) -> str:
        return "teacher_s4" if "in/teacher_s4" in self.golden.tensors else "teacher_feat"

    def _target(self) -> Tensor:
        return self.inputs[self._target_name()]

    def _check_projector(self, block: HParams, feature: str, prefix: str, goal: str | None) -> None:
        """Hyper-parameters of a projector from ``in/<feature>`` to the channels and grid of ``in/<goal>``."""
        shapes = self.golden.tensors
        _, channels, *grid = shapes.shape(f"in/{feature}")
        # a table that queries from outside replace is there and not used
        table = any(name.startswith(f"param/{prefix}") and name.endswith("table") for name in shapes)
        facts: dict[str, Any] = {"student_dims": channels, "pos_hw": grid, "self_query": table}
        if goal is not None:
            _, channels, *grid = shapes.shape(f"in/{goal}")
            facts |= {"teacher_dims": channels, "query_hw": grid}
        for name, value in facts.items():
            check_fact(block, name, value)


class LossCase(ScaleKDCase):
    """The loss of given tokens."""

    names = ("tokens_spat", "tokens_freq", "teacher_feat")

    def _check(self) -> None:
        super()._check()
        _, channels, side, _ = self.golden.tensors.shape("in/teacher_feat")
        for name, value in {"channels": channels, "hw": side}.items():
            check_fact(self.golden.hparams, name, value)
        for name in ("dc_offset", "variant"):  # how the inputs were drawn; the loss of both variants is one
            self.golden.hparams.get(name)

    def run(self, change: Output = NO_CHANGE) -> Run:
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

    names = ("student_feat", "teacher_feat", "query")

    def _check(self) -> None:
        super()._check()
        hparams = self.golden.hparams
        self._check_projector(hparams, "student_feat", "", self._target_name())

    def run(self, change: Output = NO_CHANGE) -> Run:
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

    names = (
        *("student_feat", "student_s3", "student_s4", "student_logits"),
        *("teacher_feat", "teacher_s4", "teacher_logits"),
    )

    def __post_init__(self) -> None:
        hparams = self.golden.hparams
        self.terms = [Term("scalekd", _options(hparams), 1.0)]
        kd = hparams.get("kd")
        if kd:
            self.terms.append(Term("kd", {"temperature": kd["temp"]}, kd["alpha"]))
        if "ce" in hparams:
            self.terms.append(Term("task", _task(hparams["ce"]), 1 - kd["alpha"] if kd else 1.0))
        self._check()

    def _check(self) -> None:
        super()._check()
        hparams, shapes = self.golden.hparams, self.golden.tensors
        target = shapes.shape(f"in/{self._target_name()}")
        if "in/student_logits" in shapes:
            check_fact(hparams, "classes", shapes.shape("in/student_logits")[1])
        hparams.get("is_vit")  # where the official student keeps its head
        if hparams["part"] == "fd":
            _, channels, *grid = shapes.shape("in/student_feat")
            for name, value in {"student_dims": channels, "teacher_dims": target[1], "hw": grid}.items():
                check_fact(hparams, name, value)
        if hparams.get("t", {}).get("teacher") == "beit":
            check_fact(hparams["t"], "grid", target[2])
        for stage in ("s3", "s4"):
            if stage in hparams:
                goal = self._target_name() if stage == "s4" else None
                self._check_projector(hparams[stage], f"student_{stage}", f"projectors.{stage}_", goal)

    def run(self, change: Output = NO_CHANGE) -> Run:
        """All recorded methods on the recorded features and logits."""
        leaves = self._leaves()
        outputs = self._outputs()
        shapes = [Shapes(out.logits.shape[1], {k: tuple(v.shape[1:]) for k, v in out.taps.items()}) for out in outputs]
        part = {"after": _teacher_end(self.golden)} if "t" in self.golden.hparams else {}
        values: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            built = get_method(term.name)(term.config(change.options), *shapes, part).double()
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


CASES = {"scalekd": open_scalekd}
