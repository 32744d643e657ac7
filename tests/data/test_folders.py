import os
import pickle

import pytest

from kd_hf.data.opening import open_source
from kd_hf.data.pixels import FORMATS, IMAGE_SUFFIXES, decode
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


def noted(root, split="train", **options):
    return open_source(DataConfig(path=str(root), **options), split).note


def test_what_systems_and_notebooks_leave_behind_is_no_data(tmp_path):
    write_folders(tmp_path, per_class=2)
    for name in ("ant", "bee"):
        (tmp_path / f"train/{name}/._0.png").write_bytes(b"\0\5\x16\7")
    for folder in (".ipynb_checkpoints", "__MACOSX/ant", "bee/.ipynb_checkpoints", ".git"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        (tmp_path / "train" / folder / "x.png").write_bytes(encode(make_image(0)))
    (tmp_path / "__MACOSX").mkdir()
    source = open_source(DataConfig(path=str(tmp_path)), "train")
    assert (source.class_names, len(source)) == (("ant", "bee", "cat"), 6)
    assert all(source.read(row)[0].startswith(b"\x89PNG") for row in range(6))
    assert source.note == "names that begin with a dot or are __MACOSX, left out: 6 (first: .git)"
    assert noted(tmp_path, "eval") == ""


def test_links_are_followed_once(tmp_path):
    write_folders(tmp_path, per_class=2)
    extra = tmp_path / "elsewhere/deep"
    extra.mkdir(parents=True)
    (extra / "new.png").write_bytes(encode(make_image(7)))
    (tmp_path / "train/ant/more").symlink_to(extra.parent, target_is_directory=True)
    (tmp_path / "train/ant/again").symlink_to(extra.parent, target_is_directory=True)
    (tmp_path / "train/ant/loop").symlink_to(tmp_path / "train", target_is_directory=True)
    (tmp_path / "train/dog").symlink_to(extra.parent, target_is_directory=True)
    (tmp_path / "val/dog").symlink_to(extra.parent, target_is_directory=True)
    source = open_source(DataConfig(path=str(tmp_path)), "train")
    assert source.class_names == ("ant", "bee", "cat", "dog") and source.labels().tolist() == [0] * 3 + [1, 1, 2, 2, 3]
    assert source.read(7)[0] == (extra / "new.png").read_bytes()


def test_every_suffix_that_pillow_reads(tmp_path):
    from PIL import Image

    Image.init()
    formats = Image.registered_extensions()
    assert sorted(IMAGE_SUFFIXES) == sorted(name for name, kind in formats.items() if kind in (*FORMATS, "MPO"))
    write_folders(tmp_path, per_class=1)
    kinds = {"jfif": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "WEBP": "WEBP", "tga": "TGA", "ico": "ICO"}
    for suffix, kind in kinds.items():
        (tmp_path / f"train/ant/1.{suffix}").write_bytes(encode(make_image(1, 32, 32), kind))
    (tmp_path / "train/ant/vector.svg").write_text("<svg/>")
    (tmp_path / "train/ant/raw.heic").write_bytes(b"x")
    source = open_source(DataConfig(path=str(tmp_path)), "train")
    assert len(source) == 3 + len(kinds)
    assert all(decode(source.read(row)[0]).size == (32, 32) for row in range(1, 7))
    assert source.note.startswith("files that are no images by their name, left out: 2 (first: ")


def test_empty_classes_and_loose_files_are_counted(tmp_path):
    write_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "zebra").mkdir()
    (tmp_path / "train/readme.txt").touch()
    (tmp_path / "train/stray.png").touch()
    left_out = "files beside the class folders, left out: 2 (first: readme.txt)"
    assert noted(tmp_path) == f"{left_out}; class folders without an image: 1 (first: zebra)"


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    write_folders(tmp_path)
    (tmp_path / "train/ant/closed").mkdir()
    listing = os.scandir

    def scandir(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(DataConfig(path=str(tmp_path)), r"cannot list the folder '.*closed': Permission denied")


def test_class_names_of_other_systems(tmp_path):
    """Latin-1 as older archives have it, decomposed letters as macOS writes them: all the same classes."""
    write_folders(tmp_path, classes=("ant",))
    (tmp_path / "train/café").mkdir()
    (tmp_path / "train/café/1.png").write_bytes(encode(make_image(1)))
    latin = os.fsencode(tmp_path / "val") + b"/caf\xe9"
    os.mkdir(latin)
    with open(latin + b"/na\xefve.png", "wb") as file:
        file.write(encode(make_image(2)))
    train, held_out = (open_source(DataConfig(path=str(tmp_path)), split) for split in ("train", "eval"))
    assert train.class_names == held_out.class_names == ("ant", "café")
    assert held_out.note == "class names rewritten in composed UTF-8: 1 (first: café)"
    assert held_out.place(3).endswith("café/naïve.png")
    assert held_out.read(3)[1] == 1 and held_out.describe().encode()
    os.mkdir(os.fsencode(tmp_path / "train") + b"/caf\xe9")
    refused(DataConfig(path=str(tmp_path)), "two class folders called 'café'")
    (tmp_path / "macos/train/cafe\u0301").mkdir(parents=True)
    (tmp_path / "macos/train/cafe\u0301/1.png").write_bytes(encode(make_image(1)))
    assert open_source(DataConfig(path=str(tmp_path / "macos")), "train").class_names == ("café",)


@pytest.mark.parametrize("name", ["_unlabelled", "_unlabeled"])
def test_unlabelled_images_beside_class_folders(tmp_path, name):
    write_folders(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / name / "deep").mkdir(parents=True)
        (tmp_path / split / name / "deep/0.png").write_bytes(encode(make_image(50)))
    train, held_out = (open_source(DataConfig(path=str(tmp_path)), split) for split in ("train", "eval"))
    assert train.labels().tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [-1]
    assert (
        train.class_names == ("ant", "bee", "cat") and "10 images, 1 of them unlabelled, 3 classes" in train.describe()
    )
    assert train.read(9) == (encode(make_image(50)), -1)
    assert len(held_out) == 9 and held_out.note.startswith("unlabelled images, left out of an evaluation: 1")
    few = DataConfig(path=str(tmp_path), num_labels=4)
    assert sorted(open_source(few, "train").labels().tolist()).count(-1) == 6
    dropped = DataConfig(path=str(tmp_path), unlabelled="drop")
    assert len(open_source(dropped, "train")) == 9


def test_a_folder_of_unlabelled_images_for_any_source(tmp_path):
    write_folders(tmp_path / "photos")
    (tmp_path / "photos/more").mkdir()
    for number in range(2):
        (tmp_path / f"photos/more/{number}.png").write_bytes(encode(make_image(60 + number)))
    (tmp_path / "photos/more/._0.png").touch()
    for path, inside in ((tmp_path / "photos", "more"), ("builtin:digits", str(tmp_path / "photos/more"))):
        plain = open_source(DataConfig(path=str(path)), "train")
        source = open_source(DataConfig(path=str(path), unlabelled=inside), "train")
        assert len(source) == len(plain) + 2 and source.labels().tolist() == [*plain.labels().tolist(), -1, -1]
        assert source.read(len(plain) + 1) == (encode(make_image(61)), -1)
        assert source.read(2) == plain.read(2) and source.group_sizes == (*plain.group_sizes, 2)
        assert "2 unlabelled ones" in source.describe() and "begin with a dot" in source.note
        assert source.place(len(plain)).endswith("more/0.png")
        assert len(open_source(DataConfig(path=str(path), unlabelled=inside), "eval")) == len(
            open_source(DataConfig(path=str(path)), "eval")
        )
    refused(DataConfig(path=str(tmp_path / "photos"), unlabelled="dorp"), r"expected keep, drop or a folder .*'drop'")
    (tmp_path / "none").mkdir()
    empty = DataConfig(path=str(tmp_path / "photos"), unlabelled=str(tmp_path / "none"))
    refused(empty, r"data.unlabelled: no images in .*none")
