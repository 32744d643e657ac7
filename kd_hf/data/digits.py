"""scikit-learn's handwritten digits as images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kd_hf.data.source import Source

if TYPE_CHECKING:
    from kd_hf.data.source import Split


DIGITS_SEED, DIGITS_SIZE = 0, 32


class DigitsSource(Source):
    """scikit-learn's 1797 handwritten digits, 8×8 grey, as 32×32 RGB PNGs; 1078 for training, 719 for evaluation."""

    def __init__(self, split: Split) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=0.4, stratify=digits.target, random_state=DIGITS_SEED
        )
        rows = np.sort(parts[0 if split == "train" else 1])
        self.split = split
        self.class_names = tuple(str(name) for name in digits.target_names)
        self.group_sizes = (len(rows),)
        self._labels = digits.target[rows].astype(np.int64)
        self._images = digits.images[rows]
        self._encoded: dict[int, bytes] = {}  # most runs of a few steps read few of them

    @staticmethod
    def _encode(image: np.ndarray) -> bytes:
        import io

        from PIL import Image

        grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
        buffer = io.BytesIO()
        large = grey.resize((DIGITS_SIZE, DIGITS_SIZE), Image.Resampling.BICUBIC)
        large.convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def read(self, row: int) -> tuple[bytes, int]:
        """Encoded image and label; see :class:`Source`."""
        if row not in self._encoded:
            self._encoded[row] = self._encode(self._images[row])
        return self._encoded[row], int(self._labels[row])

    def labels(self) -> np.ndarray:
        """All labels; see :class:`Source`."""
        return self._labels

    def describe(self) -> str:
        """Place, split and size."""
        return f"builtin:digits ({self.split}, {len(self)} images, {self.num_classes} classes)"
