"""What makes two runs one: recipe, data, classes, teachers, images of a step; each difference is told in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_hf.data.opening import open_source
from kd_hf.data.rows import ItemSource
from kd_hf.models.load import load_model
from kd_hf.recipe.config import DataConfig
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.identity import DataFacts, Identity, listed
from tests.data.conftest import encode, make_image
from tests.detection.scenes import Scenes
from tests.runs import recipe


def write_photos(folder: Path) -> None:
    """Two classes of three photos each, in both splits."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                (folder / split / name / f"{number}.png").write_bytes(encode(make_image(10 * label + number), "PNG"))


def facts(folder: Path) -> DataFacts:
    """Of its training images."""
    return DataFacts.of(open_source(DataConfig(path=str(folder)), "train"))


def add(folder: Path) -> None:
    (folder / "train" / "cat" / "9.png").write_bytes(encode(make_image(9), "PNG"))


def relabel(folder: Path) -> None:
    (folder / "train" / "cat" / "2.png").rename(folder / "train" / "dog" / "9.png")


def reorder(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "9.png")


def replace_one(folder: Path) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(encode(make_image(99), "PNG"))


def rename_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "zebra")


def add_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "ant").mkdir()
        (folder / split / "ant" / "0.png").write_bytes(encode(make_image(50), "PNG"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add, "the training images were 6 and are 7"),
        (relabel, "the training images have other labels or another order"),
        (reorder, "the training images have other labels or another order"),
        (replace_one, "the training images have other labels or another order"),
        (rename_class, "the classes of the training images differ ('cat' is gone, 'zebra' is new)"),
        (add_class, "the training images were 6 and are 7; the classes of the training images differ ('ant' is new)"),
    ],
)
def test_changed_data_is_told(tmp_path, change, told):
    write_photos(tmp_path)
    before = facts(tmp_path)
    assert list(before.differences(facts(tmp_path), "training")) == []
    change(tmp_path)
    assert listed(list(before.differences(facts(tmp_path), "training"))) == told


def test_the_same_data_elsewhere_are_the_same(tmp_path):
    for name in ("a", "b/c"):
        write_photos(tmp_path / name)
    assert facts(tmp_path / "a") == facts(tmp_path / "b/c")


def test_a_commit_says_all_of_the_rows(monkeypatch):
    source = open_source(DataConfig(path="builtin:digits"), "train")
    source.revision = "a" * 40
    monkeypatch.setattr(source, "labels", None)  # may mean to download them
    before = DataFacts.of(source)
    source.revision = "b" * 40
    (told,) = before.differences(DataFacts.of(source), "training")
    assert told == f"the revision of the training images was {'a' * 40} and is {'b' * 40}"


def test_items_that_are_made_anew_each_time_are_told_by_their_labels():
    class Items:
        def __init__(self, targets):
            self.targets = targets

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, row):
            return torch.rand(3, 8, 8), self.targets[row]

    first, same, other = (
        DataFacts.of(ItemSource(Items(targets), 0, 1, ("a", "b"), "x")) for targets in ([0, 1], [0, 1], [1, 0])
    )
    assert first == same and first != other


def test_changed_boxes_are_told():
    before, changed = DataFacts.of(Scenes()), Scenes()
    assert DataFacts.of(Scenes()) == before
    changed.scenes[3].boxes[0][0] += 1
    assert list(before.differences(DataFacts.of(changed), "training"))


def identity(folder: Path, *blocks, **changes) -> Identity:
    """Of a run on given facts."""
    images = {"images": 6, "classes": ("a", "b"), "revision": None, "rows": "0f"}
    made = Identity.of(recipe(folder, *blocks), 8, {}, {"teacher": "ff"})
    data = {split: DataFacts(**images) for split in ("train", "eval")}
    return Identity(**{**vars(made), "data": data, **changes})


@pytest.mark.parametrize(
    ("blocks", "changes", "told"),
    [
        ({}, {}, ""),
        ({"train": {"learning_rate": 0.1}}, {}, "train.learning_rate was 0.001 and is 0.1"),
        ({"train": {"ema": {"decay": 0.9}}}, {}, "train.ema.decay was not set and is 0.9"),
        ({"student": {"model": "x" * 90}}, {}, f"student.model was test_vit and is {'x' * 40}…"),
        ({}, {"global_batch": 16}, "a step took 8 images and takes 16 (processes × train.per_device_train_batch_size"),
        ({}, {"teachers": {"teacher": "ee"}}, "the teacher 'teacher' has other weights"),
        ({"train": {"logging_steps": 7, "output_dir": "x", "per_device_train_batch_size": 4}}, {}, ""),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_both_values(tmp_path, blocks, changes, told):
    different = identity(tmp_path).differences(identity(tmp_path, blocks, **changes))
    assert listed(different).startswith(told) and bool(different) == bool(told)


def test_many_differences_are_counted(tmp_path):
    keys = ("weight_decay", "min_lr", "warmup_lr", "lr_decay_rate", "momentum", "learning_rate")
    different = identity(tmp_path).differences(identity(tmp_path, {"train": dict.fromkeys(keys, 0.25)}))
    assert listed(different).endswith("; and 1 more")


def test_a_key_that_was_added_since_has_its_default(tmp_path):
    before = identity(tmp_path)
    assert before.recipe is not None
    del before.recipe["train"]["momentum"]
    assert before.differences(identity(tmp_path)) == []
    assert before.differences(identity(tmp_path, {"train": {"momentum": 0.5}})) == ["train.momentum was 0.9 and is 0.5"]


def test_a_key_that_is_gone_since_is_named(tmp_path):
    before = identity(tmp_path)
    assert before.recipe is not None
    before.recipe["train"]["colour"] = "red"
    assert "train.colour was red and is not set" in before.differences(identity(tmp_path))


def test_an_older_run_is_known_by_its_recipe_or_its_hash(tmp_path):
    now = identity(tmp_path)
    (tmp_path / "recipe.resolved.yaml").write_text(dump_recipe(recipe(tmp_path, {"train": {"seed": 3}})))
    assert Identity.of_older(tmp_path, "?", 8).differences(now) == ["train.seed was 3 and is 0"]
    assert Identity.of_older(tmp_path / "nowhere", now.recipe_hash, 8).differences(now) == []
    (told,) = Identity.of_older(tmp_path / "nowhere", "0123", 8).differences(now)
    assert told == f"the recipe's hash was 0123 and is {now.recipe_hash}"


def test_a_network_is_known_by_its_weights():
    handles = [load_model("test_vit", num_classes=3, image_size=32) for _ in range(2)]
    handles[1].network.load_state_dict(handles[0].network.state_dict())
    assert handles[0].weights_hash() == handles[1].weights_hash()
    with torch.no_grad():
        next(handles[1].network.parameters())[..., 0] += 1e-3
    assert handles[0].weights_hash() != handles[1].weights_hash()
