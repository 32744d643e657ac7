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
from PIL import Image, UnidentifiedImageError
from torch import Tensor

CropBox = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels."""
EXIF_WARNINGS = (  # Pillow 12 and 13 say it in different words
    "Corrupt EXIF data|Possibly corrupt EXIF|Truncated File Read|Metadata Warning, tag"
    "|Tag offset too large|Tag data larger than file"
)
JPEG_START, JPEG_FRAMES = b"\xff\xd8\xff", (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
DEEP = ("I", "F")  # modes of more than 8 bits, as Pillow calls them
ANTIALIASED = ("bilinear", "bicubic")  # what torch has with antialiasing
TALL = 100  # height ÷ width above which PIL resizes the columns before the rows
# what Pillow decodes by itself (MPO as JPEG); others start programs, such as Ghostscript for EPS, or are for documents
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM",  # Pillow knows these at once, the others take it a moment
           "WEBP", "TIFF", "AVIF", "JPEG2000", "DIB", "ICO", "PCX", "QOI", "SGI", "TGA")  # fmt: skip
IMAGE_SUFFIXES = (".apng", ".avif", ".avifs", ".bmp", ".bw", ".dib", ".gif", ".icb", ".ico", ".j2c", ".j2k", ".jfif",
                  ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm",
                  ".png", ".pnm", ".ppm", ".qoi", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst",
                  ".webp")  # fmt: skip
"""Names of files in these formats, as Pillow registers them."""


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
    """Decode to RGB: alpha dropped, EXIF orientation ignored (as timm does), deep grey as :func:`_eight_bits` says.

    Raises:
        UnreadableImage: no image of the :data:`FORMATS`, or whatever Pillow has against these bytes.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        if image.mode.startswith(DEEP):
            return _eight_bits(image).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image, or of a format that is not read here") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, …
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey in 8 bits: values up to 1 (floats) or 255 as they are, up to 65535 by their high byte.

    So is a mask or a scan of 8 bits that was stored in 16. Values beyond have no white that could be known.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 65535:  # also NaN
        raise UnreadableImage(f"grey values from {low:g} to {high:g}; expected 0 to 1, 0 to 255 or 0 to 65535")
    if high > 255:
        values = values.astype(np.uint16) >> 8
    elif values.dtype.kind == "f" and high <= 1:
        values = np.rint(values * np.float32(255))
    return Image.fromarray(np.rint(values).astype(np.uint8))


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
