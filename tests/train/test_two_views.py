"""Losses on two views of each image, and numbers that move with the run, inside a run."""

from __future__ import annotations

import shutil

import pytest
import torch

from kd_hf import DistillTrainer
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.choices import check_methods, choose_methods
from kd_hf.errors import UserError
from kd_hf.plan.describe import plan_recipe
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.run.log import read_log
from kd_hf.tasks import open_task
from kd_hf.testing import tiny_stages
from tests.runs import TEACHER, assert_same_tensors, final_tensors, recipe

PAIR = {"student": {"model": "test_resnet", "num_classes": 10}, "teacher": TEACHER}
BOTH = {"methods": {"task": {"strong": True}, "mlkd": {}, "ctkd": {"epochs": 2}}}
# three steps an epoch
FEW = {"data": {"num_labels": 24, "unlabelled": "drop"}, "train": {"max_steps": 8, "save_steps": 4}}


def test_a_continued_run_is_equal_to_the_bit(tmp_path):
    def train():
        DistillTrainer(recipe(tmp_path, PAIR, BOTH, FEW)).train()
        return final_tensors(tmp_path)

    whole = train()
    names = {name for line in read_log(tmp_path) for name in line}
    assert {"task/ce", "task/ce_strong", "mlkd/kd", "mlkd/class", "mlkd/batch", "ctkd/soft"} <= names
    shutil.rmtree(list_checkpoints(tmp_path / "checkpoints")[-1])
    shutil.rmtree(tmp_path / "student")
    assert_same_tensors(train(), whole)


def test_the_student_runs_twice_only_while_a_loss_needs_it(tmp_path):
    run = recipe(tmp_path, PAIR, FEW, {"methods": {"kd": {}, "mlkd": {"until": 3}}, "train": {"save_strategy": "no"}})
    trainer = DistillTrainer(run)
    passes = {"student": 0, "teacher": 0}

    def count(name):
        return lambda module, given, output: passes.update({name: passes[name] + module.training})

    trainer.parts.student.network.register_forward_hook(count("student"))
    trainer.teachers["teacher"].model.network.register_forward_pre_hook(
        lambda module, given: passes.update(teacher=passes["teacher"] + torch.is_inference_mode_enabled())
    )
    feed = trainer.feed()
    for step, expected in enumerate((2, 4, 6, 7, 8)):
        before = passes["teacher"]
        trainer.step(feed)
        trainer.state.global_step += 1
        assert passes["student"] == expected
        assert passes["teacher"] - before == (2 if step < 3 else 1)


def test_a_plan_says_so_and_counts_both_passes(tmp_path):
    one = plan_recipe(recipe(tmp_path, PAIR, {"methods": {"kd": {}}}))
    two = plan_recipe(recipe(tmp_path, PAIR, {"methods": {"kd": {}, "mlkd": {}}}))
    assert two["cost_over_plain_training"] == pytest.approx(2 * one["cost_over_plain_training"], abs=0.02)
    assert two["augmentation"][-1] == "a second view (rand-m10-n2-mstd101-inc1 and cutout)"
    assert not [text for text in one["augmentation"] if "second" in text]
    student = plan_recipe(recipe(tmp_path, PAIR, {"methods": {"kd": {}, "task": {"strong": True}}}))
    plain = one["cost_over_plain_training"]
    assert student["cost_over_plain_training"] == pytest.approx(plain + 1, abs=0.02)


def test_stored_teachers_and_boxes_have_one_view(tmp_path):
    choices = assemble(recipe(tmp_path, PAIR, {"methods": {"mlkd": {}}}), 10, device="meta").choices
    with pytest.raises(
        UserError, match=r"teacher\.store: methods\.mlkd shows the teacher a second view of every image"
    ):
        check_methods(choices, {"teacher": None})
    boxes = recipe(tmp_path, {"data": {"boxes": {}}, "methods": {"task": {"method": "task", "strong": True}}})
    with pytest.raises(UserError, match=r"methods\.task compares two views of each image; images with boxes have one"):
        choose_methods(open_task(boxes), tiny_stages("any"), {})
