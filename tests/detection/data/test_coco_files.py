import pickle

import pytest

from kd_hf.detection.data.categories import UNUSED
from kd_hf.detection.data.opening import open_boxes
from kd_hf.errors import UserError
from kd_hf.recipe.config import BoxData, DataConfig
from tests.detection.scenes import Scenes, write_coco

SCENES = Scenes(5).scenes


def opened(root, split="train", boxes=None, **options):
    return open_boxes(DataConfig(path=str(root), **options), split, boxes)


def refused(root, pattern, split="train", boxes=None, **options):
    with pytest.raises(UserError, match=pattern) as caught:
        opened(root, split, boxes, **options)
    assert "\n" not in str(caught.value)


def test_the_official_layout_with_official_numbers(tmp_path):
    write_coco(tmp_path, SCENES)
    write_coco(tmp_path, SCENES[:3], "val2017")
    source, held_out = opened(tmp_path), opened(tmp_path, "eval")
    assert source.class_names == (UNUSED, "red", "green", UNUSED, "blue")
    assert source.category_ids == (1, 2, 4) and source.num_classes == 5
    assert (len(source), len(held_out), source.group_sizes) == (5, 3, (5,))
    data, objects = source.read(3)
    assert data == SCENES[3].data and objects.image_id == 503 and objects.size == SCENES[3].image.size
    assert objects.classes.tolist() == [1, 2, 4] and objects.boxes.shape == (3, 4)
    assert pickle.loads(pickle.dumps(source)).read(3)[1].boxes.tolist() == objects.boxes.tolist()


def test_objects_may_come_in_any_order_and_lack_what_is_not_needed(tmp_path):
    def change(found):
        found["annotations"].reverse()
        for entry in found["annotations"]:
            del entry["iscrowd"], entry["area"], entry["segmentation"]

    source = opened(write_coco(tmp_path, SCENES, change=change))
    for row, objects in enumerate(source.annotations()):
        expected = SCENES[row].objects()
        assert sorted(objects.area.tolist()) == sorted(expected.area.tolist()) and not objects.iscrowd.any()


def test_files_of_other_names(tmp_path):
    write_coco(tmp_path, SCENES)
    part = write_coco(tmp_path / "part", SCENES[:2]) / "annotations/instances_train2017.json"
    boxes = BoxData(annotations={"train": str(part)}, images={"train": "train2017"})
    assert len(opened(tmp_path, boxes=boxes)) == 2  # the recipe names a file that lists a part of the images
    refused(
        tmp_path, "data.train_split: .* no split 'training'. Did you mean 'train'", boxes=boxes, train_split="training"
    )
    refused(tmp_path, "data.boxes.annotations: there is no file", boxes=BoxData(annotations={"train": "a.json"}))
    boxes = BoxData(annotations={"train": str(part)}, images={"train": "train2071"})
    refused(tmp_path, "data.boxes.images: there is no folder .* Did you mean 'train2017'", boxes=boxes)


def test_which_split_is_meant(tmp_path):
    write_coco(tmp_path, SCENES)
    refused(tmp_path, "data.eval_split: .* has no split 'validation'", "eval")
    write_coco(tmp_path, SCENES[:2], "train2014")
    refused(tmp_path, "data.train_split: .* has train2014 and train2017; name one")
    assert len(opened(tmp_path, train_split="train2014")) == 2


def test_missing_files_are_counted_and_the_first_is_named(tmp_path):
    write_coco(tmp_path, SCENES)
    for row in (1, 3, 4):
        (tmp_path / f"train2017/{500 + row:012d}.png").unlink()
    refused(tmp_path, "lacks 000000000501.png and 2 more, which .*instances_train2017.json lists")


def test_images_that_the_file_does_not_list_are_refused(tmp_path):
    write_coco(tmp_path, SCENES)
    (tmp_path / "train2017/new.jpg").touch()
    (tmp_path / "train2017/notes.txt").touch()
    refused(tmp_path, "does not list new.jpg of")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda found: found["annotations"][0].update(category_id=3),
            "of the category 3, .* it has 3, numbered 1 to 4",
        ),
        (lambda found: found["annotations"][0].update(image_id=7), "in the image 7, which it does not list"),
        (lambda found: found["annotations"][0].update(bbox=[1, 2, 3]), "the box of entry 0 has 3 numbers, not 4"),
        (lambda found: found["images"][2].pop("width"), "entry 2 of 'images' has no 'width'"),
        (lambda found: found.pop("categories"), "not a file of COCO's: it has no list 'categories'"),
        (lambda found: found["categories"][0].update(id=-1), "category id -1"),
    ],
)
def test_a_file_that_does_not_fit_itself(tmp_path, change, pattern):
    refused(write_coco(tmp_path, SCENES, change=change), pattern)


def test_a_file_that_is_no_json(tmp_path):
    write_coco(tmp_path, SCENES)
    (tmp_path / "annotations/instances_train2017.json").write_text("{")
    refused(tmp_path, "instances_train2017.json is not JSON")
