import json
import pickle
from pathlib import Path

import pytest

from kd_hf.data.opening import open_source
from kd_hf.data.parquet import ParquetFiles
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import contents, encode, make_image, refused, write_folders, write_parquet


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
    refused(cfg.model_copy(update={"label_column": "image"}), r"'image' holds Image, expected class numbers or names")
    assert open_source(cfg.model_copy(update={"label_column": "note"}), "train").class_names == ("n",)
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


def labelled(path, labels, names=None, start=0):
    """A Parquet file with these labels: classes with `names`, or plain integers."""
    import datasets

    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    columns = {
        "image": [{"bytes": encode(make_image(start + i)), "path": None} for i in range(len(labels))],
        "label": labels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_numbers_have_the_classes_of_the_training_split(tmp_path, streaming):
    labelled(tmp_path / "train.parquet", [0, 3, 1])
    labelled(tmp_path / "val.parquet", [1, 0])
    cfg = DataConfig(path=str(tmp_path), streaming=streaming)
    assert open_source(cfg, "eval").class_names == open_source(cfg, "train").class_names == ("0", "1", "2", "3")
    labelled(tmp_path / "val.parquet", [1, 4], start=7)
    refused(cfg, r"different classes; only one of them has '4'", "eval")
    assert len(open_source(cfg, "train")) == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("names", [["ant", "cat", "bee"], ["ant", "bee"], ["ant", "bee", "cat", "dog"]])
def test_other_class_names_in_evaluation_are_refused(tmp_path, streaming, names):
    labelled(tmp_path / "train.parquet", [0, 2, 1], ["ant", "bee", "cat"])
    labelled(tmp_path / "val.parquet", [1, 0], names)
    refused(DataConfig(path=str(tmp_path), streaming=streaming), "classes", "eval")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_training_split_does_not_hinder_evaluation(tmp_path, streaming):
    labelled(tmp_path / "val.parquet", [1, 0], ["ant", "bee"])
    assert open_source(DataConfig(path=str(tmp_path), streaming=streaming), "eval").num_classes == 2
    if streaming:  # otherwise `datasets` prepares all splits
        (tmp_path / "train.parquet").write_bytes(b"PAR1 broken")
        assert open_source(DataConfig(path=str(tmp_path), streaming=True), "eval").num_classes == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("label", "names", "message"), [(-2, None, "has the label -2"), (3, 3, "label 3, but only 3")])
def test_labels_that_are_no_class(tmp_path, streaming, label, names, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    images = [{"bytes": encode(make_image(i)), "path": None} for i in range(2)]
    table = pa.table({"image": images, "label": [0, label]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train.parquet")
    refused(DataConfig(path=str(tmp_path), streaming=streaming), f"data.label_column: .*{message}")


def test_labels_are_read_where_the_footer_does_not_tell_their_range(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encode(make_image(i)), "path": None} for i in range(4)]
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": images, "label": [0, 5, None, 1]}), path, write_statistics=False)
    assert ParquetFiles([str(path)]).label_range("label") is None
    assert open_source(DataConfig(path=str(tmp_path), streaming=True), "train").num_classes == 6


def test_a_file_without_the_columns_of_the_others(parquet):
    import pyarrow.parquet as pq

    path = parquet / "data/train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(path).drop_columns("label"), path)
    refused(DataConfig(path=str(parquet), streaming=True), r"train-00001-of-00002.parquet has no column 'label'")


def test_files_with_other_classes(parquet):
    write_parquet(parquet / "data/train-00001-of-00002.parquet", 7, start=10, names=("ant", "cat", "bee"))
    for streaming in (False, True):
        cfg = DataConfig(path=str(parquet), streaming=streaming)
        refused(cfg, r"train-00001-.* has other classes for 'label' than .*train-00000")


def test_a_prepared_table_remembers_the_row_groups_of_its_files(parquet, monkeypatch):
    cfg = DataConfig(path=str(parquet))
    sizes = open_source(cfg, "train").group_sizes
    opened = []
    original = ParquetFiles.__init__
    monkeypatch.setattr(ParquetFiles, "__init__", lambda self, files: opened.append(files) or original(self, files))
    assert open_source(cfg, "train").group_sizes == sizes == (4, 4, 2, 4, 3)
    assert not opened
    (memory,) = Path(datasets_cache()).rglob("kd_hf_row_groups.json")
    memory.write_text(json.dumps({"train": [4, 4]}))
    refused(cfg, r"has 17 rows, its files have 8; remove that folder")
    memory.unlink()
    assert open_source(cfg, "train").group_sizes == sizes


def datasets_cache():
    import datasets

    return datasets.config.HF_DATASETS_CACHE


def test_a_table_that_was_not_made_from_parquet_is_one_group(tmp_path):
    write_folders(tmp_path)
    files = {"train": "train/**", "validation": "val/**"}
    train = open_source(DataConfig(path=str(tmp_path), data_files=files), "train")
    assert train.group_sizes == (9,) and train.class_names == ("ant", "bee", "cat")
    assert {train.read(row) for row in range(9)} == {
        (path.read_bytes(), train.class_names.index(path.parent.name)) for path in tmp_path.glob("train/*/*.png")
    }
