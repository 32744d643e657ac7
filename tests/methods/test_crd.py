"""CRD: its two banks, what it draws, and what makes it the same on one process, on two, and after a resume."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn

import kd_hf.methods.crd as crd
from kd_hf.data.digits import DigitsSource
from kd_hf.draws import Draws, hash_key
from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.crd import CRD
from kd_hf.outputs import Outputs, Target
from kd_hf.plan.describe import describe, plan_recipe
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.train.chain import train_recipe
from tests.methods import straightforward as plain
from tests.runs import TEACHER, assert_same_tensors, final_tensors, recipe

CLASSES = 5


class Images:
    """A training set of odd classes: one is empty, some images have no label."""

    def __init__(self, count=23, classes=(0, 1, 3, 4)):
        cycle = np.array(classes)[np.arange(count) % len(classes)]
        self.classes = np.where(np.arange(count) % 7 == 6, -1, cycle)

    def __len__(self):
        return len(self.classes)

    def labels(self):
        return self.classes


def built(images=None, dtype=torch.float64, **config):
    torch.manual_seed(0)
    shapes = Shapes(CLASSES, {"feature": (4,)}, samples=images or Images()), Shapes(CLASSES, {"feature": (6,)})
    return CRD(CRD.Config(**{"dim": 8, "negatives": 6, **config}), *shapes, {}).to(dtype)


def features(width, count=4, seed=0, dtype=torch.float64):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(method, rows, seed=0, ours=None, theirs=None):
    """A step on the images `rows`; gives the losses."""
    images, rows = Images(), torch.tensor(rows)
    ours = features(4, len(rows), seed) if ours is None else ours
    theirs = features(6, len(rows), seed + 1) if theirs is None else theirs
    target = Target(torch.from_numpy(images.classes)[rows], None, rows)
    draws = method.draw(keyed(rows, seed))
    blank = ours.new_zeros(len(rows), 1)
    return method(*(Outputs(blank, taps={"feature": each}) for each in (ours, theirs)), target, draws)


def keyed(rows, seed=0):
    return Draws(torch.tensor([hash_key(seed, int(row)) for row in rows]))


def chosen_by(method, rows, seed=0):
    rows = torch.tensor(rows)
    target = Target(torch.from_numpy(Images().classes)[rows], None, rows)
    return method._choose(target, method.draw(keyed(rows, seed)))


def test_the_first_step_is_the_straightforward_form():
    method, rows = built(), [2, 9, 4]
    ours, theirs = features(4, 3).requires_grad_(), features(6, 3, 1)
    chosen, banks = chosen_by(method, rows), [method.memory_s.clone(), method.memory_t.clone()]
    expected = plain.crd(ours, theirs, (method.embed_s.linear, method.embed_t.linear), banks, chosen)
    losses = step(method, rows, ours=ours, theirs=theirs)
    value = losses["student"] + losses["teacher"]
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    leaves = (ours, *method.parameters())
    for one, other in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_slices_of_the_batch_do_not_matter(monkeypatch):
    whole = step(built(), [2, 9, 4, 0])
    monkeypatch.setattr(crd, "_CHUNK", 3 * 23)
    assert torch.equal(whole["student"], step(built(), [2, 9, 4, 0])["student"])


def test_banks_move_towards_the_embeddings_of_their_images_alone():
    method, rows = built(momentum=0.75), [2, 9, 4]
    before = method.memory_s.clone()
    ours = features(4, 3)
    step(method, rows, ours=ours)
    vectors = nn.functional.normalize(method.embed_s.linear(ours))
    moved = nn.functional.normalize(0.75 * before[rows] + 0.25 * vectors)
    torch.testing.assert_close(method.memory_s[rows], moved)
    others = [row for row in range(23) if row not in rows]
    assert torch.equal(method.memory_s[others], before[others])


def test_the_normaliser_is_that_of_the_first_batch():
    method = built()
    assert method.z_s < 0 and method.z_t < 0
    step(method, [2, 9, 4])
    first = method.z_s.clone(), method.z_t.clone()
    assert first[0] > 0 and first[0] != first[1]
    step(method, [5, 1, 0], seed=3)
    assert torch.equal(method.z_s, first[0]) and torch.equal(method.z_t, first[1])


def test_nothing_is_remembered_outside_training():
    method = built().eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step(method, [2, 9, 4])
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_of_an_image_that_occurs_twice_the_last_one_counts():
    one, two = built(), built()
    ours = features(4, 3)
    step(one, [2, 2, 9], ours=ours)
    step(two, [2, 9], ours=ours[1:])
    torch.testing.assert_close(one.memory_s, two.memory_s)


@pytest.mark.parametrize("replacement", [False, True])
def test_negatives_are_of_other_classes_and_everyone_has_a_turn(replacement):
    method, classes = built(replacement=replacement), torch.from_numpy(Images().classes)
    rows, seen = [0, 1, 2, 3], [set() for _ in range(4)]
    for seed in range(60):
        chosen = chosen_by(method, rows, seed)
        assert chosen.shape == (4, 7) and chosen[:, 0].tolist() == rows
        for image, negatives in enumerate(chosen[:, 1:].tolist()):
            assert replacement or len(set(negatives)) == 6
            seen[image] |= set(negatives)
    for image, found in enumerate(seen):
        assert found == {row for row in range(23) if classes[row] not in (-1, classes[rows[image]])}


@pytest.mark.parametrize("replacement", [False, True])
def test_negatives_are_equally_likely(replacement):
    method = built(replacement=replacement)
    counts = torch.zeros(23)
    for seed in range(400):
        counts += torch.bincount(chosen_by(method, [0], seed)[0, 1:], minlength=23)
    drawn = counts[counts > 0]
    expected = 400 * 6 / len(drawn)
    assert ((drawn - expected) ** 2 / expected).sum() < 3 * len(drawn)


def test_a_relaxed_positive_is_any_image_of_the_class():
    method, classes = built(positive="relax"), torch.from_numpy(Images().classes)
    seen = {int(chosen_by(method, [0], seed)[0, 0]) for seed in range(60)}
    assert seen == {row for row in range(23) if classes[row] == classes[0]}


def test_draws_depend_on_the_image_and_not_on_its_place_in_the_batch():
    method = built()
    assert torch.equal(chosen_by(method, [0, 5, 9])[1], chosen_by(method, [5])[0])
    assert not torch.equal(chosen_by(method, [5], 0), chosen_by(method, [5], 1))


def test_replacement_follows_the_size_unless_it_is_told(monkeypatch):
    assert not built().replacement
    assert built(negatives=16).replacement  # of 20 labelled images, the largest class has 5
    assert not built(negatives=15).replacement
    monkeypatch.setattr(crd, "_DISTINCT", 22)
    assert built().replacement and not built(replacement=False).replacement


def test_images_without_a_label_add_nothing_but_are_remembered():
    method = built()
    before = method.memory_s.clone()
    ours = features(4, 2).requires_grad_()
    losses = step(method, [6, 0], ours=ours)  # the first one has none
    (losses["student"] + losses["teacher"]).backward()
    assert not ours.grad[0].any() and ours.grad[1].any()
    assert not torch.equal(method.memory_s[6], before[6])


def test_the_teachers_feature_has_no_gradient():
    theirs = features(6, 3, 1).requires_grad_()
    losses = step(built(), [2, 9, 4], theirs=theirs)
    (losses["student"] + losses["teacher"]).backward()
    assert theirs.grad is None


def test_images_without_numbers_or_of_one_class_are_refused():
    method, blank = built(), torch.zeros(2, 1)
    sides = [Outputs(blank, taps={"feature": features(width, 2)}) for width in (4, 6)]
    with pytest.raises(UserError, match=r"methods\.crd .*these images have no numbers"):
        method(*sides, Target(torch.tensor([0, 1])), {})
    with pytest.raises(UserError, match=r"methods\.crd tells images of different classes apart"):
        built(Images(classes=(2,)))


SMALL = {"student": {"model": "test_resnet"}, "teacher": TEACHER, "methods": {"crd": {"dim": 8, "negatives": 50}}}


def test_a_plan_says_what_is_kept_and_that_processes_share_it(tmp_path):
    plan = plan_recipe(recipe(tmp_path, SMALL))
    assert plan["gathered"] == ["crd"]
    assert "coupled    crd: this loss mixes the images of all processes" in describe(plan)
    elsewhere = describe(plan_recipe(recipe(tmp_path, SMALL, {"data": {"path": "somebody/photos"}})))
    assert "crd keeps 64 bytes of every training image, which are not counted here" in elsewhere
    large = {"methods": {"crd": {"dim": 2**20}}}
    memory = plan_recipe(recipe(tmp_path, SMALL, large))["memory_per_process_gib"]
    assert memory["banks"] == pytest.approx(1078 * 2 * 4 * 2**20 / 2**30, abs=0.01)


def test_repeated_augmentation_and_mixed_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"methods\.crd .*data\.augment\.repeats is 2: set it to 1"):
        plan_recipe(recipe(tmp_path, SMALL, {"data": {"augment": {"repeats": 2}}}))
    with pytest.raises(UserError, match=r"methods\.crd is defined for index labels only"):
        plan_recipe(recipe(tmp_path, SMALL, {"data": {"augment": {"mixup": 0.8}}}))


def streamed(folder, count=64):
    """Digits as Parquet in small row groups, so that runs stream and shuffle blocks of them."""
    folder.mkdir()
    for split, name in (("train", "train"), ("eval", "validation")):
        source = DigitsSource(split)
        rows = [source.read(row) for row in range(count)]
        columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "label": [label for _, label in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}-0.parquet", row_group_size=10)
    return {"data": {"path": str(folder), "streaming": True, "shuffle_block": 2}}


def test_a_continued_run_on_a_stream_is_the_same_to_the_bit(tmp_path):
    """Banks, normalisers and draws included: a run of six steps, and its second half alone."""
    options = {"train": {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}}
    blocks = (SMALL, streamed(tmp_path / "data"), options)
    train_recipe(recipe(tmp_path / "whole", *blocks))
    first = list_checkpoints(tmp_path / "whole" / "checkpoints")[0]
    shutil.copytree(first, tmp_path / "half" / "checkpoints" / first.name)
    train_recipe(recipe(tmp_path / "half", *blocks))
    whole, half = (final_tensors(tmp_path / name) for name in ("whole", "half"))
    kept = {f"module/methods.crd.{name}" for name in ("memory_s", "memory_t", "z_s", "z_t", "embed_t.linear.bias")}
    assert kept <= whole.keys() and "module/methods.crd.order" not in whole
    assert_same_tensors(whole, half)
    # rows start at random lengths; those of the images that were shown, each once, have length 1
    shown = (whole["module/methods.crd.memory_s"].norm(dim=1) - 1).abs() < 1e-6
    assert shown.sum() == 6 * 8
