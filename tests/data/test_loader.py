import multiprocessing
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kd_hf.data.loader import eval_loader, train_loader
from kd_hf.data.mix import mix_images_, mix_target
from kd_hf.data.opening import open_source
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.draws import hash_key
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, DataConfig
from tests.data.conftest import encode, make_image, write_folders, write_parquet

SMALL = Preprocessing(image_size=16)
VIEWS = {"student": SMALL, "teacher": Preprocessing(image_size=24, mean=(0.5,) * 3, std=(0.5,) * 3)}
AUGMENT = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0)
CFG = DataConfig(path="in memory", augment=AUGMENT)


class Pictures(Source):
    """Pictures in memory; some rows hold bytes that are no image, some cannot be read, some end the run."""

    def __init__(self, rows=40, damaged=(), missing=(), fatal=(), groups=None):
        self.class_names = ("a", "b", "c")
        self.group_sizes = groups or (rows,)
        self.images = [encode(make_image(row)) for row in range(rows)]
        self.damaged, self.missing, self.fatal = damaged, missing, fatal

    def read(self, row):
        if row in self.fatal:
            raise UserError(f"data.path: row {row} is gone")
        if row in self.missing:
            raise FileNotFoundError(row)
        return (self.images[row][:50] if row in self.damaged else self.images[row]), row % 3

    def labels(self):
        return np.arange(len(self)) % 3

    def describe(self):
        return "pictures"


def batches(source=None, cfg=CFG, views=VIEWS, **options):
    options = {"per_device": 8, "total_steps": 7, "seed": 3, **options}
    return list(train_loader(source or Pictures(), cfg, views, **options))


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.views.keys() == other.views.keys()
        for name in ("label", "row", "key", "valid"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for name in one.views:
            assert torch.equal(one.views[name], other.views[name])
        for name in ("epoch", "mixing", "erasing", "corrupt", "view_of"):
            assert getattr(one, name) == getattr(other, name)


def test_a_batch():
    (batch,) = batches(total_steps=1)
    assert {name: (view.dtype, tuple(view.shape)) for name, view in batch.views.items()} == {
        "student": (torch.uint8, (8, 3, 16, 16)),
        "teacher": (torch.uint8, (8, 3, 24, 24)),
    }
    assert len(batch) == 8 and batch.valid.all() and batch.corrupt == [] and batch.epoch == 0
    assert torch.equal(batch.label, batch.row % 3)
    assert batch.key.tolist() == [hash_key(3, 0, row, 0) for row in batch.row.tolist()]
    moved = batch.to("meta", non_blocking=True)
    assert moved.views["student"].is_meta and moved.key.is_meta and moved.mixing == batch.mixing


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_dense(workers):
    for batch in (*batches(workers=workers), *eval_loader(Pictures(), VIEWS, batch_size=7, workers=workers)):
        assert all(view.is_contiguous() for view in batch.views.values())


def test_only_views_travel_as_tensors():
    (batch,) = batches(total_steps=1)
    state = batch.__getstate__()
    assert [name for name, value in state.items() if isinstance(value, torch.Tensor)] == []
    assert all(isinstance(view, torch.Tensor) for view in state["views"].values())
    assert_equal([pickle.loads(pickle.dumps(batch))], [batch])


def test_the_decoder_changes_pixels_only_and_little():
    pictures = Pictures()
    pictures.images = [encode(make_image(row, 120, 90), "JPEG") for row in range(40)]
    cfg = CFG.model_copy(update={"augment": AugmentConfig(erasing=0.25, mixup=0.8)})
    fast, slow = (batches(pictures, cfg.model_copy(update={"decoder": name})) for name in ("torchvision", "pil"))
    for one, other in zip(fast, slow, strict=True):
        for name in VIEWS:
            assert (one.views[name].int() - other.views[name].int()).abs().max() <= 1
    assert_equal([replace(batch, views={}) for batch in fast], [replace(batch, views={}) for batch in slow])
    assert not all(
        torch.equal(one.views["student"], other.views["student"]) for one, other in zip(fast, slow, strict=True)
    )


def test_epochs_differ_and_cover_the_rows():
    found = batches(total_steps=10)
    assert [batch.epoch for batch in found] == [0] * 5 + [1] * 5
    for part in (found[:5], found[5:]):
        assert sorted(torch.cat([batch.row for batch in part]).tolist()) == list(range(40))
    assert not set(torch.cat([b.key for b in found[:5]]).tolist()) & set(torch.cat([b.key for b in found[5:]]).tolist())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(workers):
    assert_equal(batches(workers=workers), batches())


@pytest.mark.parametrize("start", [1, 4, 5, 6])
def test_starting_in_the_middle_gives_the_rest(start):
    assert_equal(batches(start_step=start), batches()[start:])
    assert_equal(
        batches(per_device=4, accumulation=2, start_step=start), batches(per_device=4, accumulation=2)[2 * start :]
    )


def test_loaders_can_be_iterated_again():
    loader = train_loader(Pictures(), CFG, VIEWS, per_device=8, total_steps=3, workers=1)
    assert len(loader) == 3
    assert_equal(list(loader), list(loader))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("change", [{}, {"repeats": 2}, {"mix_group": 4}])
def test_ranks_and_micro_steps_together_are_the_global_batch(world, accumulation, change):
    cfg = CFG.model_copy(update={"augment": AUGMENT.model_copy(update=change)})
    stage = DeviceStage(VIEWS, 3)
    parts = [
        batches(cfg=cfg, per_device=8 // world // accumulation, world=world, rank=rank, accumulation=accumulation)
        for rank in range(world)
    ]
    for step, whole in enumerate(batches(cfg=cfg)):
        pieces = [parts[rank][step * accumulation + micro] for rank in range(world) for micro in range(accumulation)]
        assert torch.equal(torch.cat([piece.key for piece in pieces]), whole.key)
        done = [stage(piece) for piece in pieces]
        images, target = stage(whole)
        for name in VIEWS:
            assert torch.equal(torch.cat([part[0][name] for part in done]), images[name])
        assert torch.equal(torch.cat([part[1].soft for part in done]), target.soft)
        assert torch.equal(torch.cat([part[1].hard for part in done]), target.hard)


def test_repeats_have_draws_of_their_own():
    cfg = CFG.model_copy(update={"augment": AugmentConfig(repeats=2)})
    for batch in batches(cfg=cfg):
        assert torch.equal(batch.row[:4], batch.row[4:]) and len(set(batch.row.tolist())) == 4
        assert len(set(batch.key.tolist())) == 8
        assert not torch.equal(batch.views["student"][:4], batch.views["student"][4:])


def test_mixing_is_absent_when_not_asked_for():
    plain = batches(cfg=DataConfig(path="in memory"))
    assert all(batch.mixing is None and batch.erasing == () for batch in plain)
    assert DeviceStage(VIEWS, 3)(plain[0])[1].soft is None


def test_stage_erases_and_mixes_as_the_batch_says():
    for batch in batches():
        images, target = DeviceStage(VIEWS, 3)(batch)
        plain = DeviceStage(VIEWS, 3)(replace(batch, mixing=None))[0]
        assert torch.equal(images["student"], mix_images_(plain["student"].clone(), batch.mixing))
        assert torch.equal(target.soft, mix_target(batch.label, batch.mixing, 3).soft)
    assert any(batch.erasing for batch in batches())


def test_global_generators_are_left_alone():
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)
    batches()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_streamed_parquet_gives_the_rows_of_its_files(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 22, row_group=5)
    write_parquet(tmp_path / "train-1.parquet", 18, row_group=7, start=22)
    cfg = CFG.model_copy(update={"path": str(tmp_path), "streaming": True, "shuffle_block": 3})
    source = open_source(cfg, "train")
    streamed = batches(source, cfg)
    assert_equal(batches(source, cfg, workers=2), streamed)
    assert_equal(batches(Pictures(groups=source.group_sizes), cfg), streamed)


@pytest.fixture
def images(tmp_path):
    """The same 40 rows as Parquet files of several row groups."""
    write_parquet(tmp_path / "train-0.parquet", 22, row_group=5)
    write_parquet(tmp_path / "train-1.parquet", 18, row_group=7, start=22)
    return CFG.model_copy(update={"path": str(tmp_path), "shuffle_block": 1})


@pytest.mark.parametrize("options", [{"workers": 2}, {"world": 2, "rank": 1, "per_device": 4}], ids=["workers", "rank"])
def test_a_prepared_table_gives_the_batches_of_a_stream(images, options):
    found = []
    for streaming in (True, False):
        cfg = images.model_copy(update={"streaming": streaming})
        found.append(batches(open_source(cfg, "train"), cfg, start_step=2, **options))
    assert_equal(*found)
    rows = torch.cat([batch.row for batch in found[0]])
    whole = batches(Pictures(), CFG, start_step=2, **options)
    assert not torch.equal(rows, torch.cat([batch.row for batch in whole]))  # row groups do decide the order


@pytest.mark.parametrize("workers", [0, 2])
def test_repeats_of_a_stream_have_draws_of_their_own(images, workers):
    cfg = images.model_copy(update={"streaming": True, "augment": AugmentConfig(repeats=2)})
    found = batches(open_source(cfg, "train"), cfg, workers=workers)
    for batch in found:
        assert torch.equal(batch.row[:4], batch.row[4:]) and len(set(batch.row.tolist())) == 4
        assert len(set(batch.key.tolist())) == 8
        assert not torch.equal(batch.views["student"][:4], batch.views["student"][4:])
    assert len(set(torch.cat([batch.row[:4] for batch in found[:5]]).tolist())) == 20
    ranks = [
        batches(open_source(cfg, "train"), cfg, per_device=4, world=2, rank=rank, workers=workers) for rank in (0, 1)
    ]
    for one, *parts in zip(found, *ranks, strict=True):
        assert torch.equal(torch.cat([part.key for part in parts]), one.key)
        assert torch.equal(torch.cat([part.views["teacher"] for part in parts]), one.views["teacher"])


def test_digits_and_folders_load(digits, tmp_path):
    assert batches(open_source(digits, "train"), digits)[0].views["student"].any()
    cfg = DataConfig(path=str(write_folders(tmp_path)))
    assert_equal(batches(open_source(cfg, "train"), cfg, workers=2), batches(open_source(cfg, "train"), cfg))


# --- unreadable images


def test_unreadable_rows_are_replaced_by_the_next_readable_one():
    good, bad = batches(), batches(Pictures(damaged=(5, 39), missing=(6,)))
    reported = []
    for one, other in zip(good, bad, strict=True):
        assert torch.equal(one.key, other.key) and other.valid.all()
        moved = {5: 7, 6: 7, 39: 0}
        assert other.row.tolist() == [moved.get(row, row) for row in one.row.tolist()]
        assert torch.equal(other.label, other.row % 3)
        same = one.row == other.row
        assert torch.equal(one.views["teacher"][same], other.views["teacher"][same])
        reported += other.corrupt
    assert set(reported) == {5, 6, 39}
    assert_equal(batches(Pictures(damaged=(5, 39), missing=(6,)), workers=2), bad)


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_truncated_jpegs_are_unreadable_rows(decoder):
    pictures = Pictures(damaged=(5, 39))
    pictures.images = [encode(make_image(row), "JPEG") for row in range(40)]
    found = batches(pictures, CFG.model_copy(update={"decoder": decoder}), total_steps=5)
    assert sorted(row for batch in found for row in batch.corrupt) == [5, 39]


@pytest.mark.filterwarnings("error::UserWarning:PIL")
def test_broken_exif_of_training_images_is_nobodys_business(capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = Pictures()
    pictures.images = [encode(make_image(row), "JPEG", exif=exif.tobytes()[:20] + b"\xff" * 9) for row in range(40)]
    cfg = CFG.model_copy(update={"decoder": "pil"})
    assert_equal(batches(pictures, cfg, workers=2), batches(pictures, cfg))
    assert capfd.readouterr().err == ""


def test_nothing_readable():
    with pytest.raises(UserError, match=r"data.path: no readable image in pictures from row \d+ on \(tried 40\)"):
        batches(Pictures(damaged=range(40)))


def test_evaluation_marks_unreadable_rows():
    (batch,) = eval_loader(Pictures(rows=6, damaged=(1,), missing=(4,)), VIEWS, batch_size=6)
    assert batch.valid.tolist() == [True, False, True, True, False, True]
    assert batch.corrupt == [1, 4]


# --- errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_user_error_arrives_as_it_was(workers):
    with pytest.raises(UserError) as caught:
        batches(Pictures(fatal=(17,)), workers=workers)
    assert str(caught.value) == "data.path: row 17 is gone"


def test_workers_end_before_the_error_is_raised():
    before = set(multiprocessing.active_children())
    loader = iter(train_loader(Pictures(fatal=(17,)), CFG, VIEWS, per_device=8, total_steps=70, workers=2))
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    with pytest.raises(UserError):
        list(loader)
    assert not set(multiprocessing.active_children()) - before


def test_user_errors_of_the_recipe():
    with pytest.raises(UserError, match="per_device_train_batch_size: 5 is odd"):
        batches(per_device=5)
    with pytest.raises(UserError, match="larger than the data set of 40"):
        batches(per_device=8, world=8)


# --- evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_row_once(world, workers):
    source = Pictures(rows=29)
    ranks = [list(eval_loader(source, VIEWS, batch_size=4, world=world, rank=r, workers=workers)) for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for batch in rank for row in batch.row[batch.valid].tolist()]
    assert sorted(rows) == list(range(29))
    last = ranks[-1][-1]
    padding = ~last.valid
    assert padding.any() and (last.row[padding] == -1).all() and (last.label[padding] == -1).all()
    assert not last.views["student"][padding].any()


def test_evaluation_keeps_the_crop_of_each_network():
    other = replace(SMALL, crop_pct=1.0)
    (batch,) = eval_loader(Pictures(rows=4), {"student": SMALL, "teacher": other, "third": SMALL}, batch_size=4)
    assert batch.view_of == {"student": "student", "teacher": "teacher", "third": "student"}
    images, _ = DeviceStage({"student": SMALL, "teacher": other, "third": SMALL}, 3)(batch)
    assert images["third"] is images["student"] and not torch.equal(images["teacher"], images["student"])


def test_max_samples():
    source = Pictures(rows=40)
    rows = torch.cat([b.row[b.valid] for b in eval_loader(source, VIEWS, batch_size=4, max_samples=10)]).tolist()
    assert rows == list(range(0, 40, 4))
    assert len(eval_loader(source, VIEWS, batch_size=4, max_samples=1000)) == 10
