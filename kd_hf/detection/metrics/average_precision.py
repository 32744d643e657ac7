"""COCO's average precision, by pycocotools, of detections that may come from several processes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from kd_hf.detection.data.objects import Objects
from kd_hf.errors import UserError

NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""The 12 numbers in pycocotools' order: precision over IoU 0.5 … 0.95, at 0.5 and 0.75, of small (area below 32²),
medium and large (from 96²) objects; recall with 1, 10 and 100 detections of an image, and by size."""


@dataclass(frozen=True, eq=False)
class Results:
    """What was found in images, and what is in them."""

    rows: np.ndarray
    """int64 ``[N]``: of the source."""
    scores: np.ndarray
    """float32 ``[N, D]``."""
    classes: np.ndarray
    """int64 ``[N, D]``; -1 is not counted."""
    boxes: np.ndarray
    """float32 ``[N, D, 4]``: left, top, right, bottom in pixels of the stored image."""
    truth: tuple[Objects, ...]

    @classmethod
    def join(cls, parts: Sequence[Results]) -> Results:
        """All of them in the order of their rows, each image once."""
        rows, first = np.unique(np.concatenate([part.rows for part in parts]), return_index=True)
        truth = [objects for part in parts for objects in part.truth]
        scores, classes, boxes = (
            np.concatenate([getattr(part, name) for part in parts])[first] for name in ("scores", "classes", "boxes")
        )
        return cls(rows, scores, classes, boxes, tuple(truth[index] for index in first))


def need_pycocotools() -> None:
    """Raise :class:`UserError` when pycocotools is not installed."""
    if find_spec("pycocotools") is None:
        raise UserError("average precision needs pycocotools: pip install kd_hf[detection]")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools prints what it does, and its table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def average_precision(results: Results, category_ids: Sequence[int]) -> dict[str, float]:
    """The 12 numbers of COCO by :data:`NAMES`, in percent; without those that there are no objects for.

    Args:
        results: every image once.
        category_ids: the classes of the data.

    Raises:
        UserError: pycocotools is not installed.
    """
    need_pycocotools()
    from pycocotools.cocoeval import COCOeval

    with _silent():
        truth = _indexed(results.rows, category_ids, list(_true_entries(results)))
        found = _indexed(results.rows, category_ids, list(found_entries(results)))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100.0 * float(value) for name, value in zip(NAMES, evaluation.stats, strict=True) if value >= 0}


def _indexed(rows: np.ndarray, category_ids: Sequence[int], entries: list[dict[str, Any]]) -> Any:
    """A ``COCO`` of annotations; their ids count from 1, because pycocotools takes 0 for no match."""
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "images": [{"id": row} for row in rows.tolist()],
        "categories": [{"id": number} for number in category_ids],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
    }
    index.createIndex()
    return index


def _true_entries(results: Results) -> Iterator[dict[str, Any]]:
    for row, objects in zip(results.rows.tolist(), results.truth, strict=True):
        finite = objects.only(np.isfinite(objects.boxes).all(1))
        lists = (part.tolist() for part in (finite.classes, finite.area, finite.iscrowd))
        for box, number, area, crowd in zip(_with_sides(finite.boxes), *lists, strict=True):
            yield {"image_id": row, "category_id": number, "bbox": box, "area": area, "iscrowd": int(crowd)}


def found_entries(results: Results) -> Iterator[dict[str, Any]]:
    """Detections as COCO's own JSON writes them, with the row for the image's number."""
    found = (results.scores, results.classes, results.boxes)
    for row, scores, classes, boxes in zip(results.rows.tolist(), *found, strict=True):
        for box, number, score in zip(_with_sides(boxes), classes.tolist(), scores.tolist(), strict=True):
            if number >= 0:
                area = box[2] * box[3]
                yield {"image_id": row, "category_id": number, "bbox": box, "area": area, "iscrowd": 0, "score": score}


def _with_sides(boxes: np.ndarray) -> list[list[float]]:
    """Left, top, width and height, as COCO has them."""
    found: list[list[float]] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    return found
