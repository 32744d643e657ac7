import random

import numpy as np
import pytest
import torch

from kd_hf.draws import MASK64, Draws, _finalise, _signed, generator, hash_key, python_state_kept, seed_python


def keys(count, seed=0):
    return torch.tensor([hash_key(seed, 0, row, 0) for row in range(count)], dtype=torch.int64)


def test_known_values():
    assert hash_key() == 0
    assert hash_key(0) == _signed(0xE220A8397B1DCDAF)  # the first output of splitmix64 seeded with 0
    assert [hash_key(0, 1, 2, 3), hash_key("order"), hash_key(-1)] == [
        8517133837209568050,
        8157908791199291895,
        -1956407806741107680,
    ]
    assert Draws(torch.tensor([1, -7])).uniform("x", (2,)).flatten().tolist() == [
        0.5508518815040588,
        0.2948019504547119,
        0.5189367532730103,
        0.35358744859695435,
    ]
    assert generator(1, "a").integers(0, 1000, 3).tolist() == [714, 327, 984]


def test_order_and_type_of_parts_matter():
    assert (
        len({hash_key(1, 2), hash_key(2, 1), hash_key(1), hash_key(1, 2, 0), hash_key("1", "2"), hash_key("12")}) == 6
    )
    assert hash_key(np.int64(5), 1) == hash_key(5, 1)


def test_no_collisions_over_an_epoch():
    assert len({hash_key(0, epoch, row, 0) for epoch in range(3) for row in range(30_000)}) == 90_000


def test_torch_arithmetic_is_pythons():
    values = [0, 1, -1, 2**63 - 1, -(2**63), *(hash_key(i) for i in range(200))]
    expected = [_signed(_finalise(value & MASK64)) for value in values]
    assert Draws._mix(torch.tensor(values)).tolist() == expected


def test_uniform_is_uniform():
    values = Draws(keys(200)).uniform("u", (500,)).double()
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 64, 0, 1)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 30 < chi2 < 110  # 63 degrees of freedom
    assert values.mean().item() == pytest.approx(0.5, abs=0.005)


def test_normal_has_normal_moments():
    values = Draws(keys(200)).normal("n", (500,)).double()
    assert torch.isfinite(values).all()
    assert values.mean().item() == pytest.approx(0, abs=0.015)
    assert values.var().item() == pytest.approx(1, abs=0.02)
    assert (values**4).mean().item() == pytest.approx(3, abs=0.12)


@pytest.mark.parametrize("neighbour", ["key", "epoch", "stream", "number", "increment"])
def test_neighbours_are_independent(neighbour):
    here = torch.arange(4000)
    first = Draws(here).uniform("s", (2,))
    second = {
        "key": lambda: Draws(here + 1).uniform("s", (2,)),
        "epoch": lambda: Draws(torch.tensor([hash_key(0, 1, row, 0) for row in range(4000)])).uniform("s", (2,)),
        "stream": lambda: Draws(here).uniform("t", (2,)),
        "number": lambda: first.flip(1),
        "increment": lambda: Draws(here + _signed(0x9E3779B97F4A7C15)).uniform("s", (2,)),
    }[neighbour]()
    correlation = torch.corrcoef(torch.stack([first[:, 0], second[:, 0]]))[0, 1].abs()
    assert correlation < 0.06  # standard deviation 0.016


def test_any_slicing_of_a_batch_gives_the_same():
    all_keys = keys(12)
    whole = Draws(all_keys).normal("z", (3, 5))
    parts = torch.cat([Draws(part).normal("z", (3, 5)) for part in all_keys.split([1, 4, 7])])
    assert torch.equal(whole, parts)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Draws(all_keys[order]).normal("z", (3, 5)), whole[order])


def test_a_longer_draw_begins_with_the_shorter_one():
    draws = Draws(keys(4))
    assert torch.equal(draws.normal("z", (10,))[:, :6], draws.normal("z", (6,)))


def test_shapes_of_one_and_of_nothing():
    draws = Draws(keys(3))
    assert draws.uniform("s", ()).shape == (3,)
    assert draws.uniform("s", (0, 3)).shape == (3, 0, 3)
    assert Draws(keys(0)).uniform("s", (2,)).shape == (0, 2)


def test_seeding_python_and_restoring():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with python_state_kept():
        seed_python(5, "a")
        inside = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
    seed_python(5, "a")
    assert (random.random(), np.random.rand()) == inside
