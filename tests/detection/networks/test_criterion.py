"""The loss of every architecture against transformers' own, and over processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.loss.loss_rt_detr import RTDetrLoss

from kd_hf.detection.data.stage import BoxTarget, Images
from kd_hf.detection.methods.detection import DetectionLoss
from kd_hf.detection.networks.criterion import Judge, object_count
from kd_hf.detection.networks.info import BoxOutputs
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing
from kd_hf.outputs import Outputs
from tests.detection.detectors import QUERIES, TINY, detector, handle, images, objects

KINDS = sorted(TINY)
FIRST = {"class", "bbox", "giou"}
STAGES = {"stage_0", "stage_1"}
NAMES = {
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine"), FIRST | STAGES | {"encoder", "denoising"}),
    **dict.fromkeys(("lw_detr", "rf_detr"), FIRST | STAGES | {"encoder"}),
    "yolos": FIRST,
}


def part(given, target, rows):
    return Images(given.pixels[rows], given.mask[rows]), BoxTarget(target.classes[rows], target.boxes[rows])


@pytest.fixture(autouse=True)
def own_queries_only(monkeypatch):
    """transformers before 5.18 matches denoising queries in the last stage, too, as if they were the network's own."""
    forward = RTDetrLoss.forward

    def without_denoising(loss, outputs, targets):
        last = {name: outputs[name][:, -QUERIES:] for name in ("logits", "pred_boxes")}
        return forward(loss, {**outputs, **last}, targets)

    monkeypatch.setattr(RTDetrLoss, "forward", without_denoising)


def own_loss(model, given, target):
    """As a user of transformers computes it, with boxes in the frame that the network knows."""
    frame = torch.ones(len(given), 4)
    if not model.family.masked:
        valid = ~given.mask
        sides = torch.stack([valid.any(1).sum(1) / valid.shape[2], valid.any(2).sum(1) / valid.shape[1]], 1)
        frame = sides.repeat(1, 2)
    scaled = zip(target.classes, target.boxes, frame, strict=True)
    labels = [{"class_labels": classes, "boxes": boxes * ratio} for classes, boxes, ratio in scaled]
    mask = {"pixel_mask": (~given.mask).long()} if model.family.masked else {}
    return model.network(given.pixels, labels=labels, **mask).loss


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_own(kind):
    """In training, with denoising queries and groups: the sum and the gradient of every parameter."""
    model, given, target = detector(kind).train(), images(), objects()
    torch.manual_seed(3)  # of the noise in denoising
    own = own_loss(model, given, target)
    own.backward()
    wanted = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(3)
    parts = model(given, target).criterion(target)
    assert set(parts) == NAMES.get(kind, FIRST | STAGES)
    assert all(value.shape == () for value in parts.values())
    total = sum(parts.values())
    torch.testing.assert_close(total, own, rtol=1e-5, atol=1e-5)
    total.backward()
    found = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)


def test_without_auxiliary_loss():
    for kind in ("detr", "rt_detr_v2", "lw_detr"):
        model, given, target = detector(kind, auxiliary_loss=False).train(), images(), objects()
        torch.manual_seed(3)
        own = own_loss(model, given, target)
        torch.manual_seed(3)
        parts = model(given, target).criterion(target)
        torch.testing.assert_close(sum(parts.values()), own, rtol=1e-5, atol=1e-5)
        assert "stage_0" not in parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_objects(kind):
    """The same names, finite, and a gradient that says that nothing is there."""
    model, target = detector(kind).train(), objects((0, 0, 0))
    parts = model(images(), target).criterion(target)
    assert set(parts) == NAMES.get(kind, FIRST | STAGES)
    assert all(value.isfinite() for value in parts.values()) and parts["class"] > 0 == parts["bbox"]
    sum(parts.values()).backward()


def test_half_precision_predictions_are_judged_in_full():
    model, given, target = detector("rt_detr_v2").eval(), images(), objects()
    with torch.autocast("cpu", torch.bfloat16):
        seen = model(given)
        rough = seen.criterion(target)
    assert seen.logits.dtype == torch.bfloat16 and seen.boxes.dtype == torch.float32
    exact = model(given).criterion(target)
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        assert abs(rough[name] - value) < 0.2 * value + 0.05


def fake_ranks(monkeypatch, counts):
    """torch.distributed as one of several processes sees it, whose objects are as many."""
    others = iter(counts)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(next(others)))


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr_v2", "lw_detr", "kd_hf_vidt"])
def test_two_ranks_equal_one(kind, monkeypatch):
    """However unevenly the objects are spread; every image here is on its own, so that only the count couples them."""
    model, given, target = detector(kind).eval(), images(((64, 96),) * 4), objects((3, 2, 0, 1))
    whole = model(given).criterion(target)
    fake_ranks(monkeypatch, [1, 5])
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        some, theirs = part(given, target, rows)
        halves.append(model(some).criterion(theirs))
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value, rtol=1e-4, atol=1e-5)


def test_objects_are_counted_once(monkeypatch):
    labels = [{"class_labels": torch.zeros(n)} for n in (3, 0, 2)]
    assert object_count(labels, torch.device("cpu")) == 5
    assert object_count(labels[1:2], torch.device("cpu")) == 1
    fake_ranks(monkeypatch, [2, 0])
    assert object_count(labels, torch.device("cpu")) == 3.5
    assert object_count(labels[1:2], torch.device("cpu")) == 0.5  # one for the whole batch


def test_the_method_asks_the_network():
    model, given, target = detector("yolos").eval(), images(), objects()
    method = DetectionLoss(DetectionLoss.Config(), None, None, {})
    info = handle("yolos", device="meta").info
    needs = DetectionLoss.needs(method.cfg, info, None)
    assert needs.labels == "hard" and needs.batch_coupled and not needs.student
    seen = model(given)
    assert isinstance(seen.criterion, Judge)
    # as it is handed to a method: with that method's taps only
    seen = dataclasses.replace(seen, taps={})
    assert isinstance(seen, BoxOutputs) and isinstance(seen, Outputs)
    assert method(seen, None, target, {}) == seen.criterion(target)


def test_what_cannot_be_learned_is_refused():
    info = handle("kd_hf_vidt", device="meta", token_label=True).info
    with pytest.raises(UserError, match=r"learns from masks.*token_label: false"):
        DetectionLoss.needs(DetectionLoss.Config(), info, None)
    classifier = ModelInfo("a ViT", "torch", 5, Preprocessing())
    with pytest.raises(UserError, match="is no detector"):
        DetectionLoss.needs(DetectionLoss.Config(), classifier, None)
