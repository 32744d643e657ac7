import numpy as np
import pytest

from kd_hf.detection.data.categories import UNUSED
from kd_hf.detection.data.objects import make_objects
from kd_hf.detection.data.opening import checked, open_boxes
from kd_hf.detection.data.source import Counts, WithoutEmpty, count_objects
from kd_hf.errors import UserError
from kd_hf.recipe.config import BoxData, DataConfig
from tests.detection.scenes import Scenes, draw, write_coco, write_parquet

CFG = DataConfig(path="x")


def test_everything_is_counted():
    source = Scenes(8)  # 0, 1, 2, 3, 0, 1, 2, 3 boxes
    source.scenes[1].iscrowd[0] = 1
    source.scenes[2].boxes[0][2] = 0
    assert count_objects(source) == Counts(images=8, boxes=12, crowds=1, removed=1, empty=3)


def test_images_without_objects_are_kept_unless_the_option_says_so():
    source = Scenes(12, groups=(5, 7))
    assert checked(source, "train", BoxData(), None) is source
    assert checked(source, "eval", BoxData(empty="drop"), None) is source
    kept = checked(source, "train", BoxData(empty="drop"), None)
    assert isinstance(kept, WithoutEmpty) and kept.group_sizes == (3, 6)  # rows 0, 4 and 8 are empty
    assert [kept.read(row)[1].image_id for row in range(len(kept))] == [o.image_id for o in kept.annotations()]
    assert count_objects(kept).empty == 0 and "9 with objects" in kept.describe()


def test_a_set_without_any_object_cannot_be_trained_on():
    with pytest.raises(UserError, match=r"data.boxes.empty"):
        checked(Scenes(1), "train", BoxData(empty="drop"), None)


def test_an_evaluation_set_has_the_classes_of_the_training_set():
    assert checked(Scenes(4), "eval", BoxData(), ("red", "green", "blue")).num_classes == 3
    with pytest.raises(UserError, match="'green' for class 1, the training set 'blue'"):
        checked(Scenes(4), "eval", BoxData(), ("red", "blue", "green"))
    with pytest.raises(UserError, match="3 numbers, the training set 4 numbers"):
        checked(Scenes(4), "eval", BoxData(), ("red", "green", "blue", "grey"))


def test_numbers_without_names_may_stop_earlier():
    source = Scenes(4)
    source.class_names = ("0", UNUSED, "2")
    assert checked(source, "eval", BoxData(), ("0", "1", "2", "3")).class_names == ("0", "1", "2", "3")


class Corners(Scenes):
    """Corners that were taken for left, top, width and height; or the other way round."""

    def __init__(self, said):
        super().__init__(8)
        self.said = said

    def annotations(self):
        for found in self.scenes:
            boxes = np.array(found.boxes, float).reshape(-1, 4)
            if self.said == "xywh":
                boxes[:, 2:] += boxes[:, :2]
            yield make_objects(boxes, found.classes, size=found.image.size, box_format=self.said)


@pytest.mark.parametrize("said", ["xywh", "xyxy"])
def test_boxes_of_the_other_format_are_noticed(said):
    source = Corners(said)
    source.scenes = [draw((100, 80), [[50, 40, 30, 30]], [0])] * 8
    with pytest.raises(UserError, match=r"data.boxes.box_format: 8 of the first 8 boxes"):
        checked(source, "train", BoxData(), None)


def test_a_folder_is_read_as_what_lies_in_it(tmp_path, private_cache):
    scenes = Scenes(6).scenes
    write_parquet(tmp_path / "tables/data/train-0.parquet", scenes)
    write_coco(tmp_path / "coco", scenes)
    tables = open_boxes(CFG.model_copy(update={"path": str(tmp_path / "tables")}), "train")
    official = open_boxes(CFG.model_copy(update={"path": str(tmp_path / "coco")}), "train")
    assert "numbered 0 to 2" in tables.describe() and "numbered 1 to 4" in official.describe()
    for row in range(6):
        (data, first), (other, second) = tables.read(row), official.read(row)
        assert data == other and np.array_equal(first.boxes, second.boxes) and np.array_equal(first.area, second.area)
        assert [(1, 2, 4)[number] for number in first.classes] == second.classes.tolist()


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("{}/cocoo", "the folder '.*cocoo' does not exist. Did you mean 'coco'"),
        ("{}/coco", "neither Parquet files nor"),
    ],
)
def test_a_folder_that_is_not_there_or_holds_something_else(tmp_path, path, pattern):
    (tmp_path / "coco").mkdir()
    with pytest.raises(UserError, match=pattern):
        open_boxes(DataConfig(path=path.format(tmp_path)), "train")
