from types import SimpleNamespace

import pytest
import torch
from transformers import DeformableDetrImageProcessor, DetrImageProcessor

from kd_hf.detection.data.categories import coco_ids, numbered_names
from kd_hf.detection.metrics.postprocess import Head, best_classes, highest_scores
from kd_hf.errors import UserError

SIZE = torch.tensor([[120, 80], [333, 517]])
OFFICIAL = numbered_names({number: name for name, number in coco_ids().items()}, "")


def predicted(queries=50, outputs=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, queries, outputs, generator=generator) * 3
    return logits, torch.rand(2, queries, 4, generator=generator)


def assert_same(found, expected):
    for place, entry in enumerate(expected):
        assert torch.allclose(found.scores[place], entry["scores"])
        assert torch.equal(found.classes[place], entry["labels"])
        assert torch.allclose(found.boxes[place], entry["boxes"], atol=1e-4)


def test_a_sigmoid_for_each_class_as_in_transformers():
    logits, boxes = predicted()
    found = highest_scores(logits, boxes, SIZE)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    options = {"threshold": -1.0, "top_k": 100, "target_sizes": SIZE}
    assert found.scores.shape == (2, 100)
    assert_same(found, DeformableDetrImageProcessor().post_process_object_detection(outputs, **options))


def test_few_queries_give_all_they_have():
    assert highest_scores(*predicted(queries=3), SIZE).scores.shape == (2, 21)


def test_a_softmax_with_no_object_last_as_in_transformers():
    logits, boxes = predicted()
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    expected = DetrImageProcessor().post_process_object_detection(outputs, threshold=-1.0, target_sizes=SIZE)
    assert_same(best_classes(logits, boxes, SIZE), expected)


@pytest.mark.parametrize(
    ("names", "outputs", "rule"),
    [
        (("a", "b", "c"), 3, highest_scores),
        (("a", "b", "c"), 4, best_classes),
        (OFFICIAL, 91, highest_scores),
        (OFFICIAL, 92, best_classes),
        (OFFICIAL, 80, highest_scores),
        (tuple(coco_ids()), 91, highest_scores),
        (tuple(coco_ids()), 92, best_classes),
        (tuple(coco_ids()), 81, best_classes),
    ],
)
def test_the_number_of_outputs_tells_the_kind_of_head(names, outputs, rule):
    assert Head(names, outputs).rule is rule


def test_outputs_are_read_as_classes_of_the_data():
    logits, boxes = predicted(outputs=91)
    found, raw = Head(tuple(coco_ids()), 91)(logits, boxes, SIZE), highest_scores(logits, boxes, SIZE)
    numbers = list(coco_ids().values())
    assert found.classes.tolist() == [
        [numbers.index(c) if c in numbers else -1 for c in row] for row in raw.classes.tolist()
    ]


def test_a_head_that_fits_no_rule_is_refused():
    with pytest.raises(UserError, match="the network has 6 classes, the data 3"):
        Head(("a", "b", "c"), 6)
