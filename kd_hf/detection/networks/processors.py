"""The image processor that is saved with a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd_hf.models.handle import ModelHandle


def image_processor(
    handle: ModelHandle, mean: Sequence[float], std: Sequence[float], shortest: int, longest: int
) -> Any:
    """Resize by the shortest side, normalise, fill up with zeros: what evaluation does to an image.

    Args:
        handle: of a detector; its head decides how predictions are read, ViDT has a processor of its own.
        mean: of each channel, on a 0–1 scale.
        std: likewise.
        shortest: pixels of the shortest side.
        longest: of the longest side at most.
    """
    from transformers import DeformableDetrImageProcessor, DetrImageProcessor

    from kd_hf.detection.networks.vidt_config import ViDTConfig
    from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor

    network: Any = handle.network
    kind: Any = DeformableDetrImageProcessor
    if isinstance(network.config, ViDTConfig):
        kind = ViDTImageProcessor
    elif getattr(handle.info, "softmax", False):
        kind = DetrImageProcessor
    size = {"shortest_edge": shortest, "longest_edge": longest}
    return kind(size=size, image_mean=list(mean), image_std=list(std))
