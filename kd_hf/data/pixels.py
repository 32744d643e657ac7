"""From encoded bytes to the pixels of a view: decoding, cropping and resizing, by torchvision or by PIL throughout.

torchvision decodes JPEGs to the very pixels of PIL. What differs is the resizing: torch's on uint8 tensors is several
times as fast as PIL's, rounds its weights to 16 bits, and so ends up a level beside it here and there.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CropBox = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""
EXIF_WARNINGS = (  # Pillow 12 and 13 say it in different words
    "Corrupt EXIF data|Possibly corrupt EXIF|Truncated File Read|Metadata Warning, tag"
    "|Tag offset too large|Tag data larger than file"
)
JPEG_START, JPEG_FRAMES = b"\xff\xd8\xff", (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
ANTIALIASED = ("bilinear", "bicubic")  # what torch has with antialiasing
TALL = 100  # height ÷ width above which PIL resizes the columns before the rows


class UnreadableImage(Exception):
    """Bytes that no image comes out of."""


class Picture(Protocol):
    """A decoded RGB image, or a part of one."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    def cropped(self, box: CropBox) -> Picture:
        """The part inside a box."""

    def resized(self, side: int, interpolation: str) -> Tensor:
        """All of it, antialiased, as uint8 ``[3, side, side]``; `interpolation` as Pillow calls it, in any case."""


Decoder = Callable[[bytes], Picture]
"""Raises :class:`UnreadableImage`."""


def as_image(pixels: Tensor) -> Image.Image:
    """uint8 ``[3, H, W]`` as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``; in memory the channels of a pixel are neighbours."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- PIL ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PilPicture:
    """A picture that Pillow crops and resizes."""

    image: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.size

    def cropped(self, box: CropBox) -> PilPicture:
        """The part inside a box, without the pixels around it that resize(box=…) would let shine in."""
        return PilPicture(self.image.crop(box))

    def resized(self, side: int, interpolation: str) -> Tensor:
        """uint8 ``[3, side, side]``; see :class:`Picture`."""
        return as_tensor(self.image.resize((side, side), Image.Resampling[interpolation.upper()]))


def decode(data: bytes) -> Image.Image:
    """Decode to RGB: 16-bit grey by its high byte, alpha dropped, EXIF orientation ignored (as timm does).

    Raises:
        UnreadableImage: whatever Pillow has against these bytes.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


class PilDecoder:
    """Decodes everything with Pillow."""

    def __call__(self, data: bytes) -> Picture:
        """See :func:`decode`."""
        return PilPicture(decode(data))


@contextmanager
def exif_warnings_silenced() -> Iterator[None]:
    """Keep what Pillow has to say about broken EXIF blocks, which have no part in the pixels, from the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", EXIF_WARNINGS, UserWarning)
        yield


# --- torchvision --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPicture:
    """A picture that torch crops and resizes: uint8 ``[3, H, W]``."""

    pixels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[1]

    def cropped(self, box: CropBox) -> TensorPicture:
        """The part inside a box."""
        left, top, right, bottom = box
        return TensorPicture(self.pixels[:, top:bottom, left:right])

    def resized(self, side: int, interpolation: str) -> Tensor:
        """uint8 ``[3, side, side]``; as Pillow to the bit in what torch cannot do; see :class:`Picture`."""
        width, height = self.size
        mode = interpolation.lower()
        if mode not in ANTIALIASED or height > TALL * width:
            return PilPicture(as_image(self.pixels)).resized(side, interpolation)
        # contiguous before the batch dimension is added: only from these strides it takes its fast path
        image = self.pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(image, (side, side), mode=mode, antialias=True)[0]


class TorchvisionDecoder:
    """Plain JPEGs are decoded by torchvision and resized by torch; everything else is left to PIL."""

    def __init__(self) -> None:
        # imported here and not where it is used, so that worker processes are born with it
        from torchvision.io import ImageReadMode, decode_jpeg

        self._decode_jpeg = partial(decode_jpeg, mode=ImageReadMode.RGB)

    def __call__(self, data: bytes) -> Picture:
        """The pixels of :func:`decode`. Raises :class:`UnreadableImage`."""
        if _is_plain_jpeg(data):
            with suppress(RuntimeError):  # Pillow has the last word
                return TensorPicture(self._decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
        return PilPicture(decode(data))


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of 8-bit grey or RGB, and of a size that Pillow does not object to, by its frame header.

    torchvision has another formula than Pillow for CMYK.
    """
    place = 2 if data.startswith(JPEG_START) else len(data)
    while data[place : place + 1] == b"\xff" and place + 10 <= len(data):
        if data[place + 1] in JPEG_FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, place + 4)
            return bits == 8 and channels in (1, 3) and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


DECODERS: Mapping[str, Callable[[], Decoder]] = {"torchvision": TorchvisionDecoder, "pil": PilDecoder}
"""Values of `data.decoder`."""
