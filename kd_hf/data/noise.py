"""Random images with labels, to see that a recipe runs."""

from __future__ import annotations

import io

import numpy as np

from kd_hf.data.source import Source
from kd_hf.draws import generator


class NoiseSource(Source):
    """Random images with labels in turn, as encoded bytes.

    Args:
        rows: number of images.
        size: pixels per side.
        num_classes: K.
    """

    def __init__(self, rows: int, size: int, num_classes: int) -> None:
        self.size = size
        self.class_names = tuple(str(index) for index in range(num_classes))
        self.group_sizes = (rows,)

    def read(self, row: int) -> tuple[bytes, int]:
        """A PNG of the row's own noise."""
        from PIL import Image

        pixels = generator("noise", row).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            return file.getvalue(), row % self.num_classes

    def labels(self) -> np.ndarray:
        """Labels in turn."""
        return np.arange(len(self)) % self.num_classes

    def describe(self) -> str:
        """What it is."""
        return f"noise ({len(self)} images, {self.num_classes} classes)"
