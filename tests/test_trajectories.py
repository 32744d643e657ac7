"""Whole official trainings, stepped through the real trainer: the same numbers, and the check of it can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.goldens.check import LIMIT, check_file
from tests.goldens.replay import replay
from tests.goldens.trajectory import Trajectory

FOLDER = Path(__file__).parent / "goldens" / "trajectories"
FILES = sorted(FOLDER.glob("*.safetensors"))
CNN, VIT = "nkd_cnn_sgd", "deit_hard"  # quick ones, with and without drop path, average and BatchNorm


def changed(folder: Path, name: str, tensors=(), metadata=(), overrides=(), without=()) -> Path:
    """Copy a file with some tensors changed, added or left out, metadata replaced, or overrides of the recipe added."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as stored:
        facts = {key: json.loads(value) for key, value in stored.metadata().items()}
        values = {key: stored.get_tensor(key) for key in sorted(stored.keys()) if key not in without}
    for key, function in dict(tensors).items():
        values[key] = function(values.get(key)).contiguous()
    facts = {**facts, "overrides": [*facts["overrides"], *overrides], **dict(metadata)}
    file = folder / "trajectories" / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file(values, file, {key: json.dumps(value) for key, value in facts.items() if value is not ...})
    return file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_trained_as_by_the_official_code(file):
    row = check_file(file)
    assert row.status == "ok", row
    assert row.error <= LIMIT
    imposed = ("rates are the file's, not the recipe's",)  # a warm-up that the cosine multiplies
    assert row.exceptions == (imposed if file.stem == "vitkd_nkd_adamw" else ())


@pytest.mark.parametrize(
    ("name", "override", "least"),
    [
        (CNN, "train.weight_decay=1.01e-4", 1e-6),
        (CNN, "train.decay_norm_and_bias=false", 1e-6),
        (CNN, "methods.nkd.gamma=1.501", 1e-6),
        (CNN, "teacher.mode=eval", 1e-6),
        (VIT, "train.ema.decay=0.9999", 1e-6),
        (VIT, "train.ema.start=first_step", 1e-6),
        ("vitkd_nkd_adamw", "train.max_grad_norm=5.05", 1e-9),
        ("vitkd_nkd_adamw", "train.decay_norm_and_bias=true", 1e-6),
    ],
)
def test_another_ingredient_is_noticed(tmp_path, name, override, least):
    row = check_file(changed(tmp_path, name, overrides=[override]))
    assert row.status.startswith("FAILED")
    assert row.error > least


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            CNN,
            (
                *("out/nkd", "out/grad_norm", "lr/all", "final/student.layer4.1.bn2.running_var"),
                *("dot/teacher.bn1.running_mean", "epoch/student.conv1.weight"),
            ),
        ),
        (VIT, ("final/ema.head.weight", "out/deit_hard")),
        ("cls_kd_manifold", ("dot/methods.cls_kd.projector.fc1.weight", "out/cls_kd/patch")),
    ],
)
def test_perturbed_numbers_and_no_others_are_off(tmp_path, name, keys):
    perturbed = dict.fromkeys(keys, lambda value: value * (1 + 1e-7))
    errors = replay(Trajectory.read(changed(tmp_path, name, perturbed))).errors
    assert {key for key, error in errors.items() if error > LIMIT} == set(keys)


def test_another_drop_path_is_noticed(tmp_path):
    def flip_one(mask):
        mask = mask.clone()
        mask[3, 0, 5, 1] = 1 - mask[3, 0, 5, 1]
        return mask

    assert check_file(changed(tmp_path, VIT, {"draw/drop_path/student/mask": flip_one})).error > 1e-6


def test_what_nothing_reads_is_refused(tmp_path):
    names = ("more", "in/more", "weights/student.more", "draw/nkd/more", "draw/other/more")
    status = check_file(changed(tmp_path, CNN, dict.fromkeys(names, lambda _: torch.zeros(15, 1)))).status
    assert status == f"FAILED Mismatch: nothing reads {', '.join(sorted(names))}"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (CNN, {"metadata": {"colour": "blue"}}, "metadata colour"),
        (CNN, {"metadata": {"notes": ...}}, "metadata notes: Field required"),
        (CNN, {"metadata": {"format": 2}}, "metadata format"),
        (CNN, {"metadata": {"schedule": "warped"}}, "metadata schedule"),
        (CNN, {"metadata": {"steps": 14}}, "the recipe takes 15 steps"),
        (CNN, {"metadata": {"average": "first step"}}, "the file's average starts from first step"),
        (CNN, {"tensors": {"out/more": torch.zeros}}, "out/more: the recipe has no such loss"),
        (CNN, {"tensors": {"final/student.more": torch.zeros}}, "final/student.more: the trainer has no such tensor"),
        (CNN, {"tensors": {"epoch/more": torch.zeros}}, "epoch/more: the trainer has no such tensor"),
        (CNN, {"without": ["final/student.conv1.weight"]}, "no end of student.conv1.weight"),
        (CNN, {"without": ["in/target"]}, "KeyError"),
        (VIT, {"without": ["draw/drop_path/student/mask"]}, "KeyError"),
        (VIT, {"tensors": {"draw/drop_path/student/keep": lambda keep: keep[:-1]}}, "call"),
        (VIT, {"overrides": ["student.drop_path=0.2"]}, "keeps"),
    ],
)
def test_what_is_missing_or_strange_is_refused(tmp_path, name, changes, words):
    tensors = {
        key: (lambda _: torch.zeros(15)) if function is torch.zeros else function
        for key, function in changes.get("tensors", {}).items()
    }
    status = check_file(changed(tmp_path, name, **{**changes, "tensors": tensors})).status
    assert status.startswith("FAILED")
    assert words in status
