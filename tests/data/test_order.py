from itertools import pairwise

import numpy as np
import pytest

from kd_hf.data.order import EpochOrder, Layout, spread_rows
from kd_hf.errors import UserError


def whole(order, epoch=0):
    return order.rows(epoch, 0, len(order))[0]


@pytest.mark.parametrize("sizes", [(100,), (7, 1, 30, 12, 50), (10,) * 10, (5, 0, 5)])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_every_epoch_is_a_permutation(sizes, block):
    order = EpochOrder(sizes, seed=1, shuffle_block=block)
    epochs = [whole(order, epoch) for epoch in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(sum(sizes)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], whole(EpochOrder(sizes, seed=2, shuffle_block=block)))


def test_rows_are_a_pure_function_of_the_position():
    order = EpochOrder((40, 60), seed=3, shuffle_block=1)
    late = EpochOrder((40, 60), seed=3, shuffle_block=1).rows(5, 31, 57)[0]
    for epoch in (5, 0, 5):
        order.rows(epoch, 0, 10)
    assert np.array_equal(order.rows(5, 31, 57)[0], late)
    assert np.array_equal(whole(order, 5)[31:57], late)


def test_only_one_block_of_row_groups_is_open_at_a_time():
    order = EpochOrder((10,) * 12, seed=0, shuffle_block=3)
    groups = whole(order) // 10
    blocks = [set(groups[i : i + 30]) for i in range(0, 120, 30)]
    assert all(len(block) == 3 for block in blocks)
    assert not np.array_equal(np.sort(groups[:30]), groups[:30])  # rows of the block's groups are interleaved


def test_first_places_are_uniform():
    first = [EpochOrder((10,) * 4, seed, 2).rows(0, 0, 1)[0][0] for seed in range(2000)]
    counts = np.bincount(first, minlength=40)
    assert counts.min() > 20 and counts.max() < 90  # 50 expected


@pytest.mark.parametrize(("repeats", "batch"), [(3, 12), (2, 8), (4, 4)])
def test_repeated_augmentation(repeats, batch):
    order = EpochOrder((50,), seed=0, shuffle_block=1, repeats=repeats, global_batch=batch)
    seen = []
    for step in range(order.steps_per_epoch):
        rows, repeat = order.rows(0, step * batch, (step + 1) * batch)
        images = rows.reshape(repeats, -1)
        assert (images == images[0]).all() and len(set(images[0])) == batch // repeats
        assert repeat.tolist() == np.repeat(np.arange(repeats), batch // repeats).tolist()
        seen += images[0].tolist()
    assert len(set(seen)) == len(seen) == order.steps_per_epoch * batch // repeats


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (4, 2), (8, 1)])
def test_global_batches_do_not_depend_on_their_division(world, accumulation):
    order = EpochOrder((20, 25), seed=0, shuffle_block=1, global_batch=16)
    per_device = 16 // world // accumulation
    for step in range(2 * order.steps_per_epoch):
        rows = []
        for rank in range(world):
            for micro in range(accumulation):
                layout = Layout(per_device, world, rank, accumulation)
                epoch, start = layout.locate(step * accumulation + micro, order.steps_per_epoch)
                rows += order.rows(epoch, start, start + per_device)[0].tolist()
        epoch, inside = divmod(step, order.steps_per_epoch)
        assert rows == order.rows(epoch, inside * 16, inside * 16 + 16)[0].tolist()


SIZES = (10,) * 33 + (7,)


@pytest.mark.parametrize("lanes", [1, 4, 64])
def test_lanes_show_every_row_at_most_once(lanes):
    order = EpochOrder(SIZES, seed=1, shuffle_block=2, global_batch=24, lanes=lanes)
    assert order.lanes == min(24, lanes)
    epochs = [order.rows(epoch, 0, order.steps_per_epoch * 24)[0] for epoch in range(3)]
    for rows in epochs:
        assert len(set(rows.tolist())) == len(rows) == sum(SIZES) // 24 * 24
    assert len(set(np.concatenate(epochs).tolist())) > 0.98 * sum(SIZES)  # what one epoch leaves out, others show


@pytest.mark.parametrize(("batch", "lanes"), [(24, 5), (10, 7), (32, 64)])
def test_lanes_need_not_divide_the_batch(batch, lanes):
    order = EpochOrder(SIZES, seed=1, shuffle_block=2, global_batch=batch, lanes=lanes)
    rows = order.rows(0, 0, order.steps_per_epoch * batch)[0].reshape(-1, batch)
    assert len(set(rows.flatten().tolist())) == rows.size
    starts, whole = order.lane_starts, order.permutation(0).tolist()
    for lane, (start, stop) in enumerate(pairwise(starts)):
        first, last = lane * batch // order.lanes, (lane + 1) * batch // order.lanes
        assert rows[:, first:last].flatten().tolist() == whole[start : start + rows[:, first:last].size]
        assert stop - start >= rows[:, first:last].size


def test_repeats_that_do_not_divide_the_batch():
    """DeiT's three repeats in batches of 512: 171 images, the last of them twice."""
    order = EpochOrder((2000,), seed=0, shuffle_block=1, repeats=3, global_batch=512)
    for step in range(order.steps_per_epoch):
        rows, repeat = order.rows(0, step * 512, (step + 1) * 512)
        counts = np.unique(rows, return_counts=True)[1]
        assert sorted(counts.tolist()) == [2] + [3] * 170
        assert repeat.tolist() == [position // 171 for position in range(512)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_read_row_groups_of_their_own(world):
    order = EpochOrder(SIZES, seed=1, shuffle_block=2, global_batch=32, lanes=8)
    groups = []
    for rank in range(world):
        layout = Layout(32 // world, world, rank)
        starts = [layout.locate(step, order.steps_per_epoch)[1] for step in range(order.steps_per_epoch)]
        groups.append({row // 10 for start in starts for row in order.rows(0, start, start + 32 // world)[0].tolist()})
    for left, right in pairwise(groups):
        assert len(left & right) <= 1  # a group on the border between two lanes
    assert sum(map(len, groups)) <= len(SIZES) + world - 1


def test_a_lane_shuffles_one_block_at_a_time():
    order = EpochOrder((10,) * 40, seed=0, shuffle_block=2, global_batch=4, lanes=4)
    lanes = [order.permutation(0)[start:stop] for start, stop in pairwise(order.lane_starts)]
    assert [len(lane) for lane in lanes] == [100] * 4
    for lane in lanes:
        blocks = [set((lane[start : start + 20] // 10).tolist()) for start in range(0, 100, 20)]
        assert all(len(block) <= 3 for block in blocks)
        assert not np.array_equal(np.sort(lane[:20]), lane[:20])
    assert not np.array_equal(lanes[0] % 20, lanes[1] % 20)


def test_one_row_group_is_shuffled_whole():
    order = EpochOrder((1000,), seed=0, shuffle_block=1, global_batch=8, lanes=64)
    assert order.lanes == 1
    assert np.abs(order.rows(0, 0, 8)[0] - np.arange(8)).mean() > 100


def test_positions_outside_an_epoch():
    with pytest.raises(ValueError, match="outside an epoch of 10 global batches"):
        EpochOrder((10,), 0, 1).rows(0, 8, 11)


def test_user_errors():
    with pytest.raises(UserError, match=r"per_device_train_batch_size.*64 images.*data set of 50"):
        EpochOrder((50,), 0, 1, global_batch=64)


@pytest.mark.parametrize(("sizes", "count"), [((100,), 7), ((10,) * 40, 30), ((10,) * 40, 333), ((3, 4), 100)])
def test_spread_rows(sizes, count):
    rows = spread_rows(sizes, count)
    total = sum(sizes)
    assert len(set(rows.tolist())) == len(rows) == min(count, total)
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < total
    if count <= total:
        assert rows[-1] - rows[0] > total / 2
    assert len(set(np.searchsorted(np.cumsum(sizes), rows, side="right"))) <= max(16, -(-count // 10) + 1)
