"""Random images with boxes, to see that a recipe runs."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from kd_hf.detection.data.objects import Objects, make_objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.draws import generator

_WIDTH, _HEIGHT, _BOXES = 480, 320, 2


class NoiseBoxes(BoxSource):
    """Noise in which boxes are claimed to be, as encoded bytes.

    Args:
        rows: number of images.
        num_classes: K; classes come in turn.
    """

    def __init__(self, rows: int, num_classes: int) -> None:
        self.class_names = tuple(str(index) for index in range(num_classes))
        self.group_sizes = (rows,)

    def read(self, row: int) -> tuple[bytes, Objects]:
        """A PNG of the row's own noise, and its boxes."""
        from PIL import Image

        pixels = generator("noise", row).integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            return file.getvalue(), self._objects(row)

    def _objects(self, row: int) -> Objects:
        side = np.array([_WIDTH, _HEIGHT])
        corner = generator("boxes", row).uniform(0, 0.5, (_BOXES, 2)) * side
        boxes = np.hstack([corner, corner + side / 4])
        classes = [(row + index) % self.num_classes for index in range(_BOXES)]
        return make_objects(boxes, classes, image_id=row, size=(_WIDTH, _HEIGHT), box_format="xyxy")

    def annotations(self) -> Iterator[Objects]:
        """All boxes; see :class:`BoxSource`."""
        return (self._objects(row) for row in range(len(self)))

    def describe(self) -> str:
        """What it is."""
        return f"noise with boxes ({len(self)} images, {self.num_classes} classes)"
