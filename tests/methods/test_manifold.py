from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.manifold import Manifold, merge_patches
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import check_method, tiny_stages, tiny_vit
from tests.methods.build import build

BATCH = 3
PAIRS = {"student_blocks": [2, 0], "teacher_blocks": [-1, 1]}
PLAIN = {"w_sample": 1, "w_patch": 1, "w_rand": 1}


def make(ours=10, theirs=10, **config):
    student, teacher = (
        {f"block:{i}": shape for i in ids} for ids, shape in (((2, 0), (ours, 4)), ((-1, 1), (theirs, 6)))
    )
    return build(Manifold, student=student, teacher=teacher, **PAIRS, **config)


def features(tokens, width, blocks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"block:{i}": torch.randn(BATCH, tokens, width, dtype=torch.float64, generator=generator) for i in blocks}


def run(method, student, teacher, draws=None):
    outputs = [Outputs(torch.zeros(BATCH, 1), taps=value) for value in (student, teacher)]
    draws = method.draw(Draws(torch.arange(BATCH))) if draws is None else draws
    return method(*outputs, Target(torch.full((BATCH,), -1)), draws)


def cosines(rows):
    return torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows])


def difference(student, teacher):
    return (cosines(student) - cosines(teacher)).square().mean()


def test_terms_equal_cosines_compared_one_by_one():
    ours, theirs = features(10, 4, (2, 0)), features(10, 6, (-1, 1), seed=1)
    method = make(K=7, w_sample=0.1, w_patch=4, w_rand=0.2)
    draws = method.draw(Draws(torch.arange(BATCH)))
    expected = {"sample": 0.0, "patch": 0.0, "rand": 0.0}
    for k, (s, t) in enumerate([(ours["block:2"], theirs["block:-1"]), (ours["block:0"], theirs["block:1"])]):
        chosen = draws[f"perm.{k}"][:7]
        expected["patch"] += 4 / 2 * sum(difference(s[b], t[b]) for b in range(BATCH)) / BATCH
        expected["sample"] += 0.1 / 2 * sum(difference(s[:, n], t[:, n]) for n in range(10)) / 10
        expected["rand"] += 0.2 / 2 * difference(s.flatten(0, 1)[chosen], t.flatten(0, 1)[chosen])
    torch.testing.assert_close(run(method, ours, theirs, draws), expected)


def test_a_rotated_and_scaled_teacher_leaves_nothing():
    ours = features(10, 4, (2, 0))
    rotation = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    theirs = {"block:-1": 3 * ours["block:2"] @ rotation.T, "block:1": 5 * ours["block:0"] @ rotation.T}
    assert all(value < 1e-28 for value in run(make(**PLAIN), ours, theirs).values())


def test_first_tokens_that_the_teacher_lacks_do_not_count():
    ours, theirs = features(11, 4, (2, 0)), features(9, 6, (-1, 1), seed=1)
    method = make(11, 9)
    losses = run(method, ours, theirs)
    torch.testing.assert_close(losses, run(make(9, 9), {k: v[:, 2:] for k, v in ours.items()}, theirs))
    ours["block:2"][:, :2] = 7
    assert run(method, ours, theirs) == losses


def test_draws_are_distinct_tokens_of_the_batch_and_fresh_for_each_pair():
    method, keys = make(K=13), torch.arange(8)
    draws = method.draw(Draws(keys))
    assert list(draws) == ["perm.0", "perm.1"]
    for chosen in draws.values():
        assert len(set(chosen.tolist())) == 13
        assert 0 <= chosen.min() <= chosen.max() < 8 * 10
    assert not torch.equal(draws["perm.0"], draws["perm.1"])
    assert not torch.equal(draws["perm.0"], method.draw(Draws(keys + 8))["perm.0"])
    everything = make(K=192).draw(Draws(keys))["perm.0"]
    assert sorted(everything.tolist()) == list(range(80))


def test_every_token_is_drawn_equally_often():
    method = make(K=5)
    counts = torch.zeros(20)
    for start in range(0, 4000, 2):
        counts[method.draw(Draws(torch.arange(start, start + 2)))["perm.1"]] += 1
    # 500 expected of 2000 draws, deviation 19
    assert ((counts - 500).abs() < 5 * 19).all()


def test_merging_joins_the_channels_of_squares_of_patches():
    tokens = torch.arange(2 * 36 * 2).view(2, 36, 2)
    merged = merge_patches(tokens, 3)
    assert merged.shape == (2, 9, 8)
    for row in range(3):
        for column in range(3):
            square = tokens.view(2, 6, 6, 2)[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(merged[:, 3 * row + column], square.flatten(1))


def test_merging_happens_only_above_the_limit_and_only_where_squares_fit():
    ours, theirs = features(17, 4, (2, 0)), features(16, 6, (-1, 1), seed=1)
    whole = run(make(17, 16), ours, theirs)
    assert run(make(17, 16, max_patch_num=16), ours, theirs) == whole
    merging = make(17, 16, max_patch_num=5)
    assert len(merging.draw(Draws(torch.arange(BATCH)))["perm.0"]) == BATCH * 4
    assert run(merging, ours, theirs)["patch"] != whole["patch"]
    for tokens, limit in ((17, 4), (16, 9)):
        with pytest.raises(UserError, match=r"methods\.manifold\.max_patch_num.*no grid"):
            make(17, tokens, max_patch_num=limit)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (tiny_vit("distilled", prefix=("cls", "dist")), tiny_vit("plain", 16, 5)),
        (tiny_vit("plain"), tiny_vit("patches", 16, 8, prefix=())),
    ],
    ids=["distilled", "no_class_token"],
)
def test_other_prefix_tokens_keep_the_contract(student, teacher):
    check_method(Manifold, {}, student, teacher)


@pytest.mark.parametrize(("ours", "theirs", "prefixes"), [(16, 15, (1, 0)), (17, 16, (2, 1)), (40, 16, (25, 1))])
def test_grids_need_not_be_square(ours, theirs, prefixes):
    one = Manifold.Config(student_blocks=[0], teacher_blocks=[0])
    student, teacher = (
        Shapes(7, {"block:0": (count, 4)}, prefix=prefix)
        for count, prefix in zip((ours, theirs), prefixes, strict=True)
    )
    assert Manifold(one, student, teacher, {}).tokens == theirs


def test_what_cannot_serve_is_refused_with_the_reason():
    vit, config = tiny_vit("vit"), Manifold.Config()
    with pytest.raises(UserError, match=r"methods\.manifold needs a teacher"):
        Manifold.needs(config, vit, None)
    with pytest.raises(UserError, match=r"methods\.manifold\.teacher_blocks: the teacher 'cnn' has no.*ViT"):
        Manifold.needs(config, vit, tiny_stages("cnn"))
    with pytest.raises(UserError, match=r"methods\.manifold\.student_blocks: the student 'vit' has 4 blocks"):
        Manifold.needs(Manifold.Config(student_blocks=[11], teacher_blocks=[0]), vit, vit)
    for ours, theirs in ((9, 10), (26, 16)):
        with pytest.raises(UserError, match=f"{ours} and the teacher's {theirs}.*grids of patches must be equal"):
            make(ours, theirs)
    one, taps = {"student_blocks": [0], "teacher_blocks": [0]}, "block:0"
    for ours, theirs in ((16, 13), (13, 16)):  # grids of 3×5 and 3×4 with a class token each
        with pytest.raises(UserError, match=f"{ours} and the teacher's {theirs}"):
            shapes = (Shapes(7, {taps: (count, 4)}, prefix=1) for count in (ours, theirs))
            Manifold(Manifold.Config(**one), *shapes, {})
    with pytest.raises(ValidationError, match="names 2 blocks and teacher_blocks 1"):
        Manifold.Config(student_blocks=[0, 1], teacher_blocks=[0])
