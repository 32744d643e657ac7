from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from timm.data import create_transform
from torch.testing import assert_close
from torchvision import transforms as tv

from kd_hf.data.batch import Batch
from kd_hf.data.geometry import Geometry, draw_geometry, random_resized_box
from kd_hf.data.mix import Box, Erasing, Mixing
from kd_hf.data.pixels import PilPicture, as_image, as_tensor
from kd_hf.data.views import (
    DeviceStage,
    EvalTransform,
    TrainTransform,
    augment_policy,
    erase_,
    jittered,
    plan_views,
    take_view,
)
from kd_hf.draws import Draws, generator, hash_key, seed_python
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, CropConfig
from tests.data.conftest import encode, make_image

SMALL = Preprocessing(image_size=32)
BIG = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")


def plan(*specs, training=True):
    return plan_views({f"m{i}": spec for i, spec in enumerate(specs)}, training)


def batch_of(plan, views, **rest):
    size = len(next(iter(views.values())))
    label = torch.arange(size) % 3
    keys = torch.tensor([hash_key(row) for row in range(size)])
    return Batch(views, label, label, keys, torch.ones(size, dtype=torch.bool), dict(plan.view_of), **rest)


def random_views(plan, size=4):
    draws = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 256, (size, 3, spec.image_size, spec.image_size), dtype=torch.uint8, generator=draws)
        for name, spec in plan.views.items()
    }


# --- planning


def test_mean_and_std_do_not_separate_views():
    assert plan(SMALL, replace(SMALL, mean=(0.5,) * 3)).view_of == {"m0": "m0", "m1": "m0"}


@pytest.mark.parametrize("change", [{"image_size": 40}, {"interpolation": "bilinear"}])
def test_size_and_interpolation_separate_views(change):
    assert plan(SMALL, replace(SMALL, **change)).view_of == {"m0": "m0", "m1": "m1"}


@pytest.mark.parametrize("change", [{"crop_pct": 0.9}, {"crop_mode": "squash"}])
def test_evaluation_crops_separate_views_in_evaluation_only(change):
    assert len(plan(SMALL, replace(SMALL, **change), training=False).views) == 2
    assert len(plan(SMALL, replace(SMALL, **change), training=True).views) == 1


def test_a_border_is_filled_with_the_mean_so_it_separates():
    border = replace(SMALL, crop_mode="border")
    assert len(plan(border, replace(border, mean=(0.5,) * 3), training=False).views) == 2


def test_unknown_interpolation():
    with pytest.raises(
        UserError, match=r"preprocessing.interpolation of 'm0': unknown 'bicubik'. Did you mean 'bicubic'"
    ):
        plan(replace(SMALL, interpolation="bicubik"))


# --- geometry


def test_random_resized_boxes_are_distributed_as_torchvisions():
    crop, size = CropConfig(), (120, 90)
    ours = np.array([random_resized_box(crop, size, generator("box", i)) for i in range(2000)])
    torch.manual_seed(0)
    image = Image.new("RGB", size)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(2000)])
    top, left, height, width = theirs.T
    other = np.stack([left, top, left + width, top + height], 1)
    assert np.allclose(ours.mean(0), other.mean(0), atol=2.5)
    assert np.allclose(ours.std(0), other.std(0), atol=2.5)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] <= size).all() and (ours[:, 2:] > ours[:, :2]).all()


@pytest.mark.parametrize("size", [(400, 4), (3, 300), (50, 50)])
def test_fallback_box_is_torchvisions(size):
    crop = CropConfig(scale=(4.0, 5.0))  # never fits
    left, top, right, bottom = random_resized_box(crop, size, generator(0))
    theirs = tv.RandomResizedCrop.get_params(Image.new("RGB", size), [4.0, 5.0], [3 / 4, 4 / 3])
    assert (top, left, bottom - top, right - left) == tuple(theirs)


def test_crop_and_resize_is_timms():
    image = make_image(0, 90, 70)
    found = take_view(PilPicture(image).cropped((10, 5, 60, 65)), Geometry(flip=True), SMALL)
    expected = tv.functional.resized_crop(image, 5, 10, 60, 50, [32, 32], tv.InterpolationMode.BICUBIC)
    assert torch.equal(found, as_tensor(tv.functional.hflip(expected)))


def test_padding_crop_is_a_shift_with_black_borders():
    image = make_image(0, 32, 32)
    augment = AugmentConfig(crop=CropConfig(kind="pad", padding=4), hflip=0)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    seen = set()
    for key in range(300):
        geometry = draw_geometry(augment, image.size, 32, key)
        dx, dy = (round(32 * f) for f in geometry.shift)
        seen.add((dx, dy))
        view = take_view(PilPicture(image), geometry, SMALL)
        assert np.array_equal(as_image(view), padded[4 - dy :, 4 - dx :][:32, :32])
        large = PilPicture(image.resize((64, 64), Image.Resampling.NEAREST))
        twice = take_view(large, geometry, replace(BIG, interpolation="nearest"))
        assert torch.equal(twice[:, ::2, ::2], view)
    assert len(seen) > 75 and min(seen) == (-4, -4) and max(seen) == (4, 4)


def test_resize_takes_the_whole_image():
    transform = TrainTransform(plan(SMALL), AugmentConfig(crop=CropConfig(kind="resize"), hflip=0))
    image = make_image(3)
    expected = as_tensor(image.resize((32, 32), Image.Resampling.BICUBIC))
    assert torch.equal(transform(encode(image), 1)["m0"], expected)


def test_flip_probability():
    flips = [draw_geometry(AugmentConfig(hflip=0.3), (40, 40), 32, key).flip for key in range(3000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)


def test_jitter_factors_and_order():
    draws = [draw_geometry(AugmentConfig(color_jitter=0.4), (40, 40), 32, key).jitter for key in range(1000)]
    assert len({tuple(name for name, _ in jitter) for jitter in draws}) == 6
    factors = np.array([[dict(jitter)[name] for name in ("brightness", "contrast", "saturation")] for jitter in draws])
    assert factors.min() > 0.6 and factors.max() < 1.4
    assert np.allclose(factors.mean(0), 1.0, atol=0.03)
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.15
    image = make_image(0, 32, 32)
    view = jittered(image, (("contrast", 0.7), ("saturation", 1.2)))
    expected = ImageEnhance.Color(ImageEnhance.Contrast(image).enhance(0.7)).enhance(1.2)
    assert np.array_equal(np.asarray(view), np.asarray(expected))


def test_jitter_is_off_with_auto_augment():
    augment = AugmentConfig(color_jitter=0.4, auto_augment="rand-m9")
    assert draw_geometry(augment, (40, 40), 32, 0).jitter == ()


# --- transforms


@pytest.mark.parametrize("crop", ["random_resized", "pad", "resize"])
def test_views_show_the_same_crop(crop):
    small = replace(BIG, image_size=32, interpolation="bilinear")
    transform = TrainTransform(plan(small, BIG), AugmentConfig(crop=CropConfig(kind=crop), color_jitter=0.3))
    data = encode(make_image(0, 128, 128))
    for key in range(20):
        views = transform(data, key)
        big = views["m1"].float().reshape(3, 32, 2, 32, 2).mean((2, 4))
        inner = np.s_[:, 5:-5, 5:-5]  # a border of `pad` falls on other fractions of a pixel
        assert (big[inner] - views["m0"][inner]).abs().mean() < 4
        assert (big.flip(1)[inner] - views["m0"][inner]).abs().mean() > 8


def test_same_key_same_view_and_other_key_another():
    transform = TrainTransform(plan(SMALL), AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1"))
    data = encode(make_image(0))
    first = transform(data, 5)["m0"].clone()
    transform(data, 6)
    assert torch.equal(transform(data, 5)["m0"], first)
    assert not torch.equal(transform(data, 7)["m0"], first)


def test_rand_augment_is_timms():
    """Same policy, same seed, same pixels as the transform timm builds for itself."""
    spec = Preprocessing(image_size=48)
    ours = augment_policy("rand-m9-mstd0.5-inc1", spec)
    theirs = create_transform(48, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic")
    theirs = next(t for t in theirs.transforms if type(t).__name__ == "RandAugment")
    image = make_image(0, 48, 48)
    for key in range(60):
        seed_python(key)
        expected = theirs(image)
        seed_python(key)
        assert np.array_equal(np.asarray(ours(image)), np.asarray(expected))


def test_rand_augment_never_raises_and_reaches_zero_bits(monkeypatch):
    transform = TrainTransform(plan(SMALL), AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", hflip=0))
    data = encode(make_image(0, 32, 32))
    black = []
    for key in range(6000):
        if not transform(data, key)["m0"].any():
            black.append(key)
    assert 1 <= len(black) < 60
    policy = augment_policy("rand-m10-n1-p1-inc1", SMALL)
    posterize = next(op for op in policy.ops if op.name == "PosterizeIncreasing")
    assert not np.asarray(posterize(make_image(0))).any()


def test_two_views_get_the_same_operations():
    same = replace(SMALL, interpolation="bilinear")
    transform = TrainTransform(plan(SMALL, same), AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1"))
    for key in range(60):
        views = transform(encode(make_image(0, 64, 64)), key)
        assert (views["m0"].float() - views["m1"]).abs().mean() < 25


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-m1.5", "rand-z3", "nonsense"])
def test_unknown_policy(policy):
    with pytest.raises(UserError, match=r"data.augment.auto_augment: '.*' is not a policy of timm"):
        TrainTransform(plan(SMALL), AugmentConfig(auto_augment=policy))


@pytest.mark.parametrize("size", [(70, 50), (33, 90), (64, 64)])
@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        replace(SMALL, crop_pct=1.0, interpolation="bilinear"),
        replace(SMALL, crop_mode="squash", crop_pct=0.9),
        replace(SMALL, crop_mode="border", crop_pct=0.95),
    ],
)
def test_evaluation_is_timms(spec, size):
    image = make_image(1, *size)
    ours = EvalTransform(plan(spec, training=False))(encode(image))["m0"]
    arguments = {"mean": spec.mean, "std": spec.std, "crop_pct": spec.crop_pct, "crop_mode": spec.crop_mode}
    theirs = create_transform(spec.image_size, interpolation=spec.interpolation, **arguments)(image)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    assert torch.equal(tv.functional.normalize(ours.float() / 255, mean.flatten(), std.flatten()), theirs)


# --- device


def test_normalisation_and_renormalisation():
    other = replace(SMALL, mean=(0.5, 0.4, 0.6), std=(0.5, 0.3, 0.2))
    views = plan(SMALL, other, replace(SMALL, crop_pct=1.0), BIG)
    batch = batch_of(views, random_views(views))
    images, target = DeviceStage(views.models, 3)(batch)
    for name, spec in views.models.items():
        pixels = batch.views[views.view_of[name]].double() / 255
        mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (spec.mean, spec.std))
        assert_close(images[name].double(), (pixels - mean) / std, rtol=1e-6, atol=1e-6)
    assert images["m2"] is images["m0"]
    assert target.soft is None
    assert target.row.equal(batch.row)


def test_erasing_and_mixing_keep_networks_on_the_same_pixels():
    other = replace(SMALL, mean=(0.5, 0.4, 0.6), std=(0.5, 0.3, 0.2))
    views = plan(SMALL, other, BIG)
    box = Box(0.25, 0.5, 0.75, 1.0)
    batch = batch_of(views, random_views(views), erasing=(Erasing(1, box),), mixing=(Mixing(0, 4, 0.7),))
    images, target = DeviceStage(views.models, 3)(batch)

    def pixels(name):
        spec = views.models[name]
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        return images[name] * std + mean

    assert_close(pixels("m0"), pixels("m1"), rtol=1e-5, atol=1e-5)
    plain = DeviceStage(views.models, 3)(batch_of(views, batch.views, mixing=batch.mixing))[0]
    for name, changed in {"m0": np.s_[..., 8:24, 16:32], "m2": np.s_[..., 16:48, 32:64]}.items():
        difference = (images[name] - plain[name]) != 0
        assert difference[:2][changed].float().mean() > 0.99
        assert difference.sum() == difference[:2][changed].sum()
    assert_close(target.soft[0], torch.tensor([0.7, 0.3, 0.0]))


def test_noise_is_normal_and_does_not_depend_on_the_batch():
    keys = torch.tensor([hash_key(i) for i in range(6)])
    box, large = Box(0.0, 0.0, 0.5, 0.5), Box(0.1, 0.1, 0.9, 0.9)
    alone = erase_(torch.zeros(1, 3, 64, 64), keys[2:3], [Erasing(0, box)])
    together = erase_(torch.zeros(6, 3, 64, 64), keys, [Erasing(2, box), Erasing(4, large)])
    assert torch.equal(alone[0], together[2])
    assert not together[[0, 1, 3, 5]].any()
    top, left, bottom, right = large.pixels(64, 64)
    noise = together[4, :, top:bottom, left:right]
    assert noise.mean().item() == pytest.approx(0, abs=0.05) and noise.std().item() == pytest.approx(1, abs=0.05)
    first = Draws(keys[2:3]).normal("erase", (1, 3)).flatten()
    assert_close(alone[0, :, 0, 0], first)


def test_an_empty_box_erases_nothing():
    assert not erase_(torch.zeros(1, 3, 8, 8), torch.tensor([1]), [Erasing(0, Box(0.5, 0.5, 0.5, 0.9))]).any()


@pytest.mark.parametrize("policy", ["3a", "original"])
def test_policies_of_autoaugment_are_timms(policy):
    from timm.data.auto_augment import auto_augment_transform

    image = make_image(3).resize((48, 48))
    hparams = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    ours, theirs = augment_policy(policy, SMALL), auto_augment_transform(policy, hparams)
    for key in range(30):
        seed_python(key, "policy")
        found = ours(image)
        seed_python(key, "policy")
        assert np.array_equal(np.asarray(found), np.asarray(theirs(image))), key


def test_three_augment_is_followed_by_colour_jitter():
    augment = AugmentConfig(auto_augment="3a", color_jitter=0.3, crop=CropConfig(kind="resize"), hflip=0.0)
    image = make_image(5).resize((32, 32))
    geometry = draw_geometry(augment, image.size, 32, key=9)
    assert len(geometry.jitter) == 3
    assert draw_geometry(augment.model_copy(update={"auto_augment": "rand-m9"}), image.size, 32, key=9).jitter == ()
    seed_python(9, "rand_augment")
    expected = jittered(augment_policy("3a", SMALL)(image), geometry.jitter)
    found = TrainTransform(plan_views({"student": SMALL}, training=True), augment)(encode(image), 9)["student"]
    assert torch.equal(found, as_tensor(expected))


def test_autoaugment_never_asks_for_no_bits():
    policy = augment_policy("v0", SMALL)
    for key in range(400):  # timm's own raises within the first 30
        seed_python(key, "policy")
        policy(make_image(1).resize((16, 16)))
