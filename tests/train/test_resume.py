"""Interrupted processes through the command line: killed, asked to stop, started again with other workers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kd_hf.run.checkpoint import list_checkpoints, step_of
from kd_hf.run.log import read_log
from tests import runs
from tests.forked import Fork, run
from tests.runs import TEACHER, assert_same_tensors, final_tensors, recipe_file

STEPS = 40
OPTIONS = {
    "student": {"model": "test_resnet", "drop_path": 0.2},
    "teacher": TEACHER,
    "methods": {"mgd": {"weight": 0.01}, "kd": {"weight": 0.5}},
    "data": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}},
    "train": {"max_steps": STEPS, "save_steps": 5, "ema": {"decay": 0.9}},
}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> dict:
    """The digits as Parquet in small row groups, so that runs stream and shuffle blocks of them."""
    import pyarrow
    import pyarrow.parquet

    from kd_hf.data.opening import open_source
    from kd_hf.recipe.config import DataConfig

    folder = tmp_path_factory.mktemp("parquet") / "data"
    folder.mkdir()
    for split, name in (("train", "train"), ("eval", "validation")):
        source = open_source(DataConfig(path="builtin:digits"), split)
        rows = [source.read(row) for row in range(len(source))]
        columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "label": [label for _, label in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}-0.parquet", row_group_size=50)
    return {"data": {"path": str(folder), "streaming": True, "shuffle_block": 4}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, streamed) -> Path:
    """The run that nothing interrupts, in an interpreter of its own."""
    folder = tmp_path_factory.mktemp("reference")
    done = runs.run("kd_hf.train", str(recipe_file(folder / "recipe.yaml", folder / "run", OPTIONS, streamed)))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def start_and_signal(file: Path, folder: Path, after: int, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start training, send a signal once step `after` is logged, wait for the end."""
    started = Fork("kd_hf.train", str(file))
    deadline = time.monotonic() + 120
    while not any(line.get("loss") and line["step"] >= after for line in read_log(folder)):
        assert started.process.is_alive() and time.monotonic() < deadline, started.end(0)
        time.sleep(0.01)
    os.kill(started.process.pid, number)
    return started.end(120)


def test_sigkill_then_other_workers_equals_the_uninterrupted_run(tmp_path, reference, streamed):
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", OPTIONS, streamed)
    killed = start_and_signal(file, tmp_path / "run", 12, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert kept and step_of(kept[-1]) < STEPS
    done = run("kd_hf.train", str(file), "train.dataloader_num_workers=2")
    assert done.returncode == 0, done.stderr
    assert f"continuing from {kept[-1]}" in done.stdout + done.stderr
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(reference))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_polite_signal_saves_and_ends_with_its_number(tmp_path, reference, streamed, number):
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", OPTIONS, streamed)
    stopped = start_and_signal(file, tmp_path / "run", 3, number)
    assert stopped.returncode == 128 + number, stopped.stderr
    assert f"stopped by {number.name} after step" in stopped.stdout + stopped.stderr
    last = step_of(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert f"after step {last} of {STEPS}" in stopped.stdout + stopped.stderr
    assert not (tmp_path / "run" / "student").exists()
    done = run("kd_hf.train", str(file))
    assert done.returncode == 0, done.stderr
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(reference))
