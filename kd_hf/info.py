"""What a method may know about a network before it sees a tensor. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
from typing import Literal


@dataclass(frozen=True)
class PreActivation:
    """The feature before a stage's last ReLU: what module `path` receives ("input") or returns ("output")."""

    path: str
    side: Literal["input", "output"] = "input"
    norm: str | None = None  # module of the BatchNorm that scales and shifts it last


@dataclass(frozen=True)
class Stage:
    """One resolution level. `path` is the module whose output is tapped; `layout` is how that module returns it."""

    path: str
    channels: int
    layout: str = "NCHW"  # or "NHWC" (Swin in timm), "NLC" (token sequence with the prefix still on it)
    preact: PreActivation | None = None  # where the stage ends in a ReLU


@dataclass(frozen=True)
class Preprocessing:
    """How a network expects its images; sizes in pixels, mean and std on a 0–1 scale."""

    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a network that decide which methods can serve it.

    `stages` are counted from 1 in tap names (``stage:1`` is the first after the stem), `blocks` from 0
    (``block:0`` is the first transformer block), as the papers do. `prefix` names the tokens before the
    patches, in order.
    """

    name: str
    library: str  # "timm" | "transformers" | "kd_hf" | "torch"
    num_classes: int
    preprocessing: Preprocessing  # as the recipe shows it images
    native: Preprocessing | None = None  # as its own configuration asks for them, before the recipe's changes
    stages: tuple[Stage, ...] = ()
    blocks: tuple[str, ...] = ()  # module paths
    prefix: tuple[str, ...] = ()  # e.g. ("cls",) or ("cls", "dist")
    block_prefix: tuple[str, ...] = ()  # those of them that the blocks already carry (CaiT adds its class token later)
    norm: str | None = None  # module whose output is the final token sequence (an Identity where pooling comes first)
    head: str | None = None  # module path of the classifier
    dist_head: str | None = None  # module path of the distillation token's classifier
    parameters: int = 0
    modules: tuple[str, ...] = field(default=(), repr=False)

    @property
    def depth(self) -> int:
        """Number of transformer blocks (0 for a CNN)."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Channels of the last stage (0 where there is none)."""
        return self.stages[-1].channels if self.stages else 0


class Samples(Protocol):
    """What a method may know of the training images before it sees one; a source of images is one."""

    def __len__(self) -> int: ...

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[len]``, -1 where there is none."""


@dataclass(frozen=True)
class Shapes:
    """Shapes without the batch dimension: K, each tapped tensor by the method's own role name, and the channels of the
    network's last stage (0 where it has none).

    `prefix` is how many tokens its blocks carry before the patches, None where that is not known; `samples` are the
    training images, for a method that keeps something of each of them (`Needs.samples`).
    """

    num_classes: int
    taps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    width: int = 0
    prefix: int | None = None
    samples: Samples | None = None
