"""From encoded bytes to what each network wants to see: one decode, one set of draws, one view per kind of input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_hf.data.geometry import ENHANCERS, Geometry, draw_geometry, placed
from kd_hf.data.mix import Erasing, mix_images_, mix_target
from kd_hf.data.pixels import DECODERS, Picture, as_image, as_tensor, decode
from kd_hf.draws import Draws, generator, hash_key, seed_python
from kd_hf.errors import UserError, nearest
from kd_hf.info import Preprocessing
from kd_hf.outputs import Target
from kd_hf.recipe.config import AugmentConfig

if TYPE_CHECKING:
    from kd_hf.data.batch import Batch

GREY = 127  # of a square that is cut out
STRONG = "@strong"  # ends the name of a network's strongly augmented view
LONGEST = 32  # sides of an image in evaluation, relative to each other

# --- planning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewPlan:
    """Which networks share a uint8 view. A view is named after its first network; the first of all is the reference.

    Crops, erasing boxes and CutMix boxes are drawn in pixels of the reference view.
    """

    models: Mapping[str, Preprocessing]
    view_of: Mapping[str, str]

    @property
    def views(self) -> dict[str, Preprocessing]:
        """Preprocessing by view name, the reference first."""
        return {name: self.models[name] for name in dict.fromkeys(self.view_of.values())}

    @property
    def reference(self) -> str:
        """Name of the network whose view the draws refer to: the student."""
        return next(iter(self.models))

    @property
    def size(self) -> int:
        """Side of the reference view in pixels."""
        return self.models[self.reference].image_size


def with_strong(specs: Mapping[str, Preprocessing]) -> dict[str, Preprocessing]:
    """Preprocessing by network name, and the same for each network's strongly augmented view."""
    return {**specs, **{f"{name}{STRONG}": spec for name, spec in specs.items()}}


def plan_views(specs: Mapping[str, Preprocessing], training: bool = False) -> ViewPlan:
    """Decide which networks can share a view.

    Args:
        specs: preprocessing by network name, the student first.
        training: compare only size and interpolation, since crop_pct and crop_mode have no part in a random
            crop; otherwise these must agree too. Mean and std never matter: they are applied on the device.

    Raises:
        UserError: an interpolation that Pillow does not know.
    """
    first: dict[tuple[object, ...], str] = {}
    view_of = {}
    for name, spec in specs.items():
        if spec.interpolation.upper() not in Image.Resampling.__members__:
            known = [member.lower() for member in Image.Resampling.__members__]
            raise UserError(
                f"preprocessing.interpolation of '{name}': unknown '{spec.interpolation}'."
                f"{nearest(spec.interpolation, known)}"
            )
        view_of[name] = first.setdefault((*_view_key(spec, training), name.endswith(STRONG)), name)
    return ViewPlan(dict(specs), view_of)


def _view_key(spec: Preprocessing, training: bool) -> tuple[object, ...]:
    key = (spec.image_size, spec.interpolation)
    if training:
        return key
    # a border is filled with the mean colour, so there the mean is part of the pixels
    return (*key, spec.crop_pct, spec.crop_mode, spec.mean if spec.crop_mode == "border" else None)


# --- host side: bytes to uint8 ------------------------------------------------------------------------------------


def take_view(picture: Picture, geometry: Geometry, spec: Preprocessing) -> Tensor:
    """Resize, shift and flip a cropped picture into a view, uint8 ``[3, S, S]`` with S = ``image_size``."""
    side = spec.image_size
    view = picture.resized(side, spec.interpolation)
    dx, dy = (max(-side, min(side, round(fraction * side))) for fraction in geometry.shift)
    if dx or dy:
        view = torch.nn.functional.pad(view, (dx, -dx, dy, -dy))
    return view.flip(2) if geometry.flip else view


def jittered(view: Image.Image, jitter: Sequence[tuple[str, float]]) -> Image.Image:
    """Apply enhancers by name and factor, in their order."""
    for name, factor in jitter:
        view = ENHANCERS[name](view).enhance(factor)
    return view


def augment_policy(policy: str, spec: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """Build timm's RandAugment (``rand-…``) or AutoAugment (``original``, ``v0``, ``3a`` for 3-Augment, …) for a view.

    As in timm's training transform; it draws from the global generators.

    Raises:
        UserError: a policy that timm does not understand.
    """
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    hparams = {
        "translate_const": int(spec.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in spec.mean),
        "interpolation": Image.Resampling[spec.interpolation.upper()],
    }
    build = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
    try:
        transform: Any = build(policy, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"data.augment.auto_augment: '{policy}' is not a policy of timm, such as 'rand-m9-mstd0.5-inc1' or '3a'"
        ) from error
    steps = transform.ops if policy.startswith("rand") else [op for part in transform.policy for op in part]
    for op in steps:
        if op.name.startswith("Posterize"):
            op.aug_fn = partial(_posterize, op.aug_fn)
    return transform


def _posterize(function: Callable[..., Image.Image], image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    """The increasing scale ends at 0 bits, which is black; Pillow refuses it."""
    return function(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)


class TrainTransform:
    """Bytes and sample key to one uint8 tensor ``[3, S, S]`` per view; decodes once and draws once, and once more for
    strongly augmented views.

    With `auto_augment` it seeds Python's and numpy's global generators, which timm draws from: keep them with
    :func:`kd_hf.draws.python_state_kept` where that matters.

    Args:
        plan: of the views.
        augment: the recipe's block.
        decoder: a key of :data:`kd_hf.data.pixels.DECODERS`.
    """

    def __init__(self, plan: ViewPlan, augment: AugmentConfig, decoder: str = "torchvision") -> None:
        self.views = plan.views
        self.size = plan.size
        self.augment = augment
        self.decode = DECODERS[decoder]()
        self.strong = augment.model_copy(update={"auto_augment": augment.strong.auto_augment, "color_jitter": 0.0})
        chosen = {name: self._augment(name).auto_augment for name in self.views}
        self.policies = {name: augment_policy(policy, self.views[name]) for name, policy in chosen.items() if policy}

    def _augment(self, name: str) -> AugmentConfig:
        return self.strong if name.endswith(STRONG) else self.augment

    def __call__(self, data: bytes, key: int) -> dict[str, Tensor]:
        """Raises :class:`UnreadableImage` for bytes that are no image."""
        picture = self.decode(data)
        views: dict[str, Tensor] = {}
        for strong, own_key in ((False, key), (True, hash_key(key, "strong"))):
            names = [name for name in self.views if name.endswith(STRONG) == strong]
            if names:
                geometry = draw_geometry(self._augment(names[0]), picture.size, self.size, own_key)
                cropped = picture if geometry.box is None else picture.cropped(geometry.box)
                views |= {name: self._view(name, cropped, geometry, own_key) for name in names}
        return {name: views[name] for name in self.views}

    def _view(self, name: str, picture: Picture, geometry: Geometry, key: int) -> Tensor:
        view = take_view(picture, geometry, self.views[name])
        if name in self.policies or geometry.jitter:
            image = as_image(view)
            if name in self.policies:
                seed_python(key, "rand_augment")  # the same operations and magnitudes for every view
                image = self.policies[name](image)
            view = as_tensor(jittered(image, geometry.jitter))
        return cut_out(view, self.strong.strong.cutout, key) if name.endswith(STRONG) else view


def cut_out(view: Tensor, share: float, key: int) -> Tensor:
    """A view ``[3, S, S]`` without a square of `share` of its side around a uniform place, as far as that is inside."""
    side = view.shape[-1]
    size = round(share * side)
    if not size:
        return view
    top, left = (int(place * side) - size // 2 for place in generator(key, "cutout").random(2))
    view = view.clone()
    view[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = GREY
    return view


class EvalTransform:
    """Bytes to one uint8 tensor ``[3, S, S]`` per view, exactly as timm's evaluation transform."""

    def __init__(self, plan: ViewPlan) -> None:
        from timm.data.transforms_factory import transforms_imagenet_eval

        self.transforms = {
            name: transforms_imagenet_eval(
                img_size=spec.image_size,
                crop_pct=spec.crop_pct,
                crop_mode=spec.crop_mode,
                interpolation=spec.interpolation,
                mean=spec.mean,
                std=spec.std,
                use_prefetcher=True,
            )
            for name, spec in plan.views.items()
        }

    def __call__(self, data: bytes, key: int = 0) -> dict[str, Tensor]:
        """`key` has no effect. Raises :class:`UnreadableImage` for bytes that are no image."""
        image = without_far_ends(decode(data))
        return {name: transform(image) for name, transform in self.transforms.items()}


def without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of an image that is longer than :data:`LONGEST` times its short side.

    timm resizes the whole image before it takes the middle: gigabytes for a line of pixels.
    """
    width, height = image.size
    longest = LONGEST * min(width, height)
    left, top = (max(0, (side - longest) // 2) for side in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image


# --- device side: uint8 to normalised float -----------------------------------------------------------------------


class DeviceStage:
    """uint8 views to what each network is given: normalised, erased and mixed, without a host–device sync.

    Args:
        specs: preprocessing by network name, the student first, as the loader was given it.
        num_classes: K of the target rows.
    """

    def __init__(self, specs: Mapping[str, Preprocessing], num_classes: int) -> None:
        self.specs = dict(specs)
        self.num_classes = num_classes
        self._columns: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}  # constants, once per device

    def _column(self, values: np.ndarray, device: torch.device) -> Tensor:
        key = (tuple(values.tolist()), device)
        if key not in self._columns:
            self._columns[key] = torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        return self._columns[key]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], Target]:
        """Return float32 images ``[B, 3, S, S]`` per network, and the target of a batch on the device.

        Boxes are erased with N(0, 1) noise in the normalised space of the view's first network, then images are
        mixed. Networks that share a view get the very same pixels, noise included: an affine map of the first
        one's tensor, or that tensor itself when mean and std agree.
        """
        done = {view: self._prepare(view, images, batch) for view, images in batch.views.items()}
        images = {name: self._renormalise(done[view], view, name) for name, view in batch.view_of.items()}
        return images, replace(mix_target(batch.label, batch.mixing, self.num_classes), row=batch.row)

    def _prepare(self, view: str, images: Tensor, batch: Batch) -> Tensor:
        spec, device = self.specs[view], images.device
        if view in batch.placing:
            images = placed(images, batch.placing[view])
        mean, std = (self._column(255 * np.asarray(value), device) for value in (spec.mean, spec.std))
        result = images.to(torch.float32).sub_(mean).div_(std)
        if batch.erasing:
            erase_(result, batch.key, batch.erasing)
        return mix_images_(result, batch.mixing or ())

    def _renormalise(self, images: Tensor, view: str, name: str) -> Tensor:
        old, new = self.specs[view], self.specs[name]
        if (old.mean, old.std) == (new.mean, new.std):
            return images
        std = np.asarray(new.std)
        factor = self._column(np.asarray(old.std) / std, images.device)
        offset = self._column((np.asarray(old.mean) - np.asarray(new.mean)) / std, images.device)
        return torch.addcmul(offset, images, factor)


def erase_(images: Tensor, keys: Tensor, erasing: Sequence[Erasing]) -> Tensor:
    """Fill the boxes of float images ``[B, 3, H, W]`` with the samples' own N(0, 1) noise, in place."""
    boxes = [part.box.pixels(*images.shape[-2:]) for part in erasing]
    areas = [(bottom - top) * (right - left) for top, left, bottom, right in boxes]
    chosen = torch.stack([keys[part.position] for part in erasing])  # by views: indexing with a list would sync
    # channels last, so that a sample's noise does not depend on the largest box of its batch
    noise: Tensor = Draws(chosen).normal("erase", (max(areas), images.shape[1]))
    for part, (top, left, bottom, right), area, values in zip(erasing, boxes, areas, noise, strict=True):
        patch = values[:area].view(bottom - top, right - left, images.shape[1])
        images[part.position, :, top:bottom, left:right] = patch.permute(2, 0, 1)
    return images
