"""The metrics of this package as ``evaluate.Metric`` objects: made offline, combined with others, exact.

    >>> import evaluate
    >>> metrics = evaluate.combine([TopAccuracy(), Agreement()])

They take class indices, never logits (which would be written to disk). Training and ``kd_hf.eval`` count on the
device instead, see :mod:`kd_hf.metrics`; both give the same numbers.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = "kd_hf: knowledge distillation for vision models"


def _info(description: str, inputs: str, references: str) -> evaluate.MetricInfo:
    feature = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
    ranked = datasets.Features(
        {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
    )
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=f"predictions: {inputs}; references: {references}",
        features=[feature, ranked],
    )


class TopAccuracy(evaluate.Metric):
    """Percent of images whose label is the first choice (``top1``), or among the first five (``top5``).

    Predictions are class indices, or rows of them from most to least likely; ``top5`` needs rows.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Top-1 and top-5 accuracy in percent.", "class indices, or ranked rows of them", "labels")

    def _compute(self, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        ranked, labels = _ranked(predictions), np.asarray(references)
        hits = ranked[:, :5] == labels[:, None]
        values = {"top1": 100.0 * float(hits[:, 0].mean())}
        if ranked.shape[1] > 1:
            values["top5"] = 100.0 * float(hits.any(1).mean())
        return values


class Agreement(evaluate.Metric):
    """Percent of images on which two networks choose the same class; references are the teacher's choices."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Agreement of two networks in percent.", "class indices, or ranked rows", "the teacher's choices")

    def _compute(self, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        same = _ranked(predictions)[:, 0] == np.asarray(references)
        return {"agreement": 100.0 * float(same.mean())}


def _ranked(predictions: Any) -> np.ndarray:
    """Predictions as int64 ``[N, k]``, best first."""
    values = np.asarray(predictions)
    return values[:, None] if values.ndim == 1 else values
