"""Sizes, and the frame that boxes are relative to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd_hf.detection.networks.vidt import ViDTOutput
from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor

SMALL = {"shortest_edge": 100, "longest_edge": 150}


@pytest.mark.parametrize(
    ("given", "expected"),
    [((480, 640), (800, 1056)), ((640, 480), (1056, 800)), ((427, 640), (800, 1184)), ((300, 900), (432, 1328))],
)
def test_sides_are_multiples_of_16(given, expected):
    pixels = ViDTImageProcessor()(np.zeros((*given, 3), np.uint8), return_tensors="pt").pixel_values
    assert tuple(pixels.shape[-2:]) == expected


def annotation(x, y, width, height, label=3):
    one = {"bbox": [x, y, width, height], "category_id": label, "area": width * height, "iscrowd": 0, "id": 1}
    return {"image_id": 7, "annotations": [one]}


def test_boxes_are_relative_to_the_image_without_padding():
    images = [np.zeros((60, 80, 3), np.uint8), np.zeros((80, 60, 3), np.uint8)]
    batch = ViDTImageProcessor(size=SMALL)(images, [annotation(20, 15, 40, 30), annotation(0, 0, 60, 80)])
    batch = batch.convert_to_tensors("pt") if not torch.is_tensor(batch["pixel_values"]) else batch
    assert tuple(batch["pixel_values"].shape[-2:]) == (128, 128)
    assert [tuple(mask.nonzero().amax(0) + 1) for mask in batch["pixel_mask"]] == [(96, 128), (128, 96)]
    boxes = [torch.as_tensor(labels["boxes"])[0].tolist() for labels in batch["labels"]]
    assert boxes[0] == pytest.approx([0.5, 0.5, 0.5, 0.5])
    assert boxes[1] == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert [int(torch.as_tensor(labels["class_labels"])[0]) for labels in batch["labels"]] == [3, 3]


def test_masks_stay_those_of_the_image():
    annotated = {"boxes": torch.rand(2, 4), "masks": torch.ones(2, 5, 6), "size": (5, 6)}
    image, mask, padded = ViDTImageProcessor().pad(torch.ones(3, 5, 6), (8, 8), annotated, update_bboxes=True)
    assert image.shape == (3, 8, 8) and mask.sum() == 30
    assert padded is annotated


def test_boxes_come_back_in_pixels():
    logits = torch.full((1, 3, 4), -9.0)
    logits[0, 1, 2] = 5.0
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5], [0.9, 0.9, 0.1, 0.1]]])
    out = ViDTOutput(logits=logits, pred_boxes=boxes)
    (found,) = ViDTImageProcessor().post_process_object_detection(out, threshold=0.5, target_sizes=[(60, 80)])
    assert found["labels"].tolist() == [2]
    torch.testing.assert_close(found["boxes"], torch.tensor([[20.0, 15.0, 60.0, 45.0]]))
    (every,) = ViDTImageProcessor().post_process_object_detection(out, threshold=-1, target_sizes=[(60, 80)])
    assert len(every["scores"]) == 12
