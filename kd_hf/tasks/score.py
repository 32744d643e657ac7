"""The numbers that networks are judged by: names, units, and how people write them."""

from __future__ import annotations

from dataclasses import dataclass

from kd_hf.recipe.config import TrainConfig

_BETTER_WHEN_LOW = ("loss", "nll", "ece", "brier", "kl")
PRECISIONS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
              "ap_large": "AP large"}  # fmt: skip
RECALLS = {"ar1": "AR1", "ar10": "AR10", "ar100": "AR100", "ar_small": "AR small", "ar_medium": "AR medium",
           "ar_large": "AR large"}  # fmt: skip
_LABELS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "mean_class_top1": "mean-class top-1 %",
    "agreement": "agreement %",
    "nll": "NLL",
    "ece": "ECE %",
    "brier": "Brier",
    "kl": "KL",
    "cka": "CKA",
    **PRECISIONS,
    **RECALLS,
}


@dataclass(frozen=True)
class Score:
    """The number that says how good a network of a run is, and how people write it."""

    key: str  # in evaluations
    name: str
    title: str  # of its picture
    sign: str = ""  # behind a value

    @property
    def logged(self) -> str:
        """Its key in the log."""
        return f"eval_{self.key}"

    @property
    def label(self) -> str:
        """The head of a column."""
        return f"{self.name}{self.sign}"

    @property
    def beginning(self) -> str:
        """Its name as the first word of a sentence."""
        return self.name[0].upper() + self.name[1:]

    def text(self, value: float, digits: int) -> str:
        """A value with its sign."""
        return f"{value:.{digits}f}{self.sign}"


TOP1 = Score("top1", "top-1", "Accuracy", " %")
AP = Score("ap", "AP", "Average precision")


def greater_is_better(metric: str) -> bool:
    """Whether more of a logged number is better: not of losses, of their parts, and of calibration errors."""
    return "/" not in metric and metric.rpartition("_")[2] not in _BETTER_WHEN_LOW


def best_by(cfg: TrainConfig, score: Score) -> tuple[str, bool]:
    """What the best evaluation of a run is chosen by: a key of the log, and whether more of it is better."""
    named = cfg.metric_for_best_model or score.logged
    metric = named if named.startswith("eval_") else f"eval_{named}"
    return metric, greater_is_better(metric) if cfg.greater_is_better is None else cfg.greater_is_better


def label_of(key: str) -> str:
    """A metric's name for people; those in percent end with the sign."""
    return _LABELS.get(key, key.replace("_", " "))


def in_percent(key: str) -> bool:
    """Whether a metric goes from 0 to 100, also where its name does not say so."""
    return label_of(key).endswith("%") or key in PRECISIONS or key in RECALLS
