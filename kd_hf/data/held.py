"""Views that are decoded once and held as uint8, for sets of small images; batches are taken from them by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from kd_hf.data.pixels import DECODERS, UnreadableImage
from kd_hf.data.source import UNLABELLED, Source
from kd_hf.data.views import STRONG, EvalTransform, ViewPlan
from kd_hf.errors import UserError
from kd_hf.recipe.config import AugmentConfig

SMALL_SIDE = 64  # pixels; `auto` holds no larger views
SMALL_BYTES = 2 << 30  # of all images of a set together
SHARE = 8  # the processes of a machine together hold at most this part of its memory, by `auto`, for a set


class HeldViews:
    """The views of a source's images, each made when it is first asked for.

    Args:
        source: of the images.
        plan: of the views.
        transform: encoded bytes to one uint8 tensor ``[3, S, S]`` per view of the plan.
    """

    def __init__(self, source: Source, plan: ViewPlan, transform: Callable[[bytes], Mapping[str, Tensor]]) -> None:
        self.source, self.transform = source, transform
        # memory that is taken as it is written to
        self.views = {
            name: torch.empty(len(source), 3, spec.image_size, spec.image_size, dtype=torch.uint8)
            for name, spec in plan.views.items()
        }
        self.label = torch.full((len(source),), UNLABELLED)
        self.made = np.zeros(len(source), bool)

    def make(self, row: int) -> None:
        """Decode an image, unless that was done before. Raises :class:`UnreadableImage` or OSError."""
        if self.made[row]:
            return
        data, label = self.source.read(row)
        for name, view in self.transform(data).items():
            self.views[name][row] = view
        self.label[row] = label
        self.made[row] = True

    def unreadable(self, rows: np.ndarray) -> np.ndarray:
        """Decode what was not yet decoded, and say which of the `rows` cannot be: bool ``[B]``."""
        for row in np.unique(rows[~self.made[rows]]).tolist():
            try:
                self.make(row)
            except (UnreadableImage, OSError):
                continue
        return ~self.made[rows]

    def take(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Views uint8 ``[B, 3, S, S]`` and labels int64 ``[B]`` of decoded rows."""
        return {name: view.index_select(0, rows) for name, view in self.views.items()}, self.label[rows]

    def describe(self) -> str:
        """What a person should know."""
        sizes = sum(view.numel() for view in self.views.values())
        sides = " and ".join(str(view.shape[-1]) for view in self.views.values())
        return f"{len(self.source)} images of {sides} pixels are decoded once and held, {sizes / 2**20:.0f} MiB"


# a memo and no state: what is in it can be made again from the source at any time
_HELD: WeakKeyDictionary[Source, dict[tuple[object, ...], HeldViews]] = WeakKeyDictionary()


def held_views(source: Source, plan: ViewPlan, augment: AugmentConfig | None, decoder: str) -> HeldViews | None:
    """The held views of a source, made once and found again; None where its images are to be decoded each time.

    Args:
        source: whose `hold` says whether.
        plan: of the views.
        augment: of a training set; None for evaluation, where images are prepared as timm does.
        decoder: a key of :data:`kd_hf.data.pixels.DECODERS`, for training.

    Raises:
        UserError: they must be held, but cannot.
    """
    obstacle = None if augment is None else _obstacle(augment, plan)
    if source.hold is True and obstacle:
        raise UserError(f"data.hold: {obstacle}, so nothing decoded could be shown twice; set data.hold: auto")
    if obstacle or not source.hold or (source.hold == "auto" and not _is_small(source, plan)):
        return None
    specs = [replace(spec, std=()) for spec in plan.views.values()]
    key = (augment is None, decoder, *zip(plan.views, specs, strict=True))
    found = _HELD.setdefault(source, {})
    if key not in found:
        found[key] = HeldViews(source, plan, EvalTransform(plan) if augment is None else _Whole(plan, decoder))
    return found[key]


class _Whole:
    """Bytes to the view of the whole image, as :class:`kd_hf.data.views.TrainTransform` makes it before it moves it."""

    def __init__(self, plan: ViewPlan, decoder: str) -> None:
        self.specs, self.decode = plan.views, DECODERS[decoder]()

    def __call__(self, data: bytes) -> dict[str, Tensor]:
        picture = self.decode(data)
        return {name: picture.resized(spec.image_size, spec.interpolation) for name, spec in self.specs.items()}


def _obstacle(augment: AugmentConfig, plan: ViewPlan) -> str | None:
    """What is done to the pixels of an image anew each time it is shown, other than moving and flipping it."""
    if any(name.endswith(STRONG) for name in plan.views):
        return "a loss needs the second view of each image, which data.augment.strong changes each time"
    if augment.crop.kind == "random_resized":
        return "data.augment.crop.kind: random_resized resizes another part of an image each time"
    changes = {"auto_augment": augment.auto_augment, "color_jitter": augment.color_jitter}
    return next((f"data.augment.{name} changes the colours of an image each time" for name, v in changes.items() if v),
                None)  # fmt: skip


def _is_small(source: Source, plan: ViewPlan) -> bool:
    sides = [spec.image_size for spec in plan.views.values()]
    size = len(source) * sum(3 * side**2 for side in sides)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(sides) <= SMALL_SIDE and size <= min(SMALL_BYTES, memory // SHARE)
