import pytest
from pydantic import ValidationError

from kd_hf.detection.data.checks import check_data
from kd_hf.errors import UserError
from kd_hf.recipe.config import AugmentConfig, BoxAugment, CropConfig, DataConfig


def test_defaults_are_the_authors():
    augment = BoxAugment()
    assert augment.sizes == tuple(range(480, 801, 16)) and len(augment.sizes) == 21
    assert (augment.crop_sizes, augment.crop_range, augment.max_size) == ((400, 500, 600), (384, 600), 1333)
    assert (augment.hflip, augment.crop, augment.multiple_of, augment.eval_size) == (0.5, 0.5, 16, 800)


@pytest.mark.parametrize("wrong", [{"crop_range": (9, 3)}, {"sizes": (8,)}, {"sizes": ()}, {"hflips": 1}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValidationError):
        BoxAugment(**wrong)


@pytest.mark.parametrize(
    ("name", "value"), [("mixup", 0.8), ("crop", CropConfig(kind="pad")), ("auto_augment", "3a"), ("hflip", 0.0)]
)
def test_changes_that_do_not_know_boxes_are_refused(name, value):
    check_data(DataConfig(path="x", augment=AugmentConfig(repeats=2)))
    with pytest.raises(UserError, match=f"data.augment.{name}: not for images with boxes"):
        check_data(DataConfig(path="x", augment=AugmentConfig(**{name: value})))


@pytest.mark.parametrize(
    ("name", "value"), [("image_size", 224), ("num_labels", 9), ("unlabelled", "drop"), ("hold", True)]
)
def test_options_of_images_with_labels_are_refused(name, value):
    with pytest.raises(UserError, match=f"data.{name}: not for images with boxes"):
        check_data(DataConfig(path="x", **{name: value}))
