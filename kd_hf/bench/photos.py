"""Images for a bench whose recipe's data are not at hand."""

from __future__ import annotations

import io

import numpy as np

from kd_hf.data.source import Source
from kd_hf.draws import generator

SIZE = (500, 375)  # the middle of ImageNet's images
KINDS = 8


class Photos(Source):
    """JPEGs of ImageNet's mean file size, about 110 kB, in memory: clouds of colour under grain.

    Args:
        rows: number of images, of which :data:`KINDS` differ.
        num_classes: K.
    """

    def __init__(self, rows: int, num_classes: int) -> None:
        self.class_names = tuple(str(index) for index in range(num_classes))
        self.group_sizes = (rows,)
        self._files = [_photo(number) for number in range(KINDS)]

    def read(self, row: int) -> tuple[bytes, int]:
        """A JPEG; labels in turn."""
        return self._files[row % KINDS], row % self.num_classes

    def labels(self) -> np.ndarray:
        """Labels in turn."""
        return np.arange(len(self)) % self.num_classes

    def describe(self) -> str:
        """What they are."""
        mean = sum(map(len, self._files)) / KINDS
        return f"synthetic JPEGs of {SIZE[0]} × {SIZE[1]} px and {mean / 1e3:.0f} kB"


def _photo(number: int) -> bytes:
    from PIL import Image

    draws, (width, height) = generator("photo", number), SIZE
    colours = Image.fromarray(draws.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    clouds = np.asarray(colours.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
    grain = draws.normal(0.0, 24.0, (height, width, 1))
    with io.BytesIO() as file:
        Image.fromarray((clouds + grain).clip(0, 255).astype(np.uint8)).save(file, format="JPEG", quality=90)
        return file.getvalue()
