"""What the page shows of detectors: images with what is in them and what each network finds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from kd_hf.config import Recipe
from kd_hf.detection.categories import is_matched
from kd_hf.detection.detector import TappedDetector
from kd_hf.detection.evaluation import BoxSubject, Predicted, Run
from kd_hf.detection.info import DetectorInfo
from kd_hf.detection.pictures import SHOWN, TRUTH, detections, look
from kd_hf.detection.source import BoxSource
from kd_hf.detection.stage import Images
from kd_hf.models.handle import ModelHandle
from kd_hf.report.figures import Picture
from kd_hf.report.probe import STUDENT, shadow

LOOKED = 2 * SHOWN  # images


def side_by_side(
    networks: Mapping[str, ModelHandle],
    source: BoxSource,
    recipe: Recipe,
    device: str | torch.device,
    samples: int = LOOKED,
) -> tuple[Picture | None, list[str]]:
    """``detections.png``, and the names of networks that cannot be in it: their classes are not the data's.

    Args:
        networks: by name, on `device`; they are left as they are. The student is drawn last.
        source: the images.
        recipe: says how large images are shown.
        device: where the networks are.
        samples: look at this many images at most; those with objects are drawn first.
    """
    ordered = [*(name for name in networks if name != STUDENT), STUDENT]
    matched = [name for name in ordered if is_matched(source.class_names, networks[name].info.num_classes)]
    subjects = {name: BoxSubject(_runner(networks[name]), networks[name].info.preprocessing) for name in matched}
    augment = recipe.data.boxes.augment if recipe.data.boxes is not None else None
    seen = look(subjects, source, torch.device(device), min(samples, LOOKED), augment)
    shown = sorted(seen, key=lambda item: len(item.found[TRUTH].boxes) == 0)[:SHOWN]
    return detections(shown, source.class_names), [name for name in ordered if name not in matched]


def _runner(handle: ModelHandle) -> Run:
    """A copy that shares its weights, in eval mode and without gradient."""
    model = TappedDetector(shadow(handle), cast(DetectorInfo, handle.info)).eval()

    def run(images: Images) -> Predicted:
        with torch.no_grad():
            predicted: Predicted = model(images)
        return predicted

    return run
