"""Two processes under accelerate's launcher against one: the same losses, the same weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kd_hf.errors import UserError
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import TrainConfig
from kd_hf.run.log import read_log
from tests.forked import free_port, launch, run
from tests.runs import ROOT, TEACHER, environment, final_tensors, recipe_file

# LayerNorm networks: BatchNorm sees the images of one process only
OPTIONS = {
    "student": {"model": "test_convnext"},
    "teacher": TEACHER | {"model": "test_convnext2"},
    "methods": {"kd": {"weight": 1.0}, "mgd": {"weight": 0.001}},
    "data": {"augment": {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.3}},
    "train": {"optim": "momentum", "learning_rate": 0.02, "ema": {"decay": 0.9}, "max_grad_norm": 5.0, "max_steps": 6},
}


def accelerate_launch(*args: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch --config_file accelerate_configs/2cpu.yaml -m …``"""
    config = ["--config_file", "accelerate_configs/2cpu.yaml", "--main_process_port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *config, "-m", *args],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Run folders of one process with 8 images and of two with 4 each."""
    folder = tmp_path_factory.mktemp("two")
    one = run("kd_hf.train", str(recipe_file(folder / "one.yaml", folder / "one", OPTIONS)))
    assert one.returncode == 0, one.stderr
    half = {"train": {"per_device_train_batch_size": 4, "dataloader_num_workers": 1}}
    two = accelerate_launch("kd_hf.train", str(recipe_file(folder / "two.yaml", folder / "two", OPTIONS, half)))
    assert two.returncode == 0, two.stderr
    return folder / "one", folder / "two"


def test_losses_agree(both):
    lines = [[line for line in read_log(folder) if "loss" in line] for folder in both]
    assert len(lines[0]) == len(lines[1]) == 6
    for one, two in zip(*lines, strict=True):
        for key in ("loss", "task/ce", "kd/soft", "mgd/generation"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_weights_and_average_agree(both):
    one, two = (final_tensors(folder) for folder in both)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5)


def test_evaluation_counts_every_image_once(both):
    values = [[line for line in read_log(folder) if "eval_samples" in line][-1] for folder in both]
    for key in ("eval_samples", "eval_top1", "eval_agreement"):
        assert values[0][key] == values[1][key]


def test_two_processes_continue_what_one_began(both, tmp_path):
    import shutil

    shutil.copytree(both[0] / "checkpoints" / "checkpoint-4", tmp_path / "run" / "checkpoints" / "checkpoint-4")
    half = {"train": {"per_device_train_batch_size": 4}}
    done = launch("kd_hf.train", str(recipe_file(tmp_path / "two.yaml", tmp_path / "run", OPTIONS, half)))
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout + done.stderr
    resumed, whole = final_tensors(tmp_path / "run"), final_tensors(both[0])
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-5)


def test_processes_that_do_not_know_each_other_are_stopped(tmp_path, monkeypatch):
    cfg = TrainConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    build_accelerator(cfg)  # this process is alone
    monkeypatch.setenv("WORLD_SIZE", "2")  # and its launcher says otherwise
    with pytest.raises(UserError, match="the launcher started 2 processes but accelerate sees 1"):
        build_accelerator(cfg)
