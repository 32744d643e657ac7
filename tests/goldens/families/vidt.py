"""Recorded cases of ViDT: the network from images to boxes, its loss, its attention, and matching of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DeformableDetrConfig

from kd_hf.convert.vidt import fit_vidt
from kd_hf.detection.methods.token_matching import BODY, NECK, PATCH, TokenMethod, TokenProjector, ViDTTokens, VkDTokens
from kd_hf.detection.networks.vidt import ViDTForObjectDetection, ViDTOutput
from kd_hf.detection.networks.vidt_config import ViDTConfig
from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor
from kd_hf.detection.networks.vidt_losses import Matcher, detection_loss
from kd_hf.detection.networks.vidt_neck import SampledAttention
from kd_hf.info import Shapes
from kd_hf.methods.orthogonal import OrthogonalProjection, reflect
from kd_hf.outputs import Outputs, Target
from tests.detection.official import Sizes, state_dict
from tests.goldens.case import Run, load
from tests.goldens.layout import LOSS, NO_CHANGE, Output, Term, check_fact
from tests.goldens.record import Golden

WEIGHTS = {
    "cls_loss_coef": ("loss_ce",),
    "bbox_loss_coef": ("loss_bbox",),
    "giou_loss_coef": ("loss_giou",),
    "iouaware_loss_coef": ("loss_iouaware",),
    "token_loss_coef": ("loss_token_focal", "loss_token_dice"),
    "vector_loss_coef": ("loss_vector",),
}
COSTS = {
    "set_cost_class": "class_cost",
    "set_cost_bbox": "bbox_cost",
    "set_cost_giou": "giou_cost",
    "focal_alpha": "focal_alpha",
}
SIZES = {
    **{name: name for name in Sizes.__dataclass_fields__},
    "cross_scale_fusion": "epff",  # its name before ViDT+
    "pos_dim": "d_model",
}
UNSEEN = {"nheads": "decoder_attention_heads", "cross_indices": "cross_stages"}  # no weight shows them
# options that change nothing in evaluation mode, for given weights
UNUSED = ("aux_loss", "gt_mask_len", "with_vector", "backbone_name", "dropout", "drop_path_rate")
# a line of the authors' log: how many queries have another likeliest class than the last one, which means nothing here
CARDINALITY = "cardinality_error"
TARGETS = ("target_counts", "target_labels", "target_boxes")


@dataclass
class DetectionCase:
    """What the cases have in common."""

    golden: Golden
    leaves: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def expected(self) -> Mapping[str, Output]:
        """The total; parts are compared as values."""
        return {"loss": LOSS}

    def _unused(self, *names: str) -> None:
        """Look at hyper-parameters that say nothing to the case."""
        for name in names:
            self.golden.hparams.get(name)

    def _inputs(self, *names: str) -> dict[str, Tensor]:
        """Inputs, as leaves where their gradient is recorded."""
        recorded = self.golden.group("in/")
        inputs = {name: recorded[name].clone() for name in names if name in recorded}
        for name, value in inputs.items():
            if f"grad/in/{name}" in self.golden.tensors:
                self.leaves[f"in/{name}"] = value.requires_grad_()
        return inputs

    def _total(self, loss: Tensor, weight: float = 1.0) -> Run:
        return Run(
            [Term(self.golden.method, {}, weight)], {f"{self.golden.method}/all": loss}, self.values, self.leaves
        )


def loss_options(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the configuration that decide the loss."""
    weights = {name: hparams[key] for key, names in WEIGHTS.items() if key in hparams for name in names}
    return {"loss_weights": weights} | {ours: hparams[key] for key, ours in COSTS.items() if key in hparams}


def targets_of(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The objects of each image."""
    counts = inputs["target_counts"].tolist()
    split = (inputs[name].split(counts) for name in ("target_labels", "target_boxes"))
    return [{"class_labels": labels, "boxes": boxes} for labels, boxes in zip(*split, strict=True)]


def visible(sizes: Tensor, frame: Sequence[int]) -> Tensor:
    """Where images of the given heights and widths ``[B, 2]`` lie in a padded batch: ``[B, H, W]``."""
    rows, columns = (torch.arange(side) < sizes[:, axis, None] for axis, side in enumerate(frame))
    return rows[:, :, None] & columns[:, None]


class CriterionCase(DetectionCase):
    """The loss of given predictions."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """All stages; the last is the main one."""
        hparams = self.golden.hparams
        inputs = self._inputs("logits", "box_logits", "iou_logits", *TARGETS)
        config = ViDTConfig(num_labels=hparams["num_classes"], **loss_options(hparams))
        names = {"logits": inputs["logits"], "pred_boxes": inputs["box_logits"].sigmoid()}
        if hparams.get("iou_aware"):
            names["pred_ious"] = inputs["iou_logits"]
        stages = [dict(zip(names, values, strict=True)) for values in zip(*names.values(), strict=True)]
        targets = targets_of(inputs)
        loss, parts = detection_loss(config, {**stages[-1], "auxiliary_outputs": stages[:-1]}, targets)
        self.values = {name: value.detach() for name, value in parts.items() if not name.startswith(CARDINALITY)}
        for name in self.golden.group(f"out/{CARDINALITY}"):
            self.golden.tensors[f"out/{CARDINALITY}{name}"]
        matcher = Matcher(config.class_cost, config.bbox_cost, config.giou_cost)
        for number, stage in enumerate(stages):
            pairs = matcher(stage, targets)
            for side, indices in zip(("pred", "target"), zip(*pairs, strict=True), strict=True):
                self.values[f"match_{side}_{number}"] = torch.cat(indices)
        return self._total(loss)


class NetworkCase(DetectionCase):
    """Images through the whole network, whose weights follow from their names."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """One pass in evaluation mode."""
        hparams = self.golden.hparams
        inputs = self._inputs("images", "sizes", "orig_sizes", *TARGETS)
        self._unused(*UNUSED)
        given = {ours: hparams[name] for name, ours in SIZES.items() if name in hparams}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        official = state_dict(Sizes(**given))
        unseen = {ours: hparams[name] for name, ours in UNSEEN.items() if name in hparams}
        config, weights = fit_vidt(official, "the record", unseen)
        for name, value in loss_options(hparams).items():
            setattr(config, name, value)
        network = ViDTForObjectDetection(config).double().eval()
        load(network, weights)
        for name, recorded in self.golden.group("check/").items():
            self.values[f"check/{name}"] = official[name].flatten()[: len(recorded)]
        self._watch_body(network)
        targets = targets_of(inputs)
        self.golden.option.trained(network)
        seen = visible(inputs["sizes"], inputs["images"].shape[2:])
        self.values["mask"] = ~seen
        with torch.no_grad():
            out = network(self.golden.option.tensor(inputs["images"]), seen, targets)
        self._collect(out, targets, config)
        self._post_process(out, inputs["orig_sizes"])
        return self._total(out.loss)

    def _watch_body(self, network: ViDTForObjectDetection) -> None:
        def watch(module: torch.nn.Module, inputs: Any, output: tuple[list[Tensor], Tensor]) -> None:
            maps, self.values["backbone_det_tokens"] = output
            for level, features in enumerate(maps):
                self.values[f"backbone_feature_{level}"] = features
                self.values[f"backbone_feature_{level}_mean"] = features.mean((2, 3))

        network.backbone.register_forward_hook(watch)

    def _collect(self, out: ViDTOutput, targets: list[dict[str, Tensor]], config: ViDTConfig) -> None:
        self.values |= out.loss_dict
        self.values |= {"pred_logits": out.logits, "pred_boxes": out.pred_boxes}
        self.values["aux_pred_boxes"] = torch.stack([one["pred_boxes"] for one in out.auxiliary_outputs])
        self.values["distil_body_det"] = out.body_tokens
        self.values["distil_neck_det_last"] = out.neck_tokens[:, -1]
        for number, prediction in enumerate(out.auxiliary_outputs):
            self.values[f"aux{number}_pred_logits"] = prediction["logits"]
        for level, tokens in enumerate(out.patch_tokens):
            self.values[f"distil_patch_{level}"] = tokens
        optional = {"pred_ious": out.pred_ious, "pred_vectors": out.pred_vectors}
        self.values |= {name: value for name, value in optional.items() if value is not None}
        pairs = Matcher(config.class_cost, config.bbox_cost, config.giou_cost)(out, targets)
        for side, indices in zip(("pred", "target"), zip(*pairs, strict=True), strict=True):
            self.values[f"match_{side}"] = torch.cat(indices)

    def _post_process(self, out: ViDTOutput, sizes: Tensor) -> None:
        found = ViDTImageProcessor().post_process_object_detection(out, threshold=-1, target_sizes=sizes)
        for name in ("scores", "labels", "boxes"):
            self.values[f"post_{name}"] = torch.stack([image[name] for image in found])


class TokensCase(DetectionCase):
    """Matching of given tokens."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """With projectors or without."""
        hparams = self.golden.hparams
        names = [name for name in self.golden.group("in/") if name.startswith(("student_", "teacher_"))]
        inputs = self._inputs(*names)
        for side in ("student", "teacher"):
            check_fact(hparams, f"{side}_dim", inputs[f"{side}_body_det"].shape[-1])
        self._unused("num_classes")
        outputs = [self.golden.option.outputs(_outputs(side, inputs)) for side in ("student", "teacher")]
        shapes = [Shapes(1, {role: tuple(tap.shape[1:]) for role, tap in out.taps.items()}) for out in outputs]
        method = self._method(hparams, shapes)
        self.golden.option.trained(method)
        losses = method(*outputs, Target(torch.zeros(1)), {})
        loss = torch.stack(list(losses.values())).sum()
        self.values["loss_distil"] = loss.detach()
        return self._total(loss, hparams["distil_loss_coef"])

    def _method(self, hparams: Mapping[str, Any], shapes: list[Shapes]) -> TokenMethod:
        levels = sum(role.startswith(PATCH) for role in shapes[0].taps)
        if hparams["projector"] == "none":
            return ViDTTokens(ViDTTokens.Config(levels=levels), *shapes, {})
        cfg = VkDTokens.Config(levels=levels, map=hparams.get("orthogonal_map", "auto"), affine=True)
        method = VkDTokens(cfg, *shapes, {}).double()
        for role, projector in method.projectors.items():
            kind, _, level = role.partition("_")
            official = f"{PATCH}_projector_{int(level) + 1}" if level else f"{kind}_det_projector"
            assert isinstance(projector, TokenProjector)
            self._load(projector, f"param/{official}")
        return method

    def _load(self, projector: TokenProjector, official: str) -> None:
        state = {name: self.golden.tensors[f"{official}.{name}"] for name in ("weight", "bias")}
        projection = projector.projection
        _set_recorded_base(projection, self.golden.tensors[f"{official}.projector.base"])
        leaves = {"projector.original": projection.original, "weight": projector.scale, "bias": projector.bias}
        values = {"projector.original": self.golden.tensors[f"{official}.projector.original"], **state}
        effective = self.golden.tensors[f"{official}.projector.weight_effective"].clone()
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(values[name])
                self.leaves[f"{official}.{name}"] = leaf
        self.leaves[f"{official}.projector.weight_effective"] = effective

        def watch(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            # W is formed by sending unit vectors through the projection
            output.register_hook(lambda gradient: setattr(effective, "grad", gradient.T))

        projection.register_forward_hook(watch)


def _set_recorded_base(projection: OrthogonalProjection, base: Tensor) -> None:
    """Start from the base as it is: it was recorded orthonormal to float32's precision, ours is to float64's."""
    projection.set_base(base)
    exact = reflect(projection.base_vectors, projection.base_factor, torch.diag(projection.base_signs))
    rounding = base @ exact[:, : base.shape[1]].T  # the identity but for 1e-7
    if projection.wide:
        projection.register_forward_pre_hook(lambda module, inputs: (inputs[0] @ rounding,))
    else:
        projection.register_forward_hook(lambda module, inputs, output: output @ rounding.T)


def _outputs(side: str, inputs: Mapping[str, Tensor]) -> Outputs:
    """Tokens under our roles, batch first."""
    prefix = f"{side}_{PATCH}_"
    taps = {f"{PATCH}_{name.removeprefix(prefix)}": inputs[name] for name in inputs if name.startswith(prefix)}
    taps |= {BODY: inputs[f"{side}_body_det"], NECK: inputs[f"{side}_neck_det"].transpose(0, 1)}
    return Outputs(torch.zeros(1, 1), taps=taps)


class AttentionCase(DetectionCase):
    """Deformable attention of given queries."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """The module, watched at its core."""
        hparams = self.golden.hparams
        names = ("query", "input_flatten", "reference_points", "padding_mask", "spatial_shapes", "loss_weight")
        inputs = self._inputs(*names)
        check_fact(hparams, "reference_dim", inputs["reference_points"].shape[-1])
        config = DeformableDetrConfig(
            d_model=hparams["d_model"],
            num_feature_levels=hparams["n_levels"],
            decoder_attention_heads=hparams["n_heads"],
            decoder_n_points=hparams["n_points"],
        )
        attention = SampledAttention(config, hparams["n_heads"], hparams["n_points"]).double()
        load(attention, self.golden.group("param/"))
        self.leaves |= {f"param/{name}": value for name, value in attention.named_parameters()}
        attention.attn.register_forward_hook(self._watch)
        self.golden.option.trained(attention)
        shapes = inputs["spatial_shapes"]
        output, _ = attention(
            inputs["query"],
            attention_mask=~inputs["padding_mask"],
            encoder_hidden_states=inputs["input_flatten"],
            reference_points=inputs["reference_points"],
            spatial_shapes=shapes,
            spatial_shapes_list=[(int(height), int(width)) for height, width in shapes],
            level_start_index=torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1])),
        )
        self.values["output"] = output.detach()
        return self._total((output * inputs["loss_weight"]).sum())

    def _watch(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, *_, locations, weights, _ = inputs
        core = {"value": value, "sampling_locations": locations, "attention_weights": weights, "output": output}
        self.values |= {f"core_{name}": tensor.detach() for name, tensor in core.items()}


CASES = {
    "vidt": NetworkCase,
    "vidt_criterion": CriterionCase,
    "vidt_kd": TokensCase,
    "deform_attn": AttentionCase,
}
