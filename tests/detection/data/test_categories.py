import numpy as np
import pytest

from kd_hf.detection.data.categories import UNUSED, category_ids, coco_ids, numbered_names, outputs_of_classes
from kd_hf.errors import UserError

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_coco_has_80_classes_between_1_and_90():
    assert sorted(coco_ids().values()) == [number for number in range(1, 91) if number not in GAPS]
    assert (coco_ids()["person"], coco_ids()["stop sign"], coco_ids()["toothbrush"]) == (1, 13, 90)


def test_numbers_without_a_name_are_no_classes():
    names = numbered_names({1: "ant", 3: "bee"}, "here")
    assert names == (UNUSED, "ant", UNUSED, "bee")
    assert category_ids(names) == (1, 3)


@pytest.mark.parametrize("number", [-1, 10_000])
def test_numbers_that_are_no_class_numbers_are_refused(number):
    with pytest.raises(UserError, match=f"category id {number}"):
        numbered_names({number: "ant"}, "here")


def test_as_many_outputs_as_numbers_are_matched_by_number():
    assert outputs_of_classes(("ant", UNUSED, "bee"), 3).tolist() == [0, -1, 2]


def test_cocos_two_numberings_are_matched_by_name():
    dense, official = tuple(coco_ids()), numbered_names({n: name for name, n in coco_ids().items()}, "")
    to_official, to_dense = outputs_of_classes(dense, 91), outputs_of_classes(official, 80)
    assert to_official.tolist() == sorted(coco_ids().values())
    assert np.array_equal(to_dense[to_official], np.arange(80))
    assert set(np.flatnonzero(to_dense < 0)) == GAPS | {0}


def test_some_of_cocos_classes_are_enough():
    assert outputs_of_classes(("zebra", "person"), 91).tolist() == [24, 1]
    assert outputs_of_classes(("zebra", "person"), 80).tolist() == [22, 0]


@pytest.mark.parametrize(("names", "outputs"), [(("ant", "bee"), 91), (("person", "zebra"), 5)])
def test_other_numbers_of_outputs_are_refused(names, outputs):
    with pytest.raises(UserError, match=f"the network has {outputs} classes, the data 2"):
        outputs_of_classes(names, outputs)
