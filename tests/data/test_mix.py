import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from kd_hf.data.mix import (
    Box,
    Mixing,
    _cut,
    batch_mixing,
    check_mixing,
    draw_erasing,
    draw_mixing,
    is_mixing,
    mix_images_,
    mix_target,
)
from kd_hf.errors import UserError
from kd_hf.recipe.config import AugmentConfig

BOTH = AugmentConfig(mixup=0.8, cutmix=1.0)


def images(count=4, size=8):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_mixup_is_the_formula():
    x = images()
    mixed = mix_images_(x.clone(), [Mixing(0, 4, 0.3)])
    assert torch.equal(mixed, 0.3 * x + (1 - 0.3) * x[[1, 0, 3, 2]])


def test_cutmix_pastes_the_partner():
    x = images()
    mixed = mix_images_(x.clone(), [Mixing(0, 4, 0.75, Box(0.25, 0, 0.75, 0.5))])
    expected = x.clone()
    expected[:, :, 2:6, :4] = x[[1, 0, 3, 2], :, 2:6, :4]
    assert torch.equal(mixed, expected)


def test_groups_have_their_own_coefficients_and_one_is_nothing():
    x = images(6)
    mixed = mix_images_(x.clone(), [Mixing(0, 2, 0.5), Mixing(2, 6, 1.0)])
    assert torch.equal(mixed[2:], x[2:])
    assert torch.equal(mixed[0], mixed[1])


def test_equal_to_timms_mixup_with_flipped_partners():
    """timm pairs position i with B - 1 - i; for a batch of two that is the same pair."""
    np.random.seed(0)
    x, label = images(2), torch.tensor([1, 2])
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.0, num_classes=5)
    state = np.random.get_state()
    lam = mixup._params_per_batch()[0]
    np.random.set_state(state)
    theirs, target = mixup(x.clone(), label)
    assert torch.allclose(mix_images_(x.clone(), [Mixing(0, 2, lam)]), theirs, atol=1e-6)
    assert torch.allclose(mix_target(label, [Mixing(0, 2, lam)], 5).soft, target, atol=1e-6)


# of the authors' code and of timm before 1.0.29; later ones have the last row and column of odd sides too
@pytest.mark.parametrize(
    ("lam", "centre", "pixels"),
    [
        (0.5, (3, 60), (0, 38, 25, 64)),
        (0.9, (0, 0), (0, 0, 10, 10)),
        (0.01, (31, 20), (0, 0, 62, 51)),
        (1.0, (5, 5), (5, 5, 5, 5)),
        (0.3, (63, 63), (37, 37, 64, 64)),
    ],
)
def test_cutmix_box_is_the_authors(lam, centre, pixels):
    corrected, box = _cut(lam, 64, *((position + 0.5) / 64 for position in centre))
    top, left, bottom, right = pixels
    assert corrected == 1 - (bottom - top) * (right - left) / 64**2
    assert box is None if corrected == 1 else box.pixels(64, 64) == pixels


def test_lambda_is_the_area_that_is_left():
    for i in range(200):
        lam, box = draw_mixing(AugmentConfig(cutmix=1.0), 33, i)
        x = torch.stack([torch.zeros(3, 33, 33), torch.ones(3, 33, 33)])
        mixed = mix_images_(x, [Mixing(0, 2, lam, box)])
        assert 1 - mixed[0].mean().item() == pytest.approx(lam, abs=1e-6)


def test_distribution_of_draws():
    draws = [draw_mixing(BOTH, 224, "test", i) for i in range(3000)]
    boxes = [box for _, box in draws if box is not None]
    assert len(boxes) / 3000 == pytest.approx(0.5, abs=0.04)
    mixup = np.array([lam for lam, box in draws if box is None])
    assert mixup.mean() == pytest.approx(0.5, abs=0.03)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)
    centres = np.array([(box.top + box.bottom) / 2 for box in boxes])
    assert centres.mean() == pytest.approx(0.5, abs=0.03)


def test_switch_and_probability():
    assert all(draw_mixing(AugmentConfig(mixup=1.0), 32, i)[1] is None for i in range(100))
    assert sum(draw_mixing(AugmentConfig(cutmix=1.0), 32, i)[1] is not None for i in range(100)) > 90
    rare = [draw_mixing(AugmentConfig(mixup=1.0, mix_prob=0.2), 32, i)[0] for i in range(2000)]
    assert np.mean([lam < 1 for lam in rare]) == pytest.approx(0.2, abs=0.03)


def test_target_rows():
    label = torch.tensor([2, 0, -1, 1, -1, -1])
    target = mix_target(label, [Mixing(0, 4, 0.25), Mixing(4, 6, 0.5)], 3)
    expected = torch.tensor([[0.75, 0, 0.25], [0.25, 0, 0.75], [0, 0.75, 0], [0, 0.25, 0], [0, 0, 0], [0, 0, 0]])
    assert torch.allclose(target.soft, expected)
    assert target.hard.tolist() == [0, 2, 1, 1, -1, -1]
    plain = mix_target(label, None, 3)
    assert plain.soft is None and torch.equal(plain.hard, label)
    unmixed = mix_target(label, [Mixing(0, 6, 1.0)], 3)
    assert torch.equal(unmixed.hard, label) and unmixed.soft[2].sum() == 0


@pytest.mark.parametrize("group", [None, 4, 6, 32])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_global_batch_mixes_alike_on_any_number_of_ranks(group, parts):
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, mix_group=group)
    x, label = images(16), torch.arange(16)
    for start in (0, 16, 32):
        whole = batch_mixing(augment, 7, 2, start, 16, 16, 8)
        one, one_target = mix_images_(x.clone(), whole), mix_target(label, whole, 16).soft
        size = 16 // parts
        pieces, targets = [], []
        for rank in range(parts):
            mixing = batch_mixing(augment, 7, 2, start + rank * size, size, 16, 8)
            assert [m.start for m in mixing] == [0, *(m.stop for m in mixing[:-1])] and mixing[-1].stop == size
            pieces.append(mix_images_(x[rank * size :][:size].clone(), mixing))
            targets.append(mix_target(label[rank * size :][:size], mixing, 16).soft)
        assert torch.equal(torch.cat(pieces), one)
        assert torch.equal(torch.cat(targets), one_target)


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(UserError, match=r"per_device_train_batch_size: 7 is odd"):
        check_mixing(BOTH, 7)
    check_mixing(AugmentConfig(), 7)
    check_mixing(BOTH, 8)
    assert not is_mixing(AugmentConfig(mixup=1.0, mix_prob=0))


def test_erasing_follows_timms_distribution():
    size, count = 64, 3000
    boxes = [draw_erasing(0.25, size, i) for i in range(4 * count)]
    assert np.mean([box is not None for box in boxes]) == pytest.approx(0.25, abs=0.02)
    ours = np.array([[b - t, r - le] for t, le, b, r in (box.pixels(size, size) for box in boxes if box)])
    theirs = []
    import random

    random.seed(0)
    erase = RandomErasing(1.0, mode="const", device="cpu")
    for _ in range(count):
        mask = erase(torch.ones(1, size, size))[0] == 0
        theirs.append([mask.any(1).sum().item(), mask.any(0).sum().item()])
    theirs = np.array(theirs)
    assert np.allclose(ours.mean(0), theirs.mean(0), atol=1.0)
    assert np.allclose(ours.std(0), theirs.std(0), atol=1.0)
    assert ours.prod(1).mean() == pytest.approx(theirs.prod(1).mean(), rel=0.05)
    assert ours.min() >= 1 and ours.max() < size


def test_erasing_off():
    assert draw_erasing(0.0, 32, 1) is None
    assert all(draw_erasing(1.0, 32, i) is not None for i in range(300))
