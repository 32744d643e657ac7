import torch
from torchvision.transforms import functional as F

from kd_hf.data.pixels import as_image
from kd_hf.detection.data.loader import train_loader
from kd_hf.detection.data.stage import BoxStage
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import DataConfig
from tests.detection.data.test_loader import AUGMENT
from tests.detection.scenes import Scenes

SPECS = {"student": Preprocessing(), "teacher": Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))}
BATCH = next(iter(train_loader(Scenes(), DataConfig(path="x"), SPECS, per_device=4, total_steps=1, augment=AUGMENT)))


def test_images_are_normalised_as_by_torchvision_and_padding_is_zero_afterwards():
    views, _ = BoxStage(SPECS)(BATCH)
    for name, spec in SPECS.items():
        images = views[name]
        expected = torch.zeros_like(images.pixels)
        for place, (height, width) in enumerate(BATCH.extent.tolist()):
            image = as_image(BATCH.pixels[place, :, :height, :width])
            expected[place, :, :height, :width] = F.normalize(F.to_tensor(image), spec.mean, spec.std)
        assert torch.allclose(images.pixels, expected, atol=1e-6)
        assert not images.pixels.movedim(1, -1)[images.mask].any() and images.mask.any()
        assert images.pixels.dtype == torch.float32


def test_networks_that_agree_share_their_images():
    views, _ = BoxStage({**SPECS, "other": SPECS["student"]})(BATCH)
    assert views["other"] is views["student"] and views["teacher"] is not views["student"]
    assert views["teacher"].mask is views["student"].mask


def test_objects_come_by_image_and_by_output():
    _, target = BoxStage(SPECS)(BATCH)
    assert [len(classes) for classes in target.classes] == list(BATCH.counts) == [len(b) for b in target.boxes]
    assert torch.equal(torch.cat(target.boxes), BATCH.boxes) and torch.equal(torch.cat(target.classes), BATCH.classes)
    _, mapped = BoxStage(SPECS, [7, 5, 1])(BATCH)
    assert torch.cat(mapped.classes).tolist() == [(7, 5, 1)[c] for c in BATCH.classes.tolist()]


def test_images_change_their_type_and_tell_their_tensors():
    images = BoxStage(SPECS)(BATCH)[0]["student"]
    half = images.to(torch.bfloat16)
    assert half.pixels.dtype == torch.bfloat16 and half.mask is images.mask
    assert len(images) == 4 and images.shape == BATCH.pixels.shape and images.device.type == "cpu"
    assert [tensor.shape for tensor in images.tensors()] == [images.pixels.shape, images.mask.shape]
