import contextlib
import io
import json
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_hf.detection.data.objects import make_objects
from kd_hf.detection.metrics.average_precision import NAMES, Results, average_precision
from kd_hf.draws import generator
from kd_hf.errors import UserError

IDS = (1, 2, 5)


def made(images=30, seed=0, crowds=True, sides=(4, 200)):
    """Objects of all sizes, some crowds, some images without any, and what a mediocre network finds."""
    draws = generator("detections", seed)
    truth, scores, classes, boxes = [], [], [], []
    for row in range(images):
        count = 0 if row % 5 == 4 else int(draws.integers(1, 8))
        own = np.concatenate([draws.uniform(0, 200, (count, 2)), draws.uniform(*sides, (count, 2))], 1)
        numbers = draws.choice(IDS, count)
        crowd = (draws.random(count) < 0.2) & crowds
        area = own[:, 2:].prod(1) * draws.uniform(0.5, 1, count)
        truth.append(make_objects(own, numbers, area, crowd, image_id=900 - row, size=(400, 400)))
        near = np.repeat(own, 3, 0) + draws.normal(0, 6, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:] + near[:, :2], near[:, :2] + 1)
        others = 24 - len(near)
        far = draws.uniform(0, 200, (others, 4))
        far[:, 2:] += far[:, :2]
        boxes.append(np.concatenate([near, far]).astype(np.float32))
        classes.append(np.concatenate([np.repeat(numbers, 3), draws.choice([*IDS, -1], others)]).astype(np.int64))
        scores.append(
            np.concatenate([draws.uniform(0.2, 1, len(near)), draws.uniform(0, 0.6, others)]).astype(np.float32)
        )
    return Results(np.arange(images), np.stack(scores), np.stack(classes), np.stack(boxes), tuple(truth))


def direct(results, tmp_path):
    """pycocotools on files, as its documentation shows."""
    number, annotations, found = 0, [], []
    for row, objects in zip(results.rows.tolist(), results.truth, strict=True):
        for (x, y, right, bottom), label, area, crowd in zip(
            objects.boxes.tolist(),
            objects.classes.tolist(),
            objects.area.tolist(),
            objects.iscrowd.tolist(),
            strict=True,
        ):
            number += 1
            annotations.append({"id": number, "image_id": row, "category_id": label, "area": area,
                                "bbox": [x, y, right - x, bottom - y], "iscrowd": int(crowd)})  # fmt: skip
    for row, *parts in zip(results.rows.tolist(), results.scores, results.classes, results.boxes, strict=True):
        for score, label, (x, y, right, bottom) in zip(*(part.tolist() for part in parts), strict=True):
            if label >= 0:
                box = [x, y, float(np.float32(right) - np.float32(x)), float(np.float32(bottom) - np.float32(y))]
                found.append({"image_id": row, "category_id": label, "bbox": box, "score": score})
    images = [{"id": row} for row in results.rows.tolist()]
    truth = {"images": images, "annotations": annotations, "categories": [{"id": number} for number in IDS]}
    for name, value in (("truth", truth), ("found", found)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "truth.json")
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_numbers_are_pycocotools(tmp_path, seed, capsys):
    results = made(seed=seed)
    values = average_precision(results, IDS)
    assert capsys.readouterr().out == ""
    assert tuple(values) == NAMES and 5 < values["ap"] < 90
    assert [values[name] for name in NAMES] == (100 * direct(results, tmp_path)).tolist()


def test_crowds_are_not_missed_and_not_wrong():
    values, without = average_precision(made(), IDS), average_precision(made(crowds=False), IDS)
    assert values != without


def test_numbers_that_there_are_no_objects_for_are_left_out(tmp_path):
    small = made(sides=(4, 30))
    values = average_precision(small, IDS)
    assert set(NAMES) - set(values) == {"ap_medium", "ap_large", "ar_medium", "ar_large"}
    assert (direct(small, tmp_path) < 0).sum() == 4


def test_nothing_found_is_no_precision():
    results = made(6)
    nothing = Results(results.rows, results.scores, np.full_like(results.classes, -1), results.boxes, results.truth)
    assert set(average_precision(nothing, IDS).values()) == {0.0}


def test_nothing_annotated_is_no_number():
    results = made(6)
    empty = tuple(make_objects([], []) for _ in results.truth)
    assert average_precision(Results(results.rows, results.scores, results.classes, results.boxes, empty), IDS) == {}


def test_a_single_object_that_is_found_is_found():
    # the first annotation's number must not be 0, which pycocotools takes for no match
    box = make_objects([[10, 10, 50, 50]], [1])
    one = Results(np.array([0]), np.ones((1, 1), np.float32), np.ones((1, 1), np.int64), box.boxes[None], (box,))
    assert average_precision(one, IDS)["ap"] == pytest.approx(100)


def part(results, chosen):
    arrays = (getattr(results, name)[chosen] for name in ("rows", "scores", "classes", "boxes"))
    return Results(*arrays, truth=tuple(results.truth[place] for place in chosen))


def test_parts_of_ranks_are_joined_and_images_that_were_seen_twice_count_once():
    results = made(12)
    joined = Results.join([part(results, [7, 8, 9, 10, 11, 0]), part(results, [0, 1, 2, 3, 4, 5, 6, 7])])
    assert joined.rows.tolist() == list(range(12))
    assert [o.image_id for o in joined.truth] == [o.image_id for o in results.truth]
    assert average_precision(joined, IDS) == average_precision(results, IDS)


def test_without_pycocotools_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"^average precision needs pycocotools: pip install kd_hf\[detection\]$"):
        average_precision(made(2), IDS)
