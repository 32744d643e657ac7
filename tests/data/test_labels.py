import numpy as np

from kd_hf.data.labels import LabelSubset, choose_labelled
from kd_hf.data.opening import open_source
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import contents, refused


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
