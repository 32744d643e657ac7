import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F
from transformers.image_transforms import get_size_with_aspect_ratio

from kd_hf.data.pixels import UnreadableImage, as_tensor
from kd_hf.detection.data.objects import make_objects
from kd_hf.detection.data.views import Crop, EvalTransform, Flip, Resize, TrainTransform, draw_steps, fitted, take_view
from kd_hf.draws import generator, hash_key
from kd_hf.recipe.config import BoxAugment
from tests.detection.scenes import Scenes, draw, scene

SMALL = BoxAugment(
    sizes=(64, 80, 96), max_size=150, crop_sizes=(90, 120), crop_range=(48, 100), multiple_of=8, eval_size=96
)
OFFICIAL = BoxAugment()


def lit(pixels, colour):
    """The rectangle of a colour: where it is at least half as bright as at first; None when it is nowhere."""
    on = pixels[colour] > 127
    if not on.any():
        return None
    y, x = (on.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return [x[0], y[0], x[-1] + 1, y[-1] + 1]


def corners(view):
    """Boxes of a view in its pixels."""
    height, width = view.pixels.shape[1:]
    centre, sides = view.boxes.split(2, 1)
    return torch.cat([centre - sides / 2, centre + sides / 2], 1) * torch.tensor([width, height] * 2)


def assert_boxes_lie_on_their_rectangles(view):
    found = dict(zip(view.classes.tolist(), corners(view).tolist(), strict=True))
    for colour in range(3):
        seen = lit(view.pixels, colour)
        if colour not in found:
            assert seen is None
        elif seen is None:  # cut off but for a part of a pixel
            assert min(found[colour][2] - found[colour][0], found[colour][3] - found[colour][1]) < 1.5
        else:
            assert np.allclose(seen, found[colour], atol=1.0)


def test_boxes_lie_on_what_was_drawn_after_every_flip_crop_and_resize():
    transform, kinds = TrainTransform(SMALL), set()
    for index in range(150):
        drawn, key = scene(index), hash_key(index)
        assert_boxes_lie_on_their_rectangles(transform(drawn.data, drawn.objects(), key))
        kinds.add(tuple(type(step) for step in draw_steps(SMALL, drawn.image.size, key)))
    assert kinds == {(Resize,), (Flip, Resize), (Resize, Crop, Resize), (Flip, Resize, Crop, Resize)}


def test_boxes_lie_on_what_was_drawn_in_evaluation():
    for index in range(20):
        drawn = scene(index)
        assert_boxes_lie_on_their_rectangles(EvalTransform(SMALL)(drawn.data, drawn.objects()))


def test_what_a_crop_leaves_out_is_left_out():
    drawn = draw((100, 80), [[0, 0, 20, 20], [50, 40, 30, 30]], [0, 1])
    view = take_view(drawn.image, drawn.objects(), (Crop((20, 10, 70, 60)),))
    assert view.classes.tolist() == [1] and view.removed == 0
    assert torch.allclose(corners(view), torch.tensor([[30.0, 30, 50, 50]]))
    assert view.size == (100, 80)  # of the stored image


def test_steps_are_torchvisions_on_pil_images():
    drawn = scene(3)
    width, height = drawn.image.size
    assert Flip(width).image(drawn.image).tobytes() == F.hflip(drawn.image).tobytes()
    assert Crop((5, 7, 45, 57)).image(drawn.image).tobytes() == F.crop(drawn.image, 7, 5, 50, 40).tobytes()
    resized = Resize((width, height), (64, 80)).image(drawn.image)
    assert resized.tobytes() == F.resize(drawn.image, [80, 64]).tobytes()


def test_sizes_are_those_of_detr_rounded_down():
    draws = generator("sizes")
    for width, height in draws.integers(300, 1200, (300, 2)).tolist():
        for shortest in (400, 500, 600, 800):
            tall, wide = get_size_with_aspect_ratio((height, width), shortest)
            assert fitted((width, height), shortest, None) == (wide, tall)
            assert fitted((width, height), shortest, None, 16) == (wide - wide % 16, tall - tall % 16)
            tall, wide = get_size_with_aspect_ratio((height, width), shortest, 1333)
            assert fitted((width, height), shortest, 1333, 16) == (wide - wide % 16, tall - tall % 16)


@pytest.mark.parametrize("size", [(4000, 20), (20, 4000), (1, 1), (16, 16)])
def test_no_image_is_too_long_to_have_a_size(size):
    for multiple in (1, 16):
        new = fitted(size, 800, 1333, multiple)
        assert multiple <= min(new) and max(new) <= 1333 and not any(side % multiple for side in new)


def test_official_draws():
    counts = {"flip": 0, "crop": 0}
    for number in range(2000):
        size = ((640, 480), (427, 640), (500, 500))[number % 3]
        steps = list(draw_steps(OFFICIAL, size, hash_key(number)))
        if isinstance(steps[0], Flip):
            counts["flip"] += 1
            assert steps.pop(0).width == size[0]
        if len(steps) == 3:
            counts["crop"] += 1
            larger, crop = steps[0].new, steps[1].box
            assert min(larger) in (400, 496, 592) and steps[0].old == size  # 500 and 600 rounded down
            sides = (crop[2] - crop[0], crop[3] - crop[1])
            assert all(384 <= side <= min(600, whole) for side, whole in zip(sides, larger, strict=True))
            assert crop[0] >= 0 and crop[1] >= 0 and crop[2] <= larger[0] and crop[3] <= larger[1]
            size = sides
        last = steps[-1]
        assert last.old == size and max(last.new) <= 1333 and not any(side % 16 for side in last.new)
        assert min(last.new) in OFFICIAL.sizes
    assert all(900 < count < 1100 for count in counts.values())


def test_all_sizes_and_ends_of_the_crop_range_are_drawn():
    augment = SMALL.model_copy(update={"crop": 1.0, "max_size": 400})
    drawn = [draw_steps(augment, (100, 100), hash_key(n)) for n in range(600)]
    assert {min(steps[-1].new) for steps in drawn} == {64, 80, 96}
    assert {min(steps[-3].new) for steps in drawn} == {88, 120}  # 90 rounded down
    sides = {side for s in drawn for side in (s[-2].box[2] - s[-2].box[0], s[-2].box[3] - s[-2].box[1])}
    assert (min(sides), max(sides)) == (48, 100)


def test_a_crop_is_no_larger_than_its_image():
    augment = BoxAugment(crop=1.0, crop_sizes=(64,), crop_range=(384, 600), sizes=(64,))
    steps = draw_steps(augment, (100, 80), 1)
    assert steps[-2].box == (0, 0, *steps[-3].new)


def test_draws_are_named_by_the_key_alone():
    drawn = scene(3)
    transform = TrainTransform(SMALL)
    views = [transform(drawn.data, drawn.objects(), key) for key in (*range(20), *range(20))]
    for first, again in zip(views[:20], views[20:], strict=True):
        assert torch.equal(first.pixels, again.pixels) and torch.equal(first.boxes, again.boxes)
    assert len({view.pixels.numpy().tobytes() for view in views}) > 15


def test_evaluation_takes_800_and_1333_and_keeps_the_pixels():
    image = Image.fromarray(generator("picture").integers(0, 256, (60, 110, 3)).astype(np.uint8))
    drawn = draw((110, 60), [], [])
    drawn.image = image
    view = EvalTransform(OFFICIAL)(drawn.data, make_objects([], []))
    assert tuple(view.pixels.shape) == (3, 720, 1328)  # 727 × 1333 rounded down
    assert torch.equal(view.pixels, as_tensor(F.resize(image, [720, 1328])))
    assert view.boxes.shape == (0, 4) and view.boxes.dtype == torch.float32


def test_crowds_and_boxes_that_are_none_are_no_targets():
    drawn = draw((64, 64), [[0, 0, 30, 30], [10, 10, 30, 30], [5, 5, 0, 9]], [0, 1, 2], [1, 0, 0])
    view = EvalTransform(SMALL)(drawn.data, drawn.objects())
    assert view.classes.tolist() == [1] and view.removed == 1


def test_an_image_of_another_size_than_annotated_is_not_the_image():
    drawn = Scenes(2).scenes[1]
    width, height = drawn.image.size
    objects = make_objects([], [], size=(height + 1, width))
    with pytest.raises(UnreadableImage, match=f"{width}×{height} pixels, {height + 1}×{width} in the annotations"):
        TrainTransform(SMALL)(drawn.data, objects, 0)
