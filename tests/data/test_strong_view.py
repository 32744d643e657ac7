"""The second, strongly augmented view of an image: drawn by keys of its own, and only where a loss needs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kd_hf.data.loader import train_loader
from kd_hf.data.views import GREY, STRONG, DeviceStage, TrainTransform, cut_out, plan_views, with_strong
from kd_hf.draws import hash_key
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, CropConfig, DataConfig, StrongConfig
from tests.data.conftest import encode, make_image
from tests.data.test_loader import Pictures

VIEWS = {
    "student": Preprocessing(image_size=32),
    "teacher": Preprocessing(image_size=48, interpolation="bilinear"),
    "twin": Preprocessing(image_size=32, mean=(0.5,) * 3),
}
PHOTO = encode(make_image(3, 80, 60), "JPEG")
PLAIN = AugmentConfig(strong=StrongConfig(auto_augment=None, cutout=0))


def views_of(augment, key, strong=True):
    return TrainTransform(plan_views(with_strong(VIEWS) if strong else VIEWS, training=True), augment)(PHOTO, key)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_the_first_view_keeps_its_bits(policy):
    augment = AugmentConfig(auto_augment=policy, color_jitter=0.4)
    both, alone = views_of(augment, 7), views_of(augment, 7, strong=False)
    assert list(both) == ["student", "teacher", f"student{STRONG}", f"teacher{STRONG}"]
    assert all(torch.equal(both[name], view) for name, view in alone.items())
    assert all(not torch.equal(both[f"{name}{STRONG}"], view) for name, view in alone.items())


def test_crop_and_flip_are_drawn_anew():
    strong = views_of(PLAIN, 7)[f"student{STRONG}"]
    assert torch.equal(strong, views_of(PLAIN, hash_key(7, "strong"), strong=False)["student"])


def test_it_is_a_function_of_the_key():
    first, again, other = (views_of(AugmentConfig(), key)[f"student{STRONG}"] for key in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_policy_is_its_own():
    crop = {"crop": CropConfig(kind="resize"), "hflip": 0.0}
    whole = views_of(AugmentConfig(**crop, auto_augment="3a", strong=PLAIN.strong), 7)
    assert torch.equal(whole[f"student{STRONG}"], views_of(AugmentConfig(**crop), 7)["student"])
    posterized = StrongConfig(auto_augment="rand-m10-n2-mstd101-inc1", cutout=0)
    shown = [views_of(AugmentConfig(**crop, strong=posterized), key)[f"student{STRONG}"] for key in range(8)]
    assert len({tuple(view.flatten().tolist()) for view in shown}) > 4


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_square_is_cut_out_as_far_as_it_is_inside(share):
    view = torch.zeros(3, 32, 32, dtype=torch.uint8)
    corners = set()
    for key in range(40):
        grey = cut_out(view, share, key)[0] == GREY
        rows, columns = grey.any(1), grey.any(0)
        assert torch.equal(grey, rows[:, None] & columns[None]), "no rectangle"
        for side in (rows, columns):
            count, inside = int(side.sum()), not side[0] and not side[-1]
            assert count <= 32 * share and (not inside or count == 32 * share)
        corners.add((int(rows.nonzero()[0]), int(columns.nonzero()[0])))
    assert len(corners) > 10
    assert not view.any() and torch.equal(cut_out(view, 0.0, 1), view)


def test_networks_are_given_both_views_in_their_own_colours():
    views = with_strong(VIEWS)
    loader = train_loader(Pictures(), DataConfig(path="in memory"), views, per_device=4, total_steps=1, seed=3)
    images, _ = DeviceStage(views, 3)(next(iter(loader)))
    assert images.keys() == views.keys()
    assert images[f"teacher{STRONG}"].shape == (4, 3, 48, 48)
    mean, std = (torch.tensor(getattr(VIEWS["student"], name)).view(3, 1, 1) for name in ("mean", "std"))
    pixels = images[f"student{STRONG}"] * std + mean
    torch.testing.assert_close(images[f"twin{STRONG}"] * std + 0.5, pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hold", ["auto", True])
def test_images_that_are_changed_each_time_are_not_held(hold):
    source, augment = Pictures(), AugmentConfig(crop=CropConfig(kind="pad"))
    source.hold = hold
    views = {"student": replace(VIEWS["student"], image_size=16)}

    def note(views):
        return train_loader(
            source, DataConfig(path="in memory", augment=augment), views, per_device=4, total_steps=1
        ).note

    assert "held" in note(views)
    if hold is True:
        with pytest.raises(
            UserError, match=r"data\.hold: a loss needs the second view of each image, which data\.augment"
        ):
            note(with_strong(views))
    else:
        assert note(with_strong(views)) == ""
