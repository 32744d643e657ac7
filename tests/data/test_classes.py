"""Labels of every type, through every kind of source."""

import datasets
import numpy as np
import pytest

from kd_hf.data.classes import number_labels
from kd_hf.data.opening import open_source
from kd_hf.data.rows import open_rows
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import encode, make_image, write_parquet, write_tar


def features(kind):
    return datasets.Features({"image": datasets.Image(), "label": datasets.Value(kind)})


def write(root, kind, labels, split="train"):
    write_parquet(root / f"{split}.parquet", len(labels), features=features(kind), label=labels)
    return DataConfig(path=str(root))


def pairs(labels):
    return [(make_image(index), label) for index, label in enumerate(labels)]


def read(cfg, split="train"):
    """Labels and classes, which the prepared and the streamed table and the rows agree upon."""
    prepared = open_source(cfg, split)
    streamed = open_source(cfg.model_copy(update={"streaming": True}), split)
    for source in (prepared, streamed):
        assert [source.read(row)[1] for row in range(len(source))] == source.labels().tolist()
    assert streamed.labels().tolist() == prepared.labels().tolist()
    assert (streamed.class_names, streamed.note) == (prepared.class_names, prepared.note)
    return prepared.labels().tolist(), prepared.class_names


DIGITS = tuple("01234")


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int32", "uint64"])
def test_integers_of_any_width(tmp_path, kind):
    assert read(write(tmp_path, kind, [0, 4, 2, 4])) == ([0, 4, 2, 4], DIGITS)
    assert read(write(tmp_path / "gaps", kind, [0, None, 2, 4])) == ([0, -1, 2, 4], DIGITS)


def test_booleans(tmp_path):
    expected = ([1, 0, -1, 1], ("False", "True"))
    assert read(write(tmp_path, "bool", [True, False, None, True])) == expected
    given = open_rows(pairs([True, np.bool_(False), None, True]), "train")
    assert (given.labels().tolist(), given.class_names) == expected
    assert [given.read(row)[1] for row in range(4)] == expected[0]
    assert open_rows(pairs([True]), "eval", classes=expected[1]).read(0)[1] == 1


def test_names(tmp_path):
    cfg = write(tmp_path, "string", ["dog", "ant", "", "dog", None])
    write(tmp_path, "string", ["dog"], "validation")
    assert read(cfg) == ([1, 0, -1, 1, -1], ("ant", "dog"))
    assert read(cfg, "eval") == ([1], ("ant", "dog"))  # as the training split numbers them
    write(tmp_path, "string", ["dgo"], "validation")
    with pytest.raises(UserError, match=r"split validation has the label 'dgo'.*Did you mean 'dog'"):
        open_source(cfg, "eval")


def test_whole_numbers_written_otherwise(tmp_path):
    texts = write(tmp_path / "text", "string", ["10", "2", "-1"])
    assert read(texts) == ([10, 2, -1], tuple(map(str, range(11))))
    assert open_source(texts, "train").note == "label values that are numbers written as text: 3 (first: -1)"
    floats = write(tmp_path / "float", "float64", [2.0, float("nan"), 0.0])
    assert read(floats) == ([2, -1, 0], ("0", "1", "2"))
    assert "whole numbers in floating point: 2 (first: 2.0)" in open_source(floats, "train").note
    assert read(write(tmp_path / "zeros", "string", ["007", "010"])) == ([0, 1], ("007", "010"))  # names of files, say


@pytest.mark.parametrize(
    ("kind", "labels", "pattern"),
    [
        ("int64", [None, None], "no row of .* has a label"),
        ("string", [None, ""], "no row of .* has a label"),
        ("int64", [1_000_000, 1_000_003], "has the label 1000003; .* at most 99999. Cast the column to text"),
        ("uint64", [2**63 - 1, 0], "has the label 9223372036854775807; .* at most 99999"),
        ("int64", [0, -2], "has the label -2; expected 0, 1, 2"),
        ("float32", [0.5, 1.0], "has the label 0.5; expected a class number or a name"),
        ("string", ["ant", "3"], None),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, kind, labels, pattern):
    cfg = write(tmp_path, kind, labels)
    if pattern is None:  # text is text
        assert read(cfg)[1] == ("3", "ant")
        return
    for streaming in (False, True):
        with pytest.raises(UserError, match=rf"^data.label_column: .*{pattern}") as caught:
            open_source(cfg.model_copy(update={"streaming": streaming}), "train")
        assert "\n" not in str(caught.value)


def test_the_advice_for_ids_works(tmp_path):
    assert read(write(tmp_path, "string", ["1000000", "x", "1000003"]))[1] == ("1000000", "1000003", "x")


def test_mixtures_and_other_types():
    with pytest.raises(UserError, match="numbers and names for labels, such as 3 and 'ant'"):
        open_rows(pairs([3, "ant"]), "train")
    with pytest.raises(UserError, match="no row of train_dataset has a label"):
        open_rows(pairs([None, None]), "train")
    with pytest.raises(UserError, match="here has a list as label"):
        number_labels([[1]], None, "here")


def test_tar_files(tmp_path):
    samples = {f"{i}": {"png": encode(make_image(i)), "cls": text} for i, text in enumerate(["\ufeff3", "0", "-1"])}
    write_tar(tmp_path / "train.tar", samples)
    source = open_source(DataConfig(path=str(tmp_path)), "train")
    assert source.labels().tolist() == [3, 0, -1] and source.class_names == ("0", "1", "2", "3")
