"""``--smoke`` on recipes of different kinds; ``python -m tests.programs.smoke_recipes`` runs it on all."""

from __future__ import annotations

import pytest
import torch

from kd_hf.data.noise import NoiseSource
from kd_hf.errors import UserError
from kd_hf.recipe.read import load_recipe
from kd_hf.train.smoke import smoke, smoke_recipe
from tests.forked import run
from tests.runs import ROOT, TEACHER, recipe

REPRESENTATIVE = ("quickstart", "mgd_resnet34_resnet18", "vitkd_nkd_deit3_small_deit_tiny", "uskd_resnet18")


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_recipes_survive(tmp_path, name):
    assert smoke(load_recipe(ROOT / "recipes" / f"{name}.yaml"), tmp_path).startswith("survived")


def test_what_decides_the_result_stays(tmp_path):
    whole = recipe(tmp_path / "whole", {"teacher": TEACHER, "methods": {"mgd": {}}, "train": {"optim": "lamb"}})
    whole = whole.model_copy(update={"data": whole.data.model_copy(update={"num_labels": 20})})
    small = smoke_recipe(whole, tmp_path / "small")
    assert small.student.model == whole.student.model and small.methods == whole.methods
    assert small.train.optim == "lamb" and small.data.augment == whole.data.augment
    assert (small.train.max_steps, small.train.per_device_train_batch_size) == (2, 2)
    assert not small.teacher.pretrained and not small.teacher.gate.enabled


def test_the_command_keeps_nothing(tmp_path):
    file = tmp_path / "recipe.yaml"
    import yaml

    from tests.runs import RECIPE, merged

    file.write_text(yaml.safe_dump(merged(RECIPE, {"train": {"output_dir": str(tmp_path / "run")}})))
    done = run("kd_hf.train", str(file), "--smoke")
    assert done.returncode == 0, done.stderr
    assert "survived: task" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_student_that_changes_on_its_way_is_noticed(tmp_path, monkeypatch):
    from kd_hf.tasks.classification import Classification

    original = Classification.load

    def altered(*args, **kwargs):
        handle = original(*args, **kwargs)
        with torch.no_grad():
            for parameter in handle.network.parameters():
                parameter.add_(0.1)
        return handle

    monkeypatch.setattr(Classification, "load", altered)
    with pytest.raises(UserError, match="the reloaded student differs"):
        smoke(recipe(tmp_path / "run", {"student": {"num_classes": 10}}), tmp_path / "small")


def test_noise_is_the_same_each_time():
    source = NoiseSource(6, 16, 4)
    assert source.read(3) == source.read(3) != source.read(2)
    assert source.labels().tolist() == [0, 1, 2, 3, 0, 1]
