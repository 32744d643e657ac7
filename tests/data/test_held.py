"""Held images give the batches that the loader gives, to the bit, and are decoded once."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from kd_hf import DistillTrainer
from kd_hf.data.geometry import draw_geometry, draw_moves
from kd_hf.data.loader import eval_loader, train_loader
from kd_hf.data.views import DeviceStage
from kd_hf.draws import first_bits, generator, hash_key, hash_keys
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, CropConfig, DataConfig
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.run.log import read_log
from tests.data.conftest import encode, make_image
from tests.data.test_loader import Pictures
from tests.runs import TEACHER, assert_same_tensors, final_tensors, recipe

VIEWS = {
    "student": Preprocessing(image_size=16),
    "teacher": Preprocessing(image_size=24, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"),
    "twin": Preprocessing(image_size=16, mean=(0.5,) * 3),
}
PAD = AugmentConfig(crop=CropConfig(kind="pad", padding=3))
KEYS = np.array([hash_key("sample", number) for number in range(500)])


class Counted(Pictures):
    """Pictures, JPEGs among them, that count how often a row is read."""

    def __init__(self, hold, **options):
        super().__init__(**options)
        self.images[1::2] = [encode(make_image(row, 40, 30), "JPEG") for row in range(len(self.images[1::2]))]
        self.hold, self.reads = hold, Counter()

    def read(self, row):
        self.reads[row] += 1
        return super().read(row)


def shown(hold, augment=PAD, views=VIEWS, source=None, **options):
    """(images, target, columns) of every batch as a device is given them."""
    options = {"per_device": 8, "total_steps": 12, "seed": 3, **options}
    stage = DeviceStage(views, 3)
    cfg = DataConfig(path="in memory", augment=augment)
    found = []
    for batch in train_loader(source or Counted(hold), cfg, views, **options):
        images, target = stage(batch)
        columns = (batch.label, batch.row, batch.key, batch.valid, batch.epoch, batch.mixing, batch.corrupt)
        found.append((images, target, columns))
    return found


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for (images, target, columns), (others, other_target, other_columns) in zip(first, second, strict=True):
        assert images.keys() == others.keys()
        for name in images:
            assert torch.equal(images[name], others[name])
            assert images[name].stride() == others[name].stride()  # else kernels may round in another order
        assert torch.equal(target.hard, other_target.hard)
        assert (target.soft is None) == (other_target.soft is None)
        assert target.soft is None or torch.equal(target.soft, other_target.soft)
        for value, other in zip(columns, other_columns, strict=True):
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_draws_of_many_samples_are_those_of_each():
    epochs = np.arange(len(KEYS)) % 7
    assert hash_keys(-3, epochs, KEYS, "x").tolist() == [
        hash_key(-3, int(epoch), int(key), "x") for epoch, key in zip(epochs, KEYS, strict=True)
    ]
    words = [generator(int(key), "geometry", 5).bit_generator.random_raw(4).tolist() for key in KEYS]
    assert first_bits(KEYS, "geometry", 5).tolist() == words


@pytest.mark.parametrize(
    "augment",
    [
        PAD,
        AugmentConfig(crop=CropConfig(kind="pad", padding=0), hflip=0.3),
        AugmentConfig(crop=CropConfig(kind="resize"), hflip=0.0),
        AugmentConfig(crop=CropConfig(kind="pad", padding=2**30)),  # so wide that every other draw is made anew
    ],
)
def test_moves_of_many_samples_are_those_of_each(augment):
    each = [draw_geometry(augment, (5, 5), 1, int(key)) for key in KEYS]
    assert draw_moves(augment, KEYS).tolist() == [[*geometry.shift, geometry.flip] for geometry in each]


@pytest.mark.parametrize(
    ("augment", "options"),
    [
        (PAD, {}),
        (PAD, {"start_step": 7, "workers": 2}),
        (PAD, {"per_device": 3, "world": 2, "rank": 1, "accumulation": 2}),
        (AugmentConfig(crop=CropConfig(kind="resize"), erasing=0.5, mixup=0.8, cutmix=1.0), {}),
        (PAD.model_copy(update={"repeats": 3}), {}),
        (AugmentConfig(crop=CropConfig(kind="pad", padding=40), hflip=1.0), {}),  # further than an image is wide
    ],
)
def test_held_batches_are_the_loaders(augment, options):
    assert_same(shown(True, augment, **options), shown(False, augment, **{**options, "workers": 0}))


@pytest.mark.parametrize("faults", [{"damaged": (3, 4, 5), "missing": (39, 20)}, {"groups": (15, 10, 15)}])
def test_held_batches_of_odd_sources_are_the_loaders(faults):
    held, source = Counted(True, **faults), Counted(False, **faults)
    assert_same(shown(True, source=held), shown(False, source=source))
    readable = set(range(40)) - {*faults.get("damaged", ()), *faults.get("missing", ())}
    assert {held.reads[row] for row in readable} == {1} and max(source.reads[row] for row in readable) > 1


def test_where_nothing_is_readable_the_message_is_the_loaders():
    for hold in (True, False):
        with pytest.raises(UserError, match=r"no readable image in pictures from row \d+ on \(tried 40\)"):
            shown(hold, source=Counted(hold, missing=range(40)))


@pytest.mark.parametrize("options", [{}, {"max_samples": 11}, {"world": 3, "rank": 2}])
def test_held_evaluation_is_the_loaders_and_decodes_once(options):
    faults = {"damaged": (3,), "missing": (20,)}
    held = Counted("auto", **faults)
    for _ in range(2):
        ours = list(eval_loader(held, VIEWS, batch_size=7, workers=2, **options))
        theirs = list(eval_loader(Counted(False, **faults), VIEWS, batch_size=7, **options))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert (one.corrupt, one.placing, one.view_of) == (other.corrupt, {}, other.view_of)
            for name in ("label", "row", "key", "valid"):
                assert torch.equal(getattr(one, name), getattr(other, name))
            assert all(torch.equal(one.views[name], other.views[name]) for name in other.views)
    assert {held.reads[row] for row in held.reads if row not in (3, 20)} == {1}


LARGE = {"student": Preprocessing(image_size=65)}
COLOURS = AugmentConfig(crop=CropConfig(kind="pad"), color_jitter=0.2)


@pytest.mark.parametrize(
    ("hold", "augment", "views", "is_held"),
    [
        ("auto", PAD, VIEWS, True),
        ("auto", PAD, LARGE, False),
        (True, PAD, LARGE, True),
        (False, PAD, VIEWS, False),
        ("auto", AugmentConfig(), VIEWS, False),
        ("auto", COLOURS, VIEWS, False),
        ("auto", AugmentConfig(crop=CropConfig(kind="resize"), auto_augment="3a"), VIEWS, False),
    ],
)
def test_what_is_held(hold, augment, views, is_held):
    cfg = DataConfig(path="in memory", augment=augment)
    loader = train_loader(Counted(hold), cfg, views, per_device=8, total_steps=1, workers=1)
    assert bool(loader.note) == is_held == (loader.workers == 0)
    if is_held and views is VIEWS:
        assert loader.note == "40 images of 16 and 24 pixels are decoded once and held, 0 MiB"


@pytest.mark.parametrize(
    ("augment", "reason"),
    [(AugmentConfig(), "crop.kind: random_resized"), (COLOURS, "color_jitter changes the colours")],
)
def test_what_cannot_be_held_is_refused_in_a_line(augment, reason):
    with pytest.raises(UserError, match=rf"data\.hold: data\.augment\.{reason}.* set data\.hold: auto"):
        shown(True, augment)


def test_a_set_that_memory_does_not_hold_is_decoded_each_time(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**40))
    cfg = DataConfig(path="in memory", augment=PAD)
    assert train_loader(Counted("auto"), cfg, VIEWS, per_device=8, total_steps=1).note == ""


def test_a_run_may_change_between_held_and_decoded_images(tmp_path):
    """Trained on held images, on decoded ones, and begun on decoded and continued on held ones."""

    def train(folder, hold, workers=0):
        blocks = {"data": {"hold": hold, "augment": {"erasing": 0.5}}, "train": {"dataloader_num_workers": workers}}
        cfg = recipe(folder, {"student": {"model": "test_resnet"}, "teacher": TEACHER, "methods": {"kd": {}}}, blocks)
        DistillTrainer(cfg).train()
        return folder

    held, decoded = train(tmp_path / "held", "auto"), train(tmp_path / "decoded", False, workers=1)
    note = "1078 images of 32 pixels are decoded once and held, 3 MiB"
    assert [line["images"] for line in read_log(held) if "images" in line] == [note]
    assert not any("images" in line for line in read_log(decoded))
    assert_same_tensors(final_tensors(held), final_tensors(decoded))
    shutil.rmtree(list_checkpoints(decoded / "checkpoints")[-1])
    shutil.rmtree(decoded / "student")
    train(decoded, True)
    assert_same_tensors(final_tensors(held), final_tensors(decoded))
