"""Images as ViDT reads them: sides are multiples of 16 and boxes stay relative to the image without padding.

This file is copied into every artefact of the network and runs there without this package: it needs torch and
transformers only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeformableDetrImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict

MULTIPLE = 16


class ViDTImageProcessor(DeformableDetrImageProcessor):
    """Deformable DETR's image processor but for two things.

    The size of the resized image, shortest side 800 and longest at most 1333 pixels, is rounded down to multiples of
    16; and padding leaves annotations as they are: boxes relative to the image itself, as ViDT predicts them and
    ``post_process_object_detection`` reads them, and masks of its size.
    """

    def resize(
        self, image: torch.Tensor, size: SizeDict, resample: Any = None, antialias: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """``[…, H, W]`` to the size asked for, rounded down; masks (which are given their size) as they are."""
        if size.shortest_edge and size.longest_edge:
            sides = get_size_with_aspect_ratio(image.shape[-2:], size.shortest_edge, size.longest_edge)
            height, width = (max(MULTIPLE, side - side % MULTIPLE) for side in sides)
            size = SizeDict(height=height, width=width)
        resized: torch.Tensor = super().resize(image, size, resample=resample, antialias=antialias, **kwargs)
        return resized

    def _update_annotation_for_padded_image(self, annotation: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return annotation


ViDTImageProcessor.register_for_auto_class("AutoImageProcessor")
