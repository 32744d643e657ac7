import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kd_hf.data.loader import eval_loader
from kd_hf.data.opening import open_source
from kd_hf.data.pixels import decode
from kd_hf.data.rows import encode_image, open_rows
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import contents, encode, make_image, write_parquet

NAMES = ("ant", "bee", "cat")


def table(labels, feature=None, images=None, column="label"):
    """A ``datasets.Dataset`` of small pictures; without `labels` of images only."""
    import datasets

    count = len(images if images is not None else labels)
    columns = {"image": images or [{"bytes": encode(make_image(i)), "path": None} for i in range(count)]}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns[column], features[column] = labels, feature or datasets.ClassLabel(names=list(NAMES))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def value(kind):
    import datasets

    return datasets.Value(kind)


def refused(pattern, *arguments, **options):
    with pytest.raises(UserError, match=pattern) as caught:
        open_rows(*arguments, **options)
    assert "\n" not in str(caught.value)


def pixels(source):
    return [(np.asarray(decode(data)).tobytes(), label) for data, label in contents(source)]


def test_a_dataset_is_what_the_same_files_are(tmp_path):
    import datasets

    write_parquet(tmp_path / "train.parquet", 11)
    files = open_source(DataConfig(path=str(tmp_path)), "train")
    source = open_rows(datasets.load_dataset(str(tmp_path), split="train"), "train")
    assert contents(source) == contents(files)
    assert source.class_names == files.class_names == NAMES
    assert source.labels().tolist() == files.labels().tolist()
    assert source.group_sizes == (11,)
    assert source.describe() == "train_dataset (11 images, 3 classes)"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.shuffle(seed=3),
        lambda d: d.select([5, 0, 2]),
        lambda d: d.filter(lambda label: label > 0, input_columns="label"),
        lambda d: d.train_test_split(0.5, seed=1)["test"],
        lambda d: d.sort("label", reverse=True),
    ],
)
def test_a_selection_of_rows(change):
    """What `datasets` keeps as indices into the whole table."""
    dataset = change(table([0, 1, 2, 1, 2, 0]))
    source = open_rows(dataset, "train")
    expected = [(np.asarray(row["image"].convert("RGB")).tobytes(), row["label"]) for row in dataset]
    assert pixels(source) == expected
    assert source.labels().tolist() == dataset["label"][:]


def test_any_way_to_hold_images(tmp_path):
    import datasets

    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(files):
        path.write_bytes(encode(make_image(i)))
    expected = [(path.read_bytes(), i) for i, path in enumerate(files)]
    paths = {"image": [str(path) for path in files], "label": [0, 1, 2]}
    decoded = {"image": [Image.open(path) for path in files], "label": [0, 1, 2]}
    plain, image = datasets.Dataset.from_dict(paths), datasets.Image()
    as_bytes = datasets.Dataset.from_dict({"image": [path.read_bytes() for path in files], "label": [0, 1, 2]})
    held = [
        plain.cast_column("image", image),
        plain.cast_column("image", datasets.Image(decode=False)),
        datasets.Dataset.from_dict(decoded),
    ]
    for dataset in held:
        assert contents(open_rows(dataset, "train")) == expected
    for dataset in (plain, as_bytes):
        assert contents(open_rows(dataset, "train", image_column="image")) == expected
    assert contents(open_rows(held[0].with_format("torch"), "train")) == expected


def test_labels_of_every_kind():
    numbers = open_rows(table([0, 4, None, 2, -1], value("int32")), "train")
    assert numbers.labels().tolist() == [0, 4, -1, 2, -1]
    assert numbers.class_names == ("0", "1", "2", "3", "4")
    texts = open_rows(table(["dog", "ant", None, "dog"], value("string")), "train")
    assert (texts.class_names, texts.labels().tolist()) == (("ant", "dog"), [1, 0, -1, 1])
    assert [label for _, label in contents(texts)] == [1, 0, -1, 1]
    named = open_rows(table([0, 1], value("int64"), column="kind"), "train", label_column="kind")
    assert named.labels().tolist() == [0, 1]
    images_only = open_rows(table(None, images=[make_image(0), make_image(1)]), "train")
    assert images_only.labels().tolist() == [-1, -1] and images_only.num_classes == 0
    given = open_rows(table(None, images=[make_image(0)]), "train", classes=NAMES)
    assert given.class_names == NAMES


def test_an_evaluation_set_has_the_classes_of_the_training_set():
    texts = table(["cat", "bee"], value("string"))
    assert open_rows(texts, "eval", classes=NAMES).labels().tolist() == [2, 1]
    assert open_rows(table([1, 0], value("int64")), "eval", classes=NAMES).class_names == NAMES
    refused(
        "label 'cats', and there is no such class. Did you mean 'cat'",
        table(["cats", "bee"], value("string")),
        "eval",
        classes=("bee", "cat"),
    )
    refused("eval_dataset: .*only one of them has 'ant', 'dog'", table([1, 0]), "eval", classes=("dog", "bee", "cat"))
    refused("eval_dataset: .*same names in another order", table([1, 0]), "eval", classes=NAMES[::-1])
    refused("label 7, but only 3", table([7], value("int64")), "eval", classes=NAMES)


def test_columns_are_found_or_asked_for():
    labelled = table([0, 1]).add_column("coarse", [0, 0]).cast_column("coarse", table([0]).features["label"])
    refused(r"data.label_column: several columns .*coarse \(ClassLabel\)", labelled, "train")
    assert open_rows(labelled, "train", label_column="coarse").labels().tolist() == [0, 0]
    refused(r"no column 'coarze'. Did you mean 'coarse'", labelled, "train", label_column="coarze")
    refused("label 0.5; expected a class number", table([0.5, 1], value("float32")), "train")
    refused(r"no column is clearly the label.*select_columns", table([3, 4], value("int64"), column="id"), "train")


def test_what_is_no_map_style_set_of_one_split():
    import datasets

    dataset = table([0, 1])
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    refused(r"train_dataset: a DatasetDict .*\(train, test\).*dataset\['train'\]", splits, "train")
    refused(r"IterableDataset .*streaming: true", dataset.to_iterable_dataset(), "train")
    refused(r"generator .*streaming: true", (row for row in dataset), "eval")
    refused("no rows", dataset.select([]), "train")


def test_a_transform_is_refused():
    dataset = table([0, 1])
    refused("transform.*data.augment.*with_format", dataset.with_transform(lambda rows: rows), "train")
    assert len(open_rows(dataset.with_transform(lambda rows: rows).with_format(None), "train")) == 2
    refused("transform.*data.augment", torch.utils.data.Subset(Pairs(transform=str), [1]), "train")


class Pairs:
    """A map-style set as people write them: nothing is known before an item is made."""

    def __init__(self, labels=(0, 2, 1), transform=None):
        self.labels, self.transform, self.made = labels, transform, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.made.append(index)
        return make_image(index), self.labels[index]


def test_torchvision(tmp_path):
    import torchvision

    for index, name in enumerate(("bee", "ant", "bee")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{index}.png").write_bytes(encode(make_image(index)))
    folder = torchvision.datasets.ImageFolder(str(tmp_path))
    source = open_rows(folder, "train")
    expected = [(np.asarray(image).tobytes(), label) for image, label in folder]
    assert pixels(source) == expected
    assert source.class_names == ("ant", "bee") and source.labels().tolist() == [0, 1, 1]
    part = open_rows(torch.utils.data.Subset(folder, [2, 0]), "train")
    assert pixels(part) == [expected[2], expected[0]]
    assert part.class_names == ("ant", "bee") and part.labels().tolist() == [1, 0]
    turned = torchvision.datasets.ImageFolder(str(tmp_path), target_transform=lambda label: 1 - label)
    assert open_rows(turned, "train").labels().tolist() == [1, 0, 0]


def test_items_are_made_when_they_are_read():
    pairs = Pairs()
    pairs.classes = NAMES
    source = open_rows(pairs, "train")
    made = pairs.made.copy()
    assert set(made) == {0}
    assert source.read(1)[1] == 2 and pairs.made == [*made, 1]
    assert source.labels().tolist() == [0, 2, 1]
    known = Pairs()
    known.targets = torch.tensor([0, 2, 1])
    assert open_rows(known, "train").labels().tolist() == [0, 2, 1]
    assert set(known.made) == {0}
    known.classes = NAMES[:2]
    refused("label 2, but only 2", known, "train")


def test_items_of_any_kind():
    numbers = open_rows(Pairs((np.int64(3), torch.tensor(1), None)), "train")
    assert (numbers.labels().tolist(), numbers.num_classes) == ([3, 1, -1], 4)
    texts = [{"image": make_image(i), "label": name} for i, name in enumerate(("cat", "ant", "cat"))]
    source = open_rows(texts, "train")
    assert (source.class_names, source.labels().tolist()) == (("ant", "cat"), [1, 0, 1])
    assert open_rows(texts[1:2], "eval", classes=NAMES).read(0)[1] == 0
    rows = [{"photo": encode(make_image(0)), "kind": 1, "id": "x"}]
    assert open_rows(rows, "train", label_column="kind").read(0) == (rows[0]["photo"], 1)
    refused("data.label_column", rows, "train")
    assert open_rows([{"photo": make_image(0)}], "train").labels().tolist() == [-1]


def test_items_that_do_not_fit(tmp_path):
    refused("image of row 0 is a Tensor", [(torch.zeros(3, 4, 4), 0)], "train")
    refused("row 0 is a Image", [make_image(0)], "train")
    refused("label of row 1 is a list", [(make_image(0), 0), (make_image(1), [1])], "train")
    refused("label -2", Pairs((0, -2)), "train")
    pairs = Pairs((0, 5))
    pairs.classes = NAMES
    source = open_rows(pairs, "train")
    with pytest.raises(UserError, match="row 1 of train_dataset has the label 5, but only 3"):
        source.read(1)
    missing = open_rows([(tmp_path / "none.png", 0)], "train")
    with pytest.raises(FileNotFoundError):
        missing.read(0)


FILES = {
    "rgb": ("RGB", "PNG", {}),
    "jpeg": ("RGB", "JPEG", {}),
    "grey": ("L", "JPEG", {}),
    "cmyk": ("CMYK", "JPEG", {}),
    "alpha": ("RGBA", "PNG", {}),
    "grey with alpha": ("LA", "PNG", {}),
    "bits": ("1", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "transparent palette": ("P", "PNG", {"transparency": bytes(range(256))}),
}


@pytest.mark.parametrize("key", FILES)
def test_a_decoded_image_has_the_pixels_of_its_file(key):
    mode, kind, options = FILES[key]
    data = encode(make_image(5).convert(mode), kind, **options)
    assert np.array_equal(decode(encode_image(Image.open(io.BytesIO(data)))), decode(data))


def test_deep_grey_and_orientation_are_as_in_the_file():
    deep = encode(Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)))
    assert np.array_equal(decode(encode_image(Image.open(io.BytesIO(deep)))), decode(deep))
    exif = Image.Exif()
    exif[0x112] = 6  # turned by 90 degrees
    turned = encode(make_image(5), "JPEG", exif=exif)
    assert decode(encode_image(Image.open(io.BytesIO(turned)))).size == decode(turned).size == (48, 40)


def test_it_travels_to_workers():
    views = {"student": Preprocessing(image_size=8)}
    for rows in (table([0, 1, 2, 0]).select([3, 1, 2]), Pairs((0, 1, 2))):
        source = open_rows(rows, "eval")
        assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
        here, there = (list(eval_loader(source, views, batch_size=2, workers=w)) for w in (0, 1))
        for one, other in zip(here, there, strict=True):
            assert torch.equal(one.views["student"], other.views["student"]) and torch.equal(one.label, other.label)
