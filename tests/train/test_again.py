"""What a second call does: the same script or notebook cell, the same command after a kill, `train()` twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from kd_hf.errors import UserError
from kd_hf.hub.publisher import _sources
from kd_hf.layout import ENDING, LOG, REPORT
from kd_hf.report.build import write_report
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.run.log import read_log
from kd_hf.run.record import RunRecord
from kd_hf.train.trainer import DistillTrainer
from tests.runs import RECIPE, assert_same_tensors, final_tensors, recipe
from tests.train.test_trainer import EVERYTHING, Kill

AVERAGED: dict[str, Any] = {"student": {"model": "test_resnet"}, "train": {"ema": {"decay": 0.5}}}
WEIGHTS = "model.safetensors"


def network_of(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    """The weights of the network that was handed over or built."""
    return trainer.parts.student.network.state_dict()


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the artefact; timm's names are the network's."""
    return load_file(folder / "student" / WEIGHTS)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of an average; copies of its folder are what tests begin with."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    DistillTrainer(recipe(folder, AVERAGED)).train()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


# ------------------------------------------------------------------------------------------ the network afterwards


def test_the_same_cell_again_has_the_trained_network(tmp_path):
    common = {"args": {**RECIPE["train"], "output_dir": str(tmp_path)}, "data": RECIPE["data"]}

    def cell() -> DistillTrainer:
        torch.manual_seed(0)
        trainer = DistillTrainer(timm.create_model("test_resnet", num_classes=10), **common)
        trainer.train()
        return trainer

    first, before = cell(), files(tmp_path)
    again = cell()
    assert_same_tensors(network_of(again), network_of(first))
    assert again.evaluate() == first.evaluate()
    again.save_model()
    assert {**files(tmp_path), LOG: b""} == {**before, LOG: b""}  # the evaluation of the first trainer was logged
    assert again.train().global_step == 4  # a third time, on the same trainer


@pytest.mark.parametrize("options", [{}, {"export": False}], ids=["average", "raw"])
def test_the_network_holds_what_was_exported(tmp_path, options):
    run = recipe(tmp_path, AVERAGED, {"train": {"ema": options}})
    trainer = DistillTrainer(run)
    logged = trainer.train().metrics
    assert_same_tensors(network_of(trainer), exported(tmp_path))
    assert trainer.evaluate()["eval_nll"] == logged["eval_nll"]
    again = DistillTrainer(run)
    again.train()
    assert_same_tensors(network_of(again), exported(tmp_path))
    assert again.predict(again.eval_source)[2]["test_nll"] == logged["eval_nll"]


BEST: dict[str, Any] = {
    "student": {"model": "test_resnet"},
    "train": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.01},
}


@pytest.mark.parametrize("average", [{}, {"ema": {"decay": 0.5}}], ids=["raw", "average"])
def test_the_best_weights_are_in_the_network_after_training(tmp_path, average):
    """Those of the second of four steps, as the measure says that has it so."""
    run = recipe(tmp_path, BEST, {"train": {**average, "metric_for_best_model": "likes_two", "save_total_limit": 1}})
    trainer = DistillTrainer(run, compute_metrics=lambda p: {"likes_two": float(trainer.state.global_step == 2)})
    trainer.train()
    assert trainer.state.best_global_step == 2
    best = next(line for line in read_log(tmp_path) if line["step"] == 2 and "eval_nll" in line)
    assert trainer.evaluate()["eval_nll"] == best["eval_nll"]
    assert trainer.predict(trainer.eval_source)[2]["test_nll"] == best["eval_nll"]
    assert_same_tensors(network_of(trainer), exported(tmp_path))


class StopAt(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def test_the_closing_evaluation_may_be_the_best_where_nothing_else_is_saved(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "metric_for_best_model": "later"}
    run = recipe(tmp_path, BEST, {"train": options})
    later = {"compute_metrics": lambda p: {"later": float(trainer.state.global_step)}}
    trainer = DistillTrainer(run, callbacks=[StopAt(3)], **later)
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert_same_tensors(network_of(trainer), exported(tmp_path))


# ------------------------------------------------------------------------------------------------ starting over


def test_training_twice_from_the_beginning_gives_the_same(tmp_path):
    trainer = DistillTrainer(recipe(tmp_path, EVERYTHING))
    outputs, tensors = [], []
    for _ in range(2):
        outputs.append(trainer.train(resume_from_checkpoint=False))
        tensors.append((final_tensors(tmp_path), exported(tmp_path)))
    assert outputs[0] == outputs[1] and outputs[0].global_step == 5
    for first, second in zip(*tensors, strict=True):
        assert_same_tensors(first, second)
    steps = [line["step"] for line in read_log(tmp_path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]


def test_a_trainer_goes_on_where_it_was_interrupted(tmp_path):
    whole = recipe(tmp_path / "whole", EVERYTHING)
    DistillTrainer(whole).train()
    trainer = DistillTrainer(recipe(tmp_path / "run", EVERYTHING), callbacks=[kill := Kill(3)])
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    trainer.remove_callback(kill)
    assert trainer.train().global_step == 5  # from checkpoint 2, though the network stood at step 3
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(tmp_path / "whole"))


# --------------------------------------------------------------------------------------------- what is missing


def crash(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


CARD = "kd_hf.train.publication.write_card"


@pytest.mark.parametrize(
    ("place", "save", "report"),
    [
        (CARD, "no", True),
        (CARD, "steps", False),
        ("kd_hf.hub.card.write_text", "no", False),
        ("kd_hf.run.folder.ending_of", "no", False),
        ("kd_hf.files._swap_in", "steps", False),
    ],
)
def test_the_same_command_makes_what_a_kill_prevented(tmp_path, finished, place, save, report):
    options = {"eval": {"report": report, "report_samples": 8}, "train": {"save_strategy": save}}
    run = recipe(tmp_path, AVERAGED, options)
    trainer = DistillTrainer(run)
    with mock.patch.object(trainer, "_finish", side_effect=crash), pytest.raises(KeyboardInterrupt):
        trainer.train()  # all steps are done
    with mock.patch(place, side_effect=crash), pytest.raises(KeyboardInterrupt):
        trainer._finish() if save == "no" else DistillTrainer(run).train()
    DistillTrainer(run).train()
    names = set(files(tmp_path))
    assert {"student/README.md", f"student/{WEIGHTS}", ENDING} <= names
    assert (f"{REPORT}/index.html" in names) == report
    assert not [name for name in names if "/." in f"/{name}" and not name.startswith("student/.eval_results/")]
    assert_same_tensors(exported(tmp_path), exported(finished))
    before = files(tmp_path)
    DistillTrainer(run).train()
    assert files(tmp_path) == before


def test_a_card_that_could_not_be_written_is_written_by_the_same_command(tmp_path, capsys):
    run = recipe(tmp_path)
    with mock.patch("kd_hf.train.publication.write_card", side_effect=UserError("the disk is full")):
        DistillTrainer(run).train()
    assert "not described, which the same command tries again: the disk is full" in capsys.readouterr().out
    assert not (tmp_path / "student" / "README.md").exists()
    DistillTrainer(run).train()
    assert (tmp_path / "student" / "README.md").is_file()


def test_nothing_that_was_being_written_is_pushed(run):
    (run / "student" / ".tmp-report").mkdir()
    for name in (".tmp-report/curve.png", ".tmp-README.md", "notes.md"):
        (run / "student" / name).write_text("")
    assert {name for name in _sources(run / "student", run / LOG) if "tmp" in name or "notes" in name} == {"notes.md"}


@pytest.mark.parametrize("name", [f"student/{WEIGHTS}", "student/config.json", "student/README.md"])
def test_a_file_that_is_gone_is_made_again(run, finished, name):
    (run / name).unlink()
    trainer = DistillTrainer(recipe(run, AVERAGED))
    assert trainer.train().global_step == 4
    assert_same_tensors(exported(run), exported(finished))
    assert_same_tensors(network_of(trainer), exported(finished))
    assert (run / name).is_file()


def damage(path: Path, kind: str) -> None:
    """Cut a file, or change one bit of it."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:-8]
    else:
        content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut", "bit"])
def test_damaged_weights_are_exported_again_or_refused(run, finished, kind, capsys):
    damage(run / "student" / WEIGHTS, kind)
    DistillTrainer(recipe(run, AVERAGED)).train()
    assert "it is exported again from the last checkpoint" in capsys.readouterr().out
    assert_same_tensors(exported(run), exported(finished))
    damage(run / "student" / WEIGHTS, kind)
    for path in list_checkpoints(run / "checkpoints"):
        path.rename(run / path.name)
    with pytest.raises(UserError, match=rf"holds a finished run, but student/{WEIGHTS} has another .*=false"):
        DistillTrainer(recipe(run, AVERAGED)).train()


def test_a_finished_run_of_the_version_before_stays_finished(run, finished):
    (run / ENDING).unlink()
    before = files(run)
    trainer = DistillTrainer(recipe(run, AVERAGED))
    trainer.train()
    assert_same_tensors(network_of(trainer), exported(finished))
    assert files(run) == before


def test_a_run_that_a_callback_ended_is_not_trained_on_after_a_kill(tmp_path):
    run = recipe(tmp_path, {"train": {"save_steps": 1}})
    with mock.patch("kd_hf.train.trainer.DistillTrainer._finish", crash), pytest.raises(KeyboardInterrupt):
        DistillTrainer(run, callbacks=[StopAt(3)]).train()
    before = [line for line in read_log(tmp_path) if "epoch" in line]
    assert DistillTrainer(run).train().global_step == 3
    assert [line for line in read_log(tmp_path) if "epoch" in line] == before


def test_a_report_and_a_student_keep_what_others_put_there(run):
    for name in ("student/notes.md", "student/onnx/model.onnx", "report/mine.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    write_report(RunRecord.read(run), samples=4)
    trainer = DistillTrainer(recipe(run, AVERAGED))
    trainer.train()
    trainer.save_model()
    assert (run / "student" / "README.md").is_file() and (run / "report" / "index.html").is_file()
    trainer.train(resume_from_checkpoint=False)
    for name in ("student/notes.md", "student/onnx/model.onnx", "report/mine.txt"):
        assert (run / name).read_text() == name
    assert [path.name for path in (run / "report").iterdir()] == ["mine.txt"]
