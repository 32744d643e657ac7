import io

import numpy as np
import torch
from PIL import Image

from kd_hf.detection.metrics.evaluator import BoxSubject
from kd_hf.recipe.config import BoxAugment
from kd_hf.report.detections import TRUTH, detections, look
from kd_hf.report.figures import DARK, LIGHT
from tests.detection.scenes import NAMES, VIEW, Colours, Scenes

AUGMENT = BoxAugment(eval_size=160, max_size=400, multiple_of=8)
SUBJECTS = {"teacher": BoxSubject(Colours(), VIEW), "student": BoxSubject(Colours(noise=0.05), VIEW)}


def shown(count=4, damaged=(), **options):
    return look(SUBJECTS, Scenes(8, damaged=damaged), torch.device("cpu"), count, AUGMENT, **options)


def test_images_come_with_what_is_annotated_and_found_in_their_own_pixels():
    source, seen = Scenes(8), shown()
    assert len(seen) == 4 and list(seen[0].found) == [TRUTH, "teacher", "student"]
    for row, item in zip((0, 2, 4, 6), seen, strict=True):
        objects = source.scenes[row].objects()
        assert item.image.size == objects.size
        assert np.array_equal(item.found[TRUTH].boxes, objects.boxes) and item.found[TRUTH].scores is None
        found = item.found["teacher"]
        order = np.argsort(found.classes)
        assert found.classes[order].tolist() == objects.classes.tolist()
        assert np.allclose(found.boxes[order], objects.boxes, atol=1.0)
        assert (found.scores >= 0.3).all() and (np.diff(found.scores) <= 0).all()


def test_unsure_detections_are_left_out():
    assert all(len(item.found["student"].boxes) == 0 for item in shown(least=0.999))


def test_unreadable_images_are_left_out():
    assert len(shown(damaged=(2,))) == 3


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def colour_count(picture, colour):
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - value).max(2) < 12).sum())


def test_boxes_are_drawn_in_the_colours_of_student_and_teacher():
    picture = detections(shown(), NAMES)
    assert picture.name == "detections" and "30 %" in picture.caption
    for data, theme in ((picture.light, LIGHT), (picture.dark, DARK)):
        drawn = pixels(data)
        width = drawn.shape[1]
        for column, colour in enumerate((theme.faint, theme.teacher, theme.student)):
            part = drawn[:, width * column // 3 : width * (column + 1) // 3]
            assert colour_count(part, colour) > 300


def test_no_images_no_picture():
    assert detections([], NAMES) is None
