import io
import pickle

import numpy as np
import pytest
from PIL import Image

from kd_hf.config import DataConfig
from kd_hf.data.labels import LabelSubset, choose_labelled
from kd_hf.data.parquet import ParquetFiles
from kd_hf.data.source import open_source
from kd_hf.errors import UserError
from tests.data.conftest import encode, make_image, write_folders, write_parquet


def contents(source):
    return [source.read(row) for row in range(len(source))]


def refused(cfg, pattern, split="train"):
    with pytest.raises(UserError, match=pattern) as caught:
        open_source(cfg, split)
    assert "\n" not in str(caught.value)


# --- digits


def test_digits(digits):
    from sklearn.datasets import load_digits

    train, test = open_source(digits, "train"), open_source(digits, "eval")
    assert (len(train), len(test)) == (1078, 719)
    assert train.class_names == test.class_names == tuple("0123456789")
    for source in (train, test):
        share = np.bincount(source.labels()) / np.bincount(load_digits().target)
        assert np.ptp(share) < 0.02
    assert not {data for data, _ in contents(train)[:300]} & {data for data, _ in contents(test)}
    data, label = train.read(0)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    originals = np.rint(load_digits().images[load_digits().target == label] * 255 / 16).astype(np.uint8)
    large = [Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC) for one in originals]
    assert any(np.array_equal(np.asarray(image), np.asarray(one.convert("RGB"))) for one in large)
    assert contents(open_source(digits, "train"))[:20] == contents(train)[:20]


def test_unknown_builtin():
    refused(DataConfig(path="builtin:digit"), "data.path: unknown built-in data .* Did you mean 'builtin:digits'")


# --- class folders


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


# --- Parquet


@pytest.fixture
def parquet(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 10)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 7, start=10)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", 5, start=100)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(parquet, streaming):
    cfg = DataConfig(path=str(parquet), streaming=streaming, shuffle_block=2)
    train = open_source(cfg, "train")
    expected = [(encode(make_image(i)), i % 3) for i in range(17)]
    assert contents(train) == expected
    assert train.class_names == ("ant", "bee", "cat")
    assert train.group_sizes == (4, 4, 2, 4, 3)
    assert train.labels().tolist() == [label for _, label in expected]
    copy = pickle.loads(pickle.dumps(train))
    for row in (16, 0, 9, 5, 16):
        assert copy.read(row) == expected[row]
    assert contents(open_source(cfg, "eval")) == [(encode(make_image(100 + i)), (100 + i) % 3) for i in range(5)]
    assert "split test" in open_source(cfg, "eval").describe()


def test_streaming_reads_a_row_group_once_per_block(parquet, monkeypatch):
    cfg = DataConfig(path=str(parquet), streaming=True, shuffle_block=2)
    source = open_source(cfg, "train")
    read = []
    original = ParquetFiles.read
    monkeypatch.setattr(ParquetFiles, "read", lambda self, g, columns: read.append(g) or original(self, g, columns))
    for row in (0, 7, 1, 4, 3, 9, 8, 16):
        source.read(row)
    assert read == [0, 1, 2, 4]
    rows = (13, 0, 7, 9, 16)
    for row in rows:  # a fifth group takes the place of another: a block and its borders are kept
        source.read(row)
    assert len(read) > 5
    source.expect(lanes=2)
    for row in rows:
        source.read(row)
    before = len(read)
    for row in rows:
        source.read(row)
    assert len(read) == before  # twice as many are kept


@pytest.mark.parametrize("streaming", [False, True])
def test_data_files_by_pattern(parquet, streaming):
    files = {"train": "data/*-00001-*.parquet", "held_out": ["data/test-*.parquet"]}
    cfg = DataConfig(path=str(parquet), data_files=files, eval_split="held_out", streaming=streaming)
    assert len(open_source(cfg, "train")) == 7
    assert len(open_source(cfg, "eval")) == 5


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_integer_labels_and_bytes(tmp_path, streaming):
    import datasets

    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("int32")})
    columns = {"image": [encode(make_image(i)) for i in range(6)], "label": [0, 4, None, 2, -1, 1]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=4)
    cfg = DataConfig(path=str(tmp_path), streaming=streaming, image_column="image")
    source = open_source(cfg, "train")
    assert [label for _, label in contents(source)] == source.labels().tolist() == [0, 4, -1, 2, -1, 1]
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert source.read(3)[0] == columns["image"][3]
    assert len(open_source(cfg.model_copy(update={"unlabelled": "drop"}), "train")) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_image_cell_is_a_read_error_of_that_row(tmp_path, streaming):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    columns = {"image": [{"bytes": encode(make_image(0)), "path": None}, None], "label": [0, 0]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    source = open_source(DataConfig(path=str(tmp_path), streaming=streaming), "train")
    source.read(0)
    with pytest.raises(OSError, match="empty"):
        source.read(1)


def test_columns_are_found_or_asked_for(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["x", "y", "z"])
    features = datasets.Features(
        {"image": datasets.Image(), "label": label, "coarse": label, "note": datasets.Value("string")}
    )
    write_parquet(tmp_path / "train.parquet", 6, features=features, coarse=[0] * 6, note=["n"] * 6)
    cfg = DataConfig(path=str(tmp_path))
    refused(cfg, r"data.label_column: several columns could be the label; name one of .*coarse \(ClassLabel\)")
    assert open_source(cfg.model_copy(update={"label_column": "coarse"}), "train").labels().tolist() == [0] * 6
    refused(cfg.model_copy(update={"label_column": "coarze"}), r"there is no column 'coarze'. Did you mean 'coarse'")
    refused(cfg.model_copy(update={"label_column": "note"}), r"'note' holds string, expected class labels or integers")
    refused(
        cfg.model_copy(update={"image_column": "imge", "streaming": True}),
        r"data.image_column: there is no column 'imge'. Did you mean 'image'",
    )


def test_parquet_errors(parquet):
    path = str(parquet)
    refused(DataConfig(path=path, train_split="tran", streaming=True), r"data.train_split: .* Did you mean 'train'")
    refused(DataConfig(path=path, data_files={"train": "no-*.parquet"}), r"data.path: .*data_files")
    refused(DataConfig(path=path, name="big"), r"data.path: .*'big'.* Set `data.name`")
    (parquet / "data/train-00001-of-00002.parquet").write_bytes(b"PAR1 broken")
    refused(DataConfig(path=path, streaming=True), r"cannot read the Parquet file .*train-00001")


def test_a_row_group_that_has_become_unreadable(parquet):
    source = open_source(DataConfig(path=str(parquet), streaming=True), "train")
    (parquet / "data/train-00001-of-00002.parquet").unlink()
    source.read(0)
    with pytest.raises(UserError, match=r"cannot read row group 1 of .*train-00001"):
        source.read(16)


def test_the_hub_without_a_network():
    refused(DataConfig(path="someone/something"), r"data.path: 'someone/something': .* Check the network")


def test_streaming_needs_parquet(tmp_path):
    write_folders(tmp_path)
    cfg = DataConfig(path=str(tmp_path), data_files={"train": "train/*/*.png"}, streaming=True)
    refused(cfg, r"data.streaming: .* not stored as Parquet files; set data.streaming=false")


# --- few labels


def test_labels_are_kept_evenly(digits):
    cfg = digits.model_copy(update={"num_labels": 43})
    source = open_source(cfg, "train", seed=1)
    known = source.labels()[source.labels() >= 0]
    assert len(source) == 1078 and len(known) == 43
    assert set(np.bincount(known)) == {4, 5}
    whole = open_source(digits, "train")
    for row in range(0, 1078, 50):
        data, label = source.read(row)
        assert data == whole.read(row)[0]
        assert label in (-1, whole.read(row)[1])
    assert np.array_equal(open_source(cfg, "train", seed=1).labels(), source.labels())
    assert not np.array_equal(open_source(cfg, "train", seed=2).labels(), source.labels())
    assert len(open_source(cfg, "eval")) == 719 and (open_source(cfg, "eval").labels() >= 0).all()


def test_rows_without_label_are_dropped(digits):
    source = open_source(digits.model_copy(update={"num_labels": 50, "unlabelled": "drop"}), "train")
    assert len(source) == 50 and np.bincount(source.labels()).tolist() == [5] * 10
    assert [label for _, label in contents(source)] == source.labels().tolist()
    assert "50 are used and 50 labelled" in source.describe()


def test_dropping_keeps_row_groups(parquet):
    cfg = DataConfig(path=str(parquet), streaming=True, num_labels=6, unlabelled="drop")
    source = open_source(cfg, "train")
    whole = open_source(cfg.model_copy(update={"num_labels": None, "unlabelled": "keep"}), "train")
    assert sum(source.group_sizes) == 6 and 0 not in source.group_sizes
    assert set(contents(source)) <= set(contents(whole))
    assert isinstance(source, LabelSubset)


def test_small_classes_give_all_they_have():
    labels = np.array([0] * 50 + [1] * 2 + [2] * 50 + [-1] * 10)
    chosen = choose_labelled(labels, 22, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [10, 2, 10]
    assert choose_labelled(labels, 102, seed=0).sum() == 102


def test_more_labels_than_rows(digits):
    refused(digits.model_copy(update={"num_labels": 1079}), "data.num_labels: 1079 labels are asked for, .* only 1078")
