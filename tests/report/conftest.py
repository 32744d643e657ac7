"""Runs to report on: a whole one with teacher and plain twin, and logs written by hand."""

from __future__ import annotations

import shutil

import pytest

from kd_hf.layout import RESOLVED
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.report import figures
from kd_hf.run.log import JsonLines
from kd_hf.run.record import RunRecord
from kd_hf.train.chain import train_recipe
from kd_hf.train.trainer import DistillTrainer
from tests.runs import recipe

MODELS = {
    "student": {"name": "test_vit", "parameters": 371234},
    "teacher": {"name": "test_resnet", "parameters": 1234567},
}


def run_lines(top1, seconds=12.3, **more):
    """What a run writes: its networks, losses, evaluations."""
    return (
        {"step": 0, "models": MODELS},
        {"step": 1, "loss": 2.0, "task/ce": 1.5, "kd/soft": 0.5, "weight/kd": 1.0, "lr": 0.1},
        {"step": 2, "loss": None, "task/ce": 1.0, "kd/soft": 0.25, "weight/kd": 1.0, "lr": 0.0},
        {"step": 2, "eval_top1": top1 - 10, "train_seconds": 5.0},
        {"step": 4, "eval_top1": top1, "train_seconds": seconds, **more},
    )


def write_run(folder, written, *lines):
    """A run folder with a recipe and a log, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_recipe(written))
    log = JsonLines(folder, 0)
    for line in lines:
        log.write(line)
    return RunRecord.read(folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A ViT, student of a CNN, with a plain twin inside; 30 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    steps = {"max_steps": 30, "per_device_train_batch_size": 32, "logging_steps": 10, "eval_strategy": "epoch"}
    common = {"train": steps, "data": {"augment": {"hflip": 0.0}}}
    DistillTrainer(recipe(folder / "teacher", common, {"student": {"model": "test_resnet"}})).train()
    teacher = {"model": str(folder / "teacher"), "gate": {"enabled": False}}
    train_recipe(recipe(folder / "run", common, {"teacher": teacher, "methods": {"kd": {}}, "baseline": "train"}))
    return folder / "run"


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Pictures of fewer pixels, which are drawn faster."""
    monkeypatch.setattr(figures, "DPI", 50)


@pytest.fixture
def copied(trained, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")
