import pickle

import numpy as np
import pytest
import torch

from kd_hf.detection.data.loader import eval_loader, train_loader
from kd_hf.detection.data.opening import open_boxes
from kd_hf.draws import hash_key
from kd_hf.errors import UserError
from kd_hf.recipe.config import AugmentConfig, BoxAugment, DataConfig
from tests.detection.scenes import VIEW, Scenes, write_parquet

CFG = DataConfig(path="in memory")
AUGMENT = BoxAugment(
    sizes=(64, 80, 96), max_size=150, crop_sizes=(90, 120), crop_range=(48, 100), multiple_of=8, eval_size=64
)
VIEWS = {"student": VIEW}


def batches(source=None, cfg=CFG, **options):
    options = {"per_device": 4, "total_steps": 5, "seed": 3, "augment": AUGMENT, **options}
    return list(train_loader(source or Scenes(), cfg, VIEWS, **options))


def images(found):
    """What each place of batches holds, without the padding."""
    seen = []
    for batch in found:
        boxes, classes = batch.boxes.split(batch.counts), batch.classes.split(batch.counts)
        for place, (height, width) in enumerate(batch.extent.tolist()):
            numbers = (batch.row[place], batch.key[place], batch.image_id[place], *batch.size[place])
            pixels = batch.pixels[place]
            assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
            inside = pixels[:, :height, :width].numpy().tobytes()
            seen.append((*map(int, numbers), height, inside, boxes[place].tolist(), classes[place].tolist()))
    return seen


def test_a_batch_holds_its_images_and_their_objects():
    source = Scenes()
    for batch in batches(source):
        assert len(batch) == 4 and batch.valid.all() and batch.corrupt == [] and batch.removed == 0
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape[2:] == tuple(batch.extent.max(0).values)
        assert sum(batch.counts) == len(batch.boxes) == len(batch.classes)
        for place, row in enumerate(batch.row.tolist()):
            assert batch.image_id[place] == 1000 + row
            assert batch.key[place] == hash_key(3, batch.epoch, row, 0)
            assert tuple(batch.size[place].tolist()) == source.scenes[row].image.size[::-1]


def test_the_mask_is_true_where_there_is_padding():
    for batch in batches():
        expected = torch.ones(4, *batch.pixels.shape[2:], dtype=torch.bool)
        for place, (height, width) in enumerate(batch.extent.tolist()):
            expected[place, :height, :width] = False
        assert torch.equal(batch.mask, expected)


@pytest.mark.parametrize("division", [{"per_device": 2, "accumulation": 2}, {"world": 2, "per_device": 2},
                                      {"world": 4, "per_device": 1}])  # fmt: skip
def test_the_global_batch_does_not_depend_on_how_it_is_divided(division):
    source = Scenes(groups=(5, 7, 12))
    whole = images(batches(source))
    ranks = [images(batches(source, rank=rank, **division)) for rank in range(division.get("world", 1))]
    share = 4 // len(ranks)
    parted = [image for step in range(5) for rank in ranks for image in rank[step * share : (step + 1) * share]]
    assert parted == whole


def test_batches_do_not_depend_on_workers_nor_on_where_a_run_was_resumed():
    whole = images(batches())
    assert images(batches(workers=2)) == whole  # two workers build a batch together
    assert images(batches(start_step=3)) == whole[12:]


def test_epochs_and_seeds_differ():
    first = images(batches(total_steps=12))
    rows = [image[0] for image in first]
    assert sorted(rows[:24]) == sorted(rows[24:]) == list(range(24)) and rows[:24] != rows[24:]
    assert images(batches(seed=4)) != first[:20]


def test_repeats_have_draws_of_their_own():
    (batch,) = batches(cfg=CFG.model_copy(update={"augment": AugmentConfig(repeats=2)}), total_steps=1)
    assert batch.row[:2].tolist() == batch.row[2:].tolist() and len(set(batch.key.tolist())) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_by_their_neighbours_and_told(workers):
    found = batches(Scenes(damaged=(3, 4)), total_steps=6, workers=workers)
    assert sorted(row for batch in found for row in batch.corrupt) == [3, 4, 4]
    assert sorted(row for batch in found for row in batch.row.tolist()).count(5) == 3


def test_an_augmentation_that_does_not_know_boxes_is_refused():
    with pytest.raises(UserError, match=r"data.augment.cutmix"):
        batches(cfg=CFG.model_copy(update={"augment": AugmentConfig(cutmix=1.0)}))


def test_streamed_files_give_the_same_batches(tmp_path, private_cache):
    write_parquet(tmp_path / "train.parquet", Scenes().scenes, start=1000)
    cfg = DataConfig(path=str(tmp_path))
    source, streamed = (open_boxes(cfg.model_copy(update={"streaming": s}), "train") for s in (False, True))
    assert images(batches(source)) == images(batches(streamed, workers=2)) == images(batches(Scenes(groups=(4,) * 6)))


def test_batches_pickle_and_move():
    batch = batches()[0]
    again = pickle.loads(pickle.dumps(batch))
    assert images([again]) == images([batch]) and again.counts == batch.counts
    assert batch.to("meta").boxes.device.type == "meta" and batch.to("meta").mask.device.type == "meta"


def evaluated(source=None, **options):
    return list(eval_loader(source or Scenes(), VIEWS, augment=AUGMENT, **{"batch_size": 4, **options}))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_shows_each_image_once_and_pads_the_last_batch(world):
    source = Scenes(13)
    ranks = [evaluated(source, world=world, rank=rank) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    found = [batch for rank in ranks for batch in rank]
    rows = torch.cat([batch.row[batch.valid] for batch in found]).tolist()
    assert sorted(rows) == list(range(13))
    for batch in found:
        assert [truth is not None for truth in batch.truth] == batch.valid.tolist()
        assert (batch.row[~batch.valid] == -1).all()
        # an empty place is a black image: nothing that a network could divide by zero for
        assert not batch.pixels[~batch.valid].any() and not batch.mask[~batch.valid].any()
        for row, truth in zip(batch.row.tolist(), batch.truth, strict=True):
            assert truth is None or np.array_equal(truth.boxes, source.scenes[row].objects().boxes)


def test_a_batch_without_any_image_has_a_size_that_networks_take():
    (batch,) = evaluated(Scenes(2, damaged=(0, 1)), batch_size=2)
    assert not batch.valid.any() and batch.corrupt == [0, 1] and batch.pixels.shape == (2, 3, 64, 64)


def test_some_images_stand_for_all():
    found = evaluated(max_samples=6)
    assert torch.cat([batch.row[batch.valid] for batch in found]).tolist() == [0, 4, 8, 12, 16, 20]
