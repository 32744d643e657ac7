import pickle

import pytest

from kd_hf.data.opening import open_source
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import encode, make_image, refused, write_folders


def test_class_folders(tmp_path):
    cfg = DataConfig(path=str(write_folders(tmp_path)))
    train, test = open_source(cfg, "train"), open_source(cfg, "eval")
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    assert train.labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert train.read(4) == ((tmp_path / "train/bee/1.png").read_bytes(), 1)
    assert train.group_sizes == (9,)
    assert "train (9 images, 3 classes)" in train.describe()
    assert pickle.loads(pickle.dumps(train)).read(4) == train.read(4)


def test_only_images_of_any_depth_count(tmp_path):
    write_folders(tmp_path, per_class=1)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/ant/deep").mkdir()
    (tmp_path / "train/ant/deep/x.JPEG").write_bytes(encode(make_image(0), "JPEG"))
    assert len(open_source(DataConfig(path=str(tmp_path)), "train")) == 4


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
def test_usual_names_of_the_evaluation_split(tmp_path, name):
    cfg = DataConfig(path=str(write_folders(tmp_path, splits=("train", name))))
    assert f"/{name} " in open_source(cfg, "eval").describe()


def test_folder_errors(tmp_path):
    write_folders(tmp_path / "a", splits=("train",))
    refused(DataConfig(path=str(tmp_path / "a")), r"data.eval_split: .* has no split 'validation'", "eval")
    refused(DataConfig(path=str(tmp_path / "a"), train_split="trian"), r"data.train_split: .* Did you mean 'train'")
    refused(DataConfig(path=str(tmp_path / "a"), eval_split="held_out"), r"no split 'held_out'", "eval")
    refused(DataConfig(path=str(tmp_path / "aa")), r"data.path: the folder .* does not exist. Did you mean 'a'")
    refused(DataConfig(path="./nowhere"), r"data.path: the folder './nowhere' does not exist")
    write_folders(tmp_path / "b", classes=("ant", "bee"), splits=("train",))
    write_folders(tmp_path / "b", classes=("ant", "cat"), splits=("val",))
    for split in ("train", "eval"):
        refused(DataConfig(path=str(tmp_path / "b")), r"different classes; only one of them has 'bee', 'cat'", split)
    (tmp_path / "c/train").mkdir(parents=True)
    refused(DataConfig(path=str(tmp_path / "c")), r"has no class folders; expected .*/<class>/<image>.jpg")
    (tmp_path / "d/train/ant").mkdir(parents=True)
    refused(DataConfig(path=str(tmp_path / "d")), r"data.path: no images in ")
