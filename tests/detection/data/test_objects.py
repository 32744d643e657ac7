import numpy as np
import pytest

from kd_hf.detection.data.objects import make_objects, trainable

NAN, INF = float("nan"), float("inf")


def test_boxes_become_corners_and_area_is_that_of_the_box_unless_told():
    objects = make_objects([[1, 2, 3, 4]], [5])
    assert objects.boxes.tolist() == [[1, 2, 4, 6]] and objects.area.tolist() == [12] and not objects.iscrowd.any()
    assert make_objects([[1, 2, 3, 4]], [5], area=[7.5]).area.tolist() == [7.5]
    assert make_objects([[1, 2, 3, 4]], [5], box_format="xyxy").boxes.tolist() == [[1, 2, 3, 4]]


def test_no_objects_is_fine():
    objects = make_objects([], [])
    assert objects.boxes.shape == (0, 4) and len(objects) == 0
    kept, removed = trainable(objects, (8, 8))
    assert kept.boxes.shape == (0, 4) and removed == 0


def test_training_sees_no_crowds_and_boxes_cut_off_at_the_borders():
    objects = make_objects([[-4, 2, 8, 100], [0, 0, 5, 5]], [1, 2], iscrowd=[0, 1], size=(20, 30))
    kept, removed = trainable(objects, (20, 30))
    assert kept.boxes.tolist() == [[0, 2, 4, 30]] and kept.classes.tolist() == [1] and removed == 0
    assert objects.boxes[0].tolist() == [-4, 2, 4, 102]  # as stored


@pytest.mark.parametrize("box", [[1, 1, 0, 5], [1, 1, 5, -2], [NAN, 1, 5, 5], [1, 1, INF, 5], [20, 0, 5, 5]])
def test_boxes_that_are_none_are_removed_and_counted(box):
    kept, removed = trainable(make_objects([box, [1, 1, 4, 4]], [0, 1]), (20, 30))
    assert removed == 1 and kept.classes.tolist() == [1] and np.isfinite(kept.boxes).all()
