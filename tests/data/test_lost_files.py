"""A file of the data that disappears while a run reads it, through the command line."""

import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kd_hf.data.opening import open_source
from kd_hf.data.parquet import ParquetFiles
from kd_hf.data.tars import TarSource
from kd_hf.errors import run_command
from kd_hf.recipe.config import DataConfig
from kd_hf.run.checkpoint import list_checkpoints, step_of
from kd_hf.train.__main__ import main
from tests.data.conftest import write_tar
from tests.runs import assert_same_tensors, final_tensors, recipe_file

STEPS = {"max_steps": 30, "save_steps": 4, "per_device_train_batch_size": 16}


def write_parquet_files(folder, name, rows):
    import pyarrow
    import pyarrow.parquet

    columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "label": [label for _, label in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet", row_group_size=40)


def write_tar_files(folder, name, rows):
    samples = {f"{i:04d}": {"png": data, "cls": str(label)} for i, (data, label) in enumerate(rows)}
    write_tar(folder / f"{name}.tar", samples)


@pytest.fixture(params=["parquet", "tar"])
def digits_files(request, tmp_path):
    """Folder of the digits in several files, of which little is held in memory."""
    folder = tmp_path / "data"
    folder.mkdir()
    write = write_parquet_files if request.param == "parquet" else write_tar_files
    for split, name, files in (("train", "train", 6), ("eval", "validation", 1)):
        source = open_source(DataConfig(path="builtin:digits"), split)
        rows = [source.read(row) for row in range(480 if split == "train" else 64)]
        for number in range(files):
            write(folder, f"{name}-{number}", rows[number::files])
    return folder


@pytest.fixture
def command(tmp_path, digits_files, monkeypatch, capsys):
    """Runs the recipe to its end and returns the exit code and the lines on stderr."""
    data = {"path": str(digits_files), "streaming": True, "lanes": 1, "shuffle_block": 1}

    def call(run):
        file = recipe_file(tmp_path / "recipe.yaml", tmp_path / run, {"data": data, "train": STEPS})
        monkeypatch.setattr(sys, "argv", ["train", str(file)])
        with pytest.raises(SystemExit) as end:
            run_command(main)
        return end.value.code, capsys.readouterr().err.splitlines()

    return call


def file_of_row(source, row):
    return source._files[np.searchsorted(source._ends, row, "right")]


def file_of_group(files, group):
    return files.files[files.groups[group][0]]


@pytest.fixture
def loss(tmp_path, digits_files, monkeypatch):
    """A context in which a file is renamed to `lost` in the middle of a run, just before it is read.

    Gives a list that will hold its path.
    """
    tar = any(digits_files.glob("*.tar"))
    kind, late, file_of = (TarSource, 300, file_of_row) if tar else (ParquetFiles, 28, file_of_group)
    original, found, calls = kind.read, [], itertools.count(1)

    def read(self, place, *rest):
        if next(calls) == late:
            found.append(file_of(self, place))
            Path(found[0]).rename(tmp_path / "lost")
        return original(self, place, *rest)

    @contextmanager
    def losing():
        with monkeypatch.context() as patch:
            patch.setattr(kind, "read", read)
            yield found

    return losing


def test_one_line_and_the_same_command_continues(tmp_path, command, loss):
    whole = command("whole")
    assert whole[0] == 0, whole
    with loss() as lost:
        code, lines = command("run")
    (file,) = lost
    assert code == 2
    error = lines[-1]
    assert error.startswith("kd_hf: error: data.path: cannot read ") and file in error
    assert error.endswith("the same command continues the run from its last checkpoint")
    assert not any("Traceback" in line for line in lines)
    kept = [step_of(path) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept and 0 < kept[-1] < STEPS["max_steps"]
    (tmp_path / "lost").rename(file)
    assert command("run")[0] == 0
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))
