import pickle

import datasets
import pytest

from kd_hf.detection.data.opening import open_boxes, open_given
from kd_hf.errors import UserError
from kd_hf.recipe.config import BoxData, DataConfig
from tests.detection.scenes import NAMES, Scenes, write_parquet

SCENES = Scenes(10).scenes


@pytest.fixture
def folder(tmp_path, private_cache):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", SCENES[:7])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", SCENES[7:], start=7)
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", SCENES[:3], start=100)
    return tmp_path


def assert_scenes(source, scenes, start=0):
    assert len(source) == len(scenes)
    for row, (found, listed) in enumerate(zip(scenes, source.annotations(), strict=True)):
        data, objects = source.read(row)
        expected = found.objects(start + row)
        assert data == found.data and (objects.image_id, objects.size) == (start + row, found.image.size)
        for name in ("boxes", "classes", "area", "iscrowd"):
            value = getattr(objects, name)
            assert value.dtype == getattr(expected, name).dtype
            assert value.tolist() == getattr(expected, name).tolist() == getattr(listed, name).tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_are_read_by_row_groups(folder, streaming):
    source = open_boxes(DataConfig(path=str(folder), streaming=streaming), "train")
    assert source.group_sizes == (4, 3, 3) and source.class_names == NAMES
    assert_scenes(source, SCENES)
    assert_scenes(pickle.loads(pickle.dumps(source)), SCENES)
    assert_scenes(open_boxes(DataConfig(path=str(folder), streaming=streaming), "eval"), SCENES[:3], 100)


def test_few_row_groups_are_kept_at_a_time(folder):
    source = open_boxes(DataConfig(path=str(folder), shuffle_block=1), "train")
    read = []
    whole = source._parquet.read
    source._parquet.read = lambda group, columns: read.append(group) or whole(group, columns)
    source.expect(1)  # so at most 3 groups
    for row in (0, 1, 4, 8, 2):
        source.read(row)
    assert read == [0, 1, 2]


def test_a_dataset_handed_over(folder):
    dataset = write_parquet(folder / "other.parquet", SCENES)
    assert_scenes(open_given(dataset, "train"), SCENES)
    assert_scenes(open_given(dataset.with_format("torch"), "train"), SCENES)
    shuffled = dataset.select([3, 1])
    assert [o.image_id for o in open_given(shuffled, "eval", classes=NAMES).annotations()] == [3, 1]


def test_a_list_of_structs_is_the_same_as_a_struct_of_lists(folder):
    dataset = write_parquet(folder / "other.parquet", SCENES)
    fields = {name: feature.feature for name, feature in dataset.features["objects"].items()}
    rows = [
        [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
        for cell in dataset["objects"]
    ]
    features = datasets.Features({"objects": datasets.List(fields)})
    listed = datasets.Dataset.from_dict({"objects": rows}, features=features)
    turned = datasets.concatenate_datasets([dataset.remove_columns("objects"), listed], axis=1)
    assert_scenes(open_given(turned, "train"), SCENES)
    turned.to_parquet(folder / "lists/train.parquet", batch_size=4)
    assert_scenes(open_boxes(DataConfig(path=str(folder / "lists")), "train"), SCENES)


def test_boxes_as_corners(folder):
    dataset = write_parquet(folder / "other.parquet", SCENES, box_format="xyxy")
    assert_scenes(open_given(dataset, "train", BoxData(box_format="xyxy")), SCENES)


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_without_names_count_to_the_largest(tmp_path, private_cache, streaming):
    write_parquet(tmp_path / "train.parquet", SCENES, names=None)
    assert open_boxes(DataConfig(path=str(tmp_path), streaming=streaming), "train").class_names == ("0", "1", "2")
    given = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "c"))
    assert open_given(given, "train").class_names == ("0", "1", "2")


def test_what_is_not_needed_may_be_missing(folder):
    dataset = write_parquet(folder / "other.parquet", SCENES[:4])
    cells = [{name: cell[name] for name in ("bbox", "category")} for cell in dataset["objects"]]
    features = {name: dataset.features["objects"][name] for name in ("bbox", "category")}
    bare = datasets.Dataset.from_dict(
        {"image": dataset.cast_column("image", datasets.Image(decode=False))["image"], "objects": cells},
        features=datasets.Features({"image": datasets.Image(), "objects": features}),
    )
    source = open_given(bare, "train")
    objects = source.read(3)[1]
    assert objects.size is None and objects.image_id == 3 and objects.area.tolist() == SCENES[3].objects().area.tolist()


def changed(dataset, **fields):
    """The objects of the last row with other values."""

    def change(row, index):
        return {"objects": {**row["objects"], **fields}} if index == len(dataset) - 1 else {}

    return dataset.map(change, with_indices=True)


def test_a_category_that_is_none_is_refused(tmp_path, private_cache):
    dataset = write_parquet(tmp_path / "first.parquet", SCENES, names=None)
    narrow = datasets.Features(dataset.features)
    narrow["objects"] = {**narrow["objects"], "category": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    table = dataset.data.table.cast(narrow.arrow_schema)  # with the names of two classes and numbers of three
    wrong = datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=narrow))
    with pytest.raises(UserError, match="row 3 of train_dataset has the category 2; expected 0 to 1"):
        list(open_given(wrong, "train").annotations())
    wrong.to_parquet(tmp_path / "second/train.parquet")
    with pytest.raises(UserError, match="split train has the category 2; expected 0 to 1"):
        open_boxes(DataConfig(path=str(tmp_path / "second")), "train")


def test_lists_of_different_lengths_are_refused(folder):
    dataset = changed(write_parquet(folder / "other.parquet", SCENES[:2]), area=[1.0, 2.0])
    with pytest.raises(UserError, match="the objects of row 1 of train_dataset do not fit together"):
        open_given(dataset, "train")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda d: d.remove_columns("objects"), "no column holds objects, .* there are image_id, image, width, height"),
        (lambda d: d.add_column("more", d["objects"][:]), "several columns hold objects"),
        (lambda d: d.remove_columns("image"), "data.image_column: no column is clearly the image"),
        (lambda d: d.with_transform(lambda rows: rows), "it has a transform"),
        (lambda d: {"train": d}, "a dict has no columns"),
        (lambda d: d.to_iterable_dataset(), "an? IterableDataset has no columns"),
    ],
)
def test_other_tables_are_refused(folder, change, pattern):
    dataset = write_parquet(folder / "other.parquet", SCENES[:4])
    with pytest.raises(UserError, match=pattern) as caught:
        open_given(change(dataset), "train")
    assert "\n" not in str(caught.value)


def test_the_column_can_be_named(folder):
    dataset = write_parquet(folder / "other.parquet", SCENES[:4])
    two = dataset.add_column("more", dataset["objects"][:], feature=dataset.features["objects"])
    assert len(open_given(two, "train", label_column="more")) == 4
    with pytest.raises(UserError, match=r"no column 'mor'. Did you mean 'more'"):
        open_given(two, "train", label_column="mor")
    with pytest.raises(UserError, match="'width' lacks objects"):
        open_given(two, "train", label_column="width")
