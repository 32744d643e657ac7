"""Lessons: what a step learns from, prepared when it is asked for or one ahead."""

import pytest
import torch

from kd_hf.data.opening import open_source
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.teacher import Teacher
from kd_hf.process import build_accelerator
from kd_hf.train.feed import Feed, open_feed
from tests.runs import TEACHER, recipe

AUGMENT = {"mixup": 0.2, "cutmix": 1.0, "erasing": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
BLOCKS = {
    "teacher": {**TEACHER, "mode": "train"},
    "methods": {"kd": {"until": "2 steps"}, "mgd": {}},
    "data": {"augment": AUGMENT},
    "train": {"gradient_accumulation_steps": 2, "max_steps": 4},
}


def lessons(folder, ahead, start=0):
    """All lessons of a small run from a step on, prepared so many ahead."""
    run = recipe(folder, BLOCKS, {"student": {"model": "test_resnet"}})
    source = open_source(run.data, "train")
    parts = assemble(run, source.num_classes)
    cfg = run.all_teachers()["teacher"]
    teacher = Teacher(
        "teacher", cfg, parts.teachers["teacher"], parts.tapped_teachers["teacher"], torch.device("cpu"), run.train
    )

    def active(step):
        return ("task", "kd", "mgd") if step < 2 else ("task",)

    feed = open_feed(parts, source, {"teacher": teacher}, active, build_accelerator(run.train), start, 4)
    feed.ahead = ahead
    return collect(feed)


def collect(feed: Feed):
    found = []
    while True:
        try:
            found.append(next(feed))
        except StopIteration:
            return found


def same(left, right):
    assert left.active == right.active
    pairs = list(zip(left.tensors(), right.tensors(), strict=True))
    assert len(pairs) >= 2
    assert all(one.equal(other) for one, other in pairs)


@pytest.fixture(scope="module")
def in_time(tmp_path_factory):
    return lessons(tmp_path_factory.mktemp("feed"), ahead=0)


def test_a_run_has_a_lesson_for_every_micro_batch(in_time):
    assert len(in_time) == 4 * 2
    assert [bool(lesson.teachers) for lesson in in_time] == [True] * 4 + [
        False
    ] * 4  # a teacher nobody reads is not run
    assert set(in_time[0].draws) == {"task", "kd", "mgd"}
    assert set(in_time[-1].draws) == {"task"}


def test_lessons_prepared_ahead_are_the_same(in_time, tmp_path):
    for ahead in (1, 3):
        for one, other in zip(in_time, lessons(tmp_path, ahead), strict=True):
            same(one, other)


def test_a_resumed_run_gets_the_lessons_that_were_left(in_time, tmp_path):
    for one, other in zip(in_time[2:], lessons(tmp_path, 1, start=1), strict=True):
        same(one, other)
