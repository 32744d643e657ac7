"""From a batch to what each network is given: normalised images with their masks, and the objects as targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kd_hf.detection.data.batch import BoxBatch
from kd_hf.info import Preprocessing


@dataclass(frozen=True, eq=False)
class Images:
    """Images of several sizes in one tensor."""

    pixels: Tensor
    """float ``[B, 3, H, W]``, normalised; exactly 0 in the padding."""
    mask: Tensor
    """bool ``[B, H, W]``: true where there is padding (the opposite of transformers' ``pixel_mask``)."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.pixels.device

    @property
    def shape(self) -> torch.Size:
        """Of the pixels."""
        return self.pixels.shape

    def to(self, dtype: torch.dtype) -> Images:
        """With pixels of another type."""
        return replace(self, pixels=self.pixels.to(dtype))

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it that lies on the device."""
        yield self.pixels
        yield self.mask


@dataclass(frozen=True, eq=False)
class BoxTarget:
    """The objects of each image of a batch."""

    classes: list[Tensor]
    """int64 ``[n]``: the network's outputs."""
    boxes: list[Tensor]
    """float32 ``[n, 4]``: centre, width and height, relative to the image without padding."""

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it that lies on the device."""
        yield from self.classes
        yield from self.boxes


class BoxStage:
    """uint8 images to what each network is given, without a host–device sync.

    Args:
        specs: preprocessing by network name, of which mean and deviation count; the student first.
        outputs: which output of the student stands for each class of the data, as
            :func:`kd_hf.detection.data.categories.outputs_of_classes` tells; None: the same number.
    """

    def __init__(self, specs: Mapping[str, Preprocessing], outputs: Sequence[int] | np.ndarray | None = None) -> None:
        self.specs = dict(specs)
        self.outputs = None if outputs is None else torch.as_tensor(np.asarray(outputs, np.int64))
        self._constants: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}  # once per device

    def _column(self, values: Sequence[float], device: torch.device) -> Tensor:
        key = (tuple(values), device)
        if key not in self._constants:
            constant = torch.tensor(values, dtype=torch.float64) * 255
            self._constants[key] = constant.to(torch.float32).view(1, 3, 1, 1).to(device)
        return self._constants[key]

    @torch.no_grad()
    def __call__(self, batch: BoxBatch) -> tuple[dict[str, Images], BoxTarget]:
        """Return the images of every network, and the objects, of a batch on the device.

        The padding is zero after normalisation, as in DETR and ViDT: it has the mean colour. Networks with the same
        mean and deviation get the same tensors.
        """
        mask = batch.mask
        done: dict[tuple[tuple[float, ...], ...], Images] = {}
        for spec in self.specs.values():
            key = (spec.mean, spec.std)
            if key not in done:
                done[key] = Images(self._normalised(batch.pixels, spec, mask), mask)
        classes = self._outputs_of(batch.classes)
        target = BoxTarget(list(classes.split(batch.counts)), list(batch.boxes.split(batch.counts)))
        return {name: done[spec.mean, spec.std] for name, spec in self.specs.items()}, target

    def _normalised(self, pixels: Tensor, spec: Preprocessing, mask: Tensor) -> Tensor:
        mean, std = self._column(spec.mean, pixels.device), self._column(spec.std, pixels.device)
        return pixels.to(torch.float32).sub_(mean).div_(std).masked_fill_(mask[:, None], 0.0)

    def _outputs_of(self, classes: Tensor) -> Tensor:
        if self.outputs is None:
            return classes
        if self.outputs.device != classes.device:
            self.outputs = self.outputs.to(classes.device)
        return self.outputs[classes]
