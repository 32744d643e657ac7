"""What networks answer, and how alike their features are, against other ways to the same numbers."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

from kd_hf.data.opening import open_source
from kd_hf.data.source import Source
from kd_hf.errors import UserError
from kd_hf.eval.networks import evaluate_models
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from kd_hf.recipe.config import DataConfig
from kd_hf.report.probe import (
    PLAIN,
    STUDENT,
    THUMBNAIL,
    Sample,
    class_gains,
    confusions,
    depth_taps,
    linear_cka,
    look,
    shadow,
)


class Noise(Source):
    """Random images without structure; every third has no label, one cannot be read."""

    class_names = ("a", "b", "c")

    def __init__(self, count=20, size=32):
        self.size, self.group_sizes = size, (count,)

    def read(self, row):
        if row == 5:
            return b"no image", 0
        pixels = np.random.default_rng(row).integers(0, 255, (self.size, self.size, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue(), -1 if row % 3 == 0 else row % 3

    def labels(self):
        return np.array([-1 if row % 3 == 0 else row % 3 for row in range(len(self))])

    def describe(self):
        return "noise"


@pytest.fixture(scope="module")
def digits():
    return open_source(DataConfig(path="builtin:digits"), "eval")


def direct_cka(x, y):
    """The definition, from the cross-covariance."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_cka_is_its_definition():
    random = np.random.default_rng(0)
    left = [random.normal(size=(50, width)) + 3.0 for width in (4, 80)]
    right = [left[0] @ random.normal(size=(4, 6)), random.normal(size=(50, 9)), random.normal(size=(50, 1))]
    expected = [[direct_cka(x, y) for y in right] for x in left]
    np.testing.assert_allclose(linear_cka(left, right), expected, rtol=1e-10)


def test_cka_does_not_see_rotation_scale_and_shift():
    random = np.random.default_rng(1)
    values = random.normal(size=(30, 8))
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    np.testing.assert_allclose(linear_cka([values], [values @ rotation * 7.0 - 2.0]), 1.0, rtol=1e-10)


def test_cka_of_nothing_is_not_a_number():
    random = np.random.default_rng(2)
    values, broken = random.normal(size=(10, 3)), np.full((10, 3), np.inf)
    assert np.isnan(linear_cka([np.full((10, 3), 0.1), broken], [values])).all()


def test_predictions_are_those_of_the_eval_command(trained, digits):
    teacher = trained.parent / "teacher"
    networks = {
        STUDENT: load_model(str(trained), pretrained=True),
        "teacher": load_model(str(teacher), pretrained=True),
    }
    sample = look(networks, digits, samples=300)
    values = evaluate_models(
        [str(trained)], str(teacher), {"path": "builtin:digits"}, batch_size=50, max_samples=300, use_cpu=True
    )
    found = values[str(trained)]
    assert 100 * sample.hits(STUDENT).mean() == pytest.approx(found["top1"])
    assert 100 * (sample.choice[STUDENT] == sample.choice["teacher"]).mean() == pytest.approx(found["agreement"])
    assert 100 * sample.hits("teacher").mean() == pytest.approx(values[str(teacher)]["top1"])
    different = np.flatnonzero(sample.choice[STUDENT] != sample.choice["teacher"])
    assert sorted(sample.pictures) == different.tolist() and len(different) > 0


def test_features_are_pooled_taps_of_an_even_spread(digits):
    handle = load_model("test_vit", num_classes=10, image_size=32)
    sample = look({STUDENT: handle, PLAIN: handle}, digits)
    features = sample.features[STUDENT]
    assert list(features) == [*(f"block:{index}" for index in range(handle.info.depth)), "stage:1"]
    assert {values.shape for values in features.values()} == {(512, handle.info.stages[0].channels)}
    assert not sample.features[PLAIN]
    # the gallery's images are among those CKA sees: the same network gives their features again
    tapped = TappedModel(shadow(handle), handle.info, ("block:-1", "stage:1"))
    with torch.no_grad():
        taps = tapped(sample.inputs[STUDENT]).taps
    last = taps["block:-1"][:, 1:].mean(1).double().numpy()
    distance = np.abs(features[f"block:{handle.info.depth - 1}"][:, None] - last[None]).max(2)
    assert (distance.min(0) < 1e-4).all() and len(last) == 8
    pooled = taps["stage:1"].mean((2, 3)).double().numpy()
    assert np.abs(features["stage:1"][0] - pooled[0]).max() < 1e-4


def test_networks_are_left_as_they_are(digits):
    handle = load_model("test_resnet", num_classes=10, image_size=32)
    handle.network.train()
    before = copy.deepcopy(handle.network.state_dict())
    look({STUDENT: handle}, digits, samples=40)
    assert all(module.training for module in handle.network.modules())
    assert all(value.equal(before[key]) for key, value in handle.network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in handle.network.modules())
    twin = shadow(handle).network
    assert all(a is b for a, b in zip(twin.parameters(), handle.network.parameters(), strict=True))


def test_images_without_labels_and_unreadable_ones():
    handle = load_model("test_efficientnet", num_classes=3, image_size=32)
    sample = look({STUDENT: handle}, Noise())
    assert len(sample.label) == len(sample.choice[STUDENT]) == 19
    assert (sample.label == np.delete(Noise().labels(), 5)).all()
    gains = class_gains(sample)
    assert sorted(gains.names) == ["b", "c"] and gains.against is None
    wrong = np.flatnonzero((sample.label >= 0) & ~sample.hits(STUDENT))
    assert sorted(sample.pictures) == wrong.tolist()


def test_large_images_are_kept_small():
    handle = load_model("test_efficientnet", num_classes=3, image_size=160)
    sample = look({STUDENT: handle}, Noise(6, 160))
    assert {picture.shape for picture in sample.pictures.values()} <= {(3, THUMBNAIL, THUMBNAIL)}
    assert sample.pictures


def test_classes_that_do_not_fit():
    with pytest.raises(UserError, match="the student has 7 classes, noise has 3"):
        look({STUDENT: load_model("test_resnet", num_classes=7, image_size=32)}, Noise())
    networks = {STUDENT: load_model("test_resnet", num_classes=3, image_size=32)}
    networks["other"] = load_model("test_vit", num_classes=7, image_size=32)
    sample = look(networks, Noise())
    assert sample.reference is None and "other" in sample.features  # nothing to agree on, but features to compare


def test_taps_of_irregular_networks():
    assert depth_taps(load_model("levit_128s", num_classes=3, device="meta").info) == ("pre_logits",)


def small_sample():
    label = np.array([0, 0, 1, 1, 2, -1])
    choice = {STUDENT: np.array([0, 1, 1, 0, 0, 0]), "t": np.array([0, 0, 1, 1, 2, 2])}
    sure = {STUDENT: np.array([0.9, 0.5, 0.9, 0.8, 0.6, 0.7]), "t": np.array([0.9, 0.5, 0.9, 0.9, 0.6, 0.9])}
    pictures = dict.fromkeys((1, 3, 4, 5), np.zeros((3, 4, 4), np.uint8))
    return Sample(("x", "y", "z"), label, choice, sure, pictures=pictures)


def test_confusions_most_frequent_and_surest_first():
    found = [(pair.student, pair.other, pair.images) for pair in confusions(small_sample())]
    assert found == [(0, 2, (5, 4)), (0, 1, (3,)), (1, 0, (1,))]


def test_gains_are_against_the_plain_twin_where_there_is_one():
    sample = small_sample()
    gains = class_gains(sample)
    assert gains.against == "t" and gains.names == ("x", "y", "z")
    assert gains.difference.tolist() == [-50.0, -50.0, -100.0]
    sample.choice[PLAIN] = np.array([1, 1, 1, 1, 1, 1])
    gains = class_gains(sample)
    assert (gains.against, gains.names) == (PLAIN, ("x", "z", "y"))
    assert gains.difference.tolist() == [50.0, 0.0, -50.0] and gains.counts.tolist() == [2, 1, 2]
    sample.label[:] = -1
    assert class_gains(sample) is None
