"""What people write into `data.path`, other than a folder of images."""

import time

import pytest

from kd_hf.data.opening import open_source
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import encode, make_image, refused, write_folders, write_parquet


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("a.zip", r"'a.zip' is a file; unpack it, and give the folder: unzip a.zip -d a$"),
        ("a.tar.gz", r"unpack it, and give the folder: mkdir a && tar -xf a.tar.gz -C a$"),
        ("a.TGZ", r"mkdir a && tar -xf a.TGZ -C a$"),
        ("a.7z", r"unpack a.7z into a$"),
        ("a.parquet", r"set data.path to its folder and data.data_files to {train: a.parquet, validation: …}$"),
        ("a.tar", r"data.data_files to {train: a.tar, validation: …}$"),
        ("a.JPG", r"is a file; it is one image; give the folder that holds train/<class>/<image>.jpg$"),
        ("a.csv", r"is a file; give a folder of class folders, of Parquet or tar files, or a data set of the Hub"),
    ],
)
def test_a_file_is_refused_with_what_to_do(here, name, pattern):
    (here / name).touch()
    refused(DataConfig(path=name), f"^data.path: .*{pattern}")


def test_the_advice_for_one_parquet_file_works(here):
    write_parquet(here / "files/a.parquet", 4)
    files = {"train": "a.parquet", "validation": "a.parquet"}
    assert len(open_source(DataConfig(path=str(here / "files"), data_files=files), "train")) == 4


@pytest.mark.parametrize("path", ["", "  "])
def test_nothing_is_written(path):
    refused(DataConfig(path=path), r"^data.path is empty; give a folder")


def test_variables_and_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(write_folders(here)))
    monkeypatch.setenv("PHOTOS", str(here))
    monkeypatch.delenv("NOWHERE", raising=False)
    for path in ("$HOME", "${PHOTOS}", "~", "$PHOTOS/../" + here.name):
        assert len(open_source(DataConfig(path=path), "train")) == 9
    for path in ("$NOWHERE/photos", "${NOWHERE}"):
        refused(DataConfig(path=path), r"the environment variable NOWHERE in '.*' is not set")


def test_archives_in_the_place_of_folders(here):
    (here / "set").mkdir()
    (here / "set/train.tar.gz").touch()
    refused(DataConfig(path="set"), r"has no split 'train'.*; set/train.tar.gz has to be unpacked first")
    refused(DataConfig(path="sets.zip"), r"there is no file 'sets.zip', and archives have to be unpacked")


def test_a_misspelt_folder_is_named_at_once(here):
    """No network: the Hub's client would try for half a minute."""
    (here / "photos").mkdir()
    started = time.monotonic()
    refused(DataConfig(path="photoss"), r"'photoss'.* \(there is no 'photoss' here. Did you mean 'photos'\?\)")
    assert time.monotonic() - started < 10
    refused(DataConfig(path="./photoss"), r"the folder './photoss' does not exist. Did you mean 'photos'")


def test_hidden_tables_do_not_make_a_folder_one_of_tables(here):
    write_folders(here)
    (here / "train/._a.parquet").touch()
    (here / "train/ant/0.tar").write_bytes(encode(make_image(0)))
    assert len(open_source(DataConfig(path=str(here)), "train")) == 9
