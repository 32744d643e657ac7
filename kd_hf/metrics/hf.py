"""The metrics of this package as ``evaluate.Metric`` objects: made offline, combined with others, exact.

    >>> import evaluate
    >>> metrics = evaluate.combine([TopAccuracy(), Agreement()])

They take class indices and single probabilities, never logits (which would be written to disk). Training and
``kd_hf.eval`` sum on the device instead, see :mod:`kd_hf.metrics.meters`; both give the same numbers. Combined metrics
read the inputs that bear their names:

    >>> metrics = evaluate.combine([TopAccuracy(), CalibrationError(), NegativeLogLikelihood()])
    >>> metrics.add_batch(predictions=ranked, references=labels, confidences=p.max(1), correct=hit, likelihoods=p_label)
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from kd_hf.metrics.meters import BINS, TOP

_CITATION = "kd_hf: knowledge distillation for vision models"
_INTEGER, _NUMBER = datasets.Value("int64"), datasets.Value("float64")
_CLASSES = [
    datasets.Features({"predictions": _INTEGER, "references": _INTEGER}),
    datasets.Features({"predictions": datasets.Sequence(_INTEGER), "references": _INTEGER}),
]


def _info(description: str, inputs: str, features: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation=_CITATION, inputs_description=inputs, features=features
    )


class TopAccuracy(evaluate.Metric):
    """Percent of images whose label is the first choice (``top1``), or among the first five (``top5``).

    Predictions are class indices, or rows of them from most to least likely; ``top5`` needs rows.
    """

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions: class indices, or ranked rows of them; references: labels"
        return _info("Top-1 and top-5 accuracy in percent.", inputs, _CLASSES)

    def _compute(self, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        ranked, labels = _ranked(predictions), np.asarray(references)
        hits = ranked[:, :TOP] == labels[:, None]
        values = {"top1": 100.0 * float(hits[:, 0].mean())}
        if ranked.shape[1] > 1:
            values["top5"] = 100.0 * float(hits.any(1).mean())
        return values


class Agreement(evaluate.Metric):
    """Percent of images on which two networks choose the same class; references are the teacher's choices."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions: class indices, or ranked rows of them; references: the teacher's choices"
        return _info("Agreement of two networks in percent.", inputs, _CLASSES)

    def _compute(self, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, float]:
        same = _ranked(predictions)[:, 0] == np.asarray(references)
        return {"agreement": 100.0 * float(same.mean())}


class CalibrationError(evaluate.Metric):
    """Expected calibration error (``ece``) in percent, over 15 bins; as :class:`kd_hf.metrics.meters.Calibration`.

    Confidences are probabilities of first choices, `correct` whether (1 or 0) these were right.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"confidences": _NUMBER, "correct": _INTEGER})
        inputs = "confidences: probability of the first choice; correct: 1 where it was right, else 0"
        return _info("Expected calibration error in percent.", inputs, features)

    def _compute(self, confidences: Any = None, correct: Any = None, **_: Any) -> dict[str, float]:
        confidence, right = np.asarray(confidences), np.asarray(correct)
        index = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        gaps = np.bincount(index, right - confidence, BINS)
        return {"ece": 100.0 * float(np.abs(gaps).sum()) / len(confidence)}


class NegativeLogLikelihood(evaluate.Metric):
    """Mean of −log p over images (``nll``) in nats; likelihoods are the probabilities p of the labels."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"likelihoods": _NUMBER})
        return _info("Negative log-likelihood in nats.", "likelihoods: probability of the label", features)

    def _compute(self, likelihoods: Any = None, **_: Any) -> dict[str, float]:
        return {"nll": -float(np.log(np.asarray(likelihoods)).mean())}


def _ranked(predictions: Any) -> np.ndarray:
    """Predictions as int64 ``[N, k]``, best first."""
    values = np.asarray(predictions)
    return values[:, None] if values.ndim == 1 else values
