"""The loss against plain loops, and batches with few objects or none."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

from kd_hf.detection.networks.vidt_losses import WEIGHTS, Criterion, Matcher, detection_loss, token_targets
from tests.detection.tiny import PLUS, batch, objects, tiny_config, tiny_network


def predictions(queries=4, classes=5, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(2, queries, classes, dtype=torch.float64, requires_grad=True)
    boxes = (0.2 + 0.5 * torch.rand(2, queries, 4, dtype=torch.float64)).requires_grad_()
    return {"logits": logits, "pred_boxes": boxes}


def focal(logits, truth):
    """α and 1 - α weigh the two sides, γ is 2."""
    right = torch.where(truth, logits.sigmoid(), 1 - logits.sigmoid())
    return torch.where(truth, 0.25, 0.75) * (1 - right) ** 2 * -right.log()


def cost(logits, box, label, wanted):
    p = logits[label].sigmoid()
    classes = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted)]
    return 2 * classes + 5 * (box - wanted).abs().sum() - 2 * generalized_box_iou(*corners)[0, 0]


def test_matching_is_the_cheapest():
    out, targets = predictions(), objects((3, 1))
    pairs = Matcher(2, 5, 2)(out, targets)
    for image, (queries, indices) in enumerate(pairs):
        target = targets[image]

        def price(chosen, image=image, target=target):
            logits, boxes = out["logits"][image], out["pred_boxes"][image]
            wanted = zip(chosen, target["class_labels"], target["boxes"], strict=True)
            return sum(cost(logits[q], boxes[q], label, box) for q, label, box in wanted)

        count = len(target["boxes"])
        best = min(permutations(range(4), count), key=price)
        assert dict(zip(indices.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_parts_against_loops():
    out, targets, config = predictions(), objects((3, 1)), tiny_config()
    loss, parts = detection_loss(config, out, targets)
    expected = dict.fromkeys(("loss_ce", "loss_bbox", "loss_giou"), 0.0)
    for image, (queries, indices) in enumerate(Matcher(2, 5, 2)(out, targets)):
        truth = torch.zeros(4, 5, dtype=torch.bool)
        for query, index in zip(queries, indices, strict=True):
            truth[query, targets[image]["class_labels"][index]] = True
            box, wanted = out["pred_boxes"][image, query], targets[image]["boxes"][index]
            corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, wanted)]
            expected["loss_bbox"] += (box - wanted).abs().sum() / 4
            expected["loss_giou"] += (1 - generalized_box_iou(*corners)[0, 0]) / 4
        expected["loss_ce"] += focal(out["logits"][image], truth).sum() / 4
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)
    torch.testing.assert_close(loss, sum(WEIGHTS[name] * value for name, value in expected.items()))


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (0, 6), (1, 6)])
def test_images_without_objects(counts):
    """Even a batch without any, and one with more objects than queries."""
    out = predictions()
    loss, parts = detection_loss(tiny_config(), {**out, "auxiliary_outputs": [predictions(seed=1)]}, objects(counts))
    loss.backward()
    assert loss.isfinite() and all(value.isfinite().all() for value in parts.values())
    assert out["logits"].grad.abs().max() > 0
    # a box head must have a gradient in every process, be it zero
    assert out["pred_boxes"].grad is not None and out["pred_boxes"].grad.isfinite().all()
    if counts == (0, 0):
        assert parts["loss_bbox"] == parts["loss_giou"] == parts["loss_bbox_0"] == 0
        torch.testing.assert_close(parts["loss_ce"], focal(out["logits"], torch.tensor(False)).sum())


def test_a_whole_network_on_images_without_objects():
    network, (pixels, mask) = tiny_network(**PLUS), batch()
    out = network(pixels, mask, objects((0, 0)))
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_weights_and_costs_are_the_configurations():
    out, targets = predictions(), objects()
    _, parts = detection_loss(tiny_config(), out, targets)
    other = tiny_config(loss_weights={"loss_ce": 1.0, "loss_giou": 0.0})
    torch.testing.assert_close(detection_loss(other, out, targets)[0], parts["loss_ce"] + 5 * parts["loss_bbox"])
    criterion = Criterion(tiny_config(class_cost=7.0, focal_alpha=0.5))
    assert criterion.matcher.class_cost == 7 and criterion.focal_alpha == 0.5


def test_every_earlier_prediction_is_matched_anew():
    first, last, targets = predictions(seed=1), predictions(), objects()
    loss, parts = detection_loss(tiny_config(), {**last, "auxiliary_outputs": [first]}, targets)
    alone = [detection_loss(tiny_config(), one, targets) for one in (first, last)]
    torch.testing.assert_close(loss, alone[0][0] + alone[1][0])
    torch.testing.assert_close(parts["loss_giou_0"], alone[0][1]["loss_giou"])


def test_logged_class_error():
    out, targets = predictions(), objects((1, 1))
    queries = [pair[0] for pair in Matcher(2, 5, 2)(out, targets)]
    with torch.no_grad():
        out["logits"][0, queries[0], targets[0]["class_labels"]] += 20
        out["logits"][1, queries[1], 0] += 20
    assert detection_loss(tiny_config(), {**out, "auxiliary_outputs": []}, targets)[1]["class_error"] == 50


def test_overlaps_are_learned_and_reach_the_boxes():
    out, targets = predictions(), objects((1, 1))
    out["pred_ious"] = torch.randn(2, 4, 1, dtype=torch.float64)
    _, parts = detection_loss(tiny_config(), out, targets)
    expected = 0.0
    for image, (query, _) in enumerate(Matcher(2, 5, 2)(out, targets)):
        boxes = box_convert(
            torch.stack([out["pred_boxes"][image, query[0]], targets[image]["boxes"][0]]), "cxcywh", "xyxy"
        )
        inner = (boxes[:, 2:].amin(0) - boxes[:, :2].amax(0)).clamp(min=0).prod()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        p = out["pred_ious"][image, query[0], 0].sigmoid()
        overlap = inner / (areas.sum() - inner)
        expected += -(overlap * p.log() + (1 - overlap) * (1 - p).log()) / 2
    torch.testing.assert_close(parts["loss_iouaware"], expected)
    parts["loss_iouaware"].backward()
    assert out["pred_boxes"].grad.abs().max() > 0


def test_token_targets_against_a_loop():
    labels = objects((3, 1))
    found = token_targets(labels, 5)
    assert found.shape == (2, 5, 64, 70)
    for image, target in enumerate(labels):
        for row in range(0, 64, 3):
            for column in range(0, 70, 3):
                here = [
                    int(label)
                    for label, mask in zip(target["class_labels"], target["masks"], strict=True)
                    if row < mask.shape[0] and column < mask.shape[1] and mask[row, column]
                ]
                expected = [0.0] * 5
                if here:
                    expected[0] = expected[here[0]] = 1.0
                assert found[image, :, row, column].tolist() == expected
    assert found[0, 0].sum() > 0


def test_token_loss_against_loops():
    out, labels = predictions(), objects((2, 1))
    torch.manual_seed(4)
    out["token_logits"] = [torch.randn(2, *size, 5, dtype=torch.float64) for size in ((8, 10), (4, 5))]
    _, parts = detection_loss(tiny_config(), out, labels)
    classes, expected = token_targets(labels, 5).double(), {"loss_token_focal": 0.0, "loss_token_dice": 0.0}
    for level in out["token_logits"]:
        soft = F.adaptive_avg_pool2d(classes, level.shape[1:3]).movedim(1, -1)
        p = level.sigmoid()
        right = p * soft + (1 - p) * (1 - soft)
        entropy = -(soft * p.log() + (1 - soft) * (1 - p).log())
        values = (0.25 * soft + 0.75 * (1 - soft)) * (1 - right) ** 2 * entropy
        expected["loss_token_focal"] += values.mean((1, 2)).sum() / 3
        for q, t in zip(p, soft, strict=True):
            expected["loss_token_dice"] += (1 - (2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1)) / 3
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value)


def test_single_precision_predictions_take_any_targets():
    out = {name: value.detach().to(torch.bfloat16) for name, value in predictions().items()}
    loss, _ = detection_loss(tiny_config(), out, objects())
    assert loss.dtype == torch.float32
