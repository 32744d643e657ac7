"""A task of another package: found by its entry point, checked, and trained by a recipe."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kd_hf.errors import UserError
from kd_hf.run.log import read_log
from kd_hf.task_table import task_entry, task_names
from kd_hf.tasks import open_task
from kd_hf.testing import check_task
from tests.detection.runs import detection_recipe
from tests.forked import Fork
from tests.runs import ROOT, recipe, recipe_file

ENTRIES = """\
[kd_hf.tasks]
image-regression = tests.yourtask:Number
image-to-text = tests.yourtask:Squared
object-detection = tests.yourtask:Number
gone = tests.yourtask:Gone
"""


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder with what pip writes of a package."""
    folder = tmp_path / "site" / "yourtask-0.1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: yourtask\nVersion: 0.1\n")
    (folder / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(folder.parent))
    task_entry.cache_clear()
    yield folder.parent
    task_entry.cache_clear()


BLOCKS = {"task": "image-regression", "student": {"num_classes": 1}, "train": {"max_steps": 6, "eval_strategy": "no"}}


def test_it_is_listed_and_keeps_the_contract(installed, tmp_path):
    (installed / "yourtask-0.1.dist-info" / "entry_points.txt").write_text(ENTRIES.replace("object-detection", "other"))
    assert "image-regression" in task_names()
    task = open_task(recipe(tmp_path, BLOCKS))
    assert type(task).__name__ == "Number"
    check_task(task)


def test_a_recipe_trains_with_it(installed, tmp_path):
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", BLOCKS)
    done = Fork("kd_hf.train", str(file), PYTHONPATH=os.pathsep.join((str(ROOT), str(installed)))).end()
    assert done.returncode == 0, done.stderr
    losses = [line["task/mse"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    measured = [line["eval_mae"] for line in read_log(tmp_path / "run") if "eval_mae" in line]
    assert len(measured) == 1 and 0 < measured[0] < 10
    assert "A network that reads a number" in (tmp_path / "run" / "student" / "README.md").read_text()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("image-regresion", "unknown task 'image-regresion'. Did you mean 'image-regression'?"),
        ("gone", "the entry point 'gone' of group kd_hf.tasks (tests.yourtask:Gone) does not load"),
        ("image-to-text", "(tests.yourtask:Squared) is no Task class whose pipeline_tag is 'image-to-text'"),
        (
            "object-detection",
            "the task 'object-detection' is kd_hf's own, but the package 'yourtask' registers",
        ),
    ],
)
def test_mistakes_are_named(installed, tmp_path, task, message):
    with pytest.raises((UserError, ValueError), match=re.escape(message)):
        recipe(tmp_path, {"task": task})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "object-detection"}, "needs the block `data.boxes`"),
        ({"task": "image-classification", "data": {"boxes": {}}}, "`data.boxes` is for `task: object-detection`"),
        ({"task": "image-clasification"}, "Did you mean 'image-classification'?"),
    ],
)
def test_a_task_and_its_data_belong_together(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe(tmp_path, values)


def test_our_own_tasks_keep_the_contract(tmp_path):
    check_task(open_task(recipe(tmp_path)))
    made = detection_recipe(tmp_path)
    assert made.task == "object-detection"
    check_task(open_task(made))
