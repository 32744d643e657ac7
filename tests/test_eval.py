"""Evaluation: exact counts, the command line, the teacher beside the student, the gate's two measurements."""

from __future__ import annotations

import json

import pytest
import torch

from kd_hf.artefact import save_student
from kd_hf.config import DataConfig, GateConfig
from kd_hf.data.source import open_source
from kd_hf.errors import UserError
from kd_hf.eval import evaluate_models
from kd_hf.models.load import load_model
from kd_hf.teacher import GateResult, check_label_order
from kd_hf.trainer import DistillTrainer
from tests.runs import recipe, run

DIGITS = {"path": "builtin:digits", "image_size": 32}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two run folders: a student after 30 steps, and another network after 30."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"data": {"augment": {"hflip": 0.0}}, "train": {"max_steps": 30, "per_device_train_batch_size": 32}}
    for name, model in (("vit", "test_vit"), ("resnet", "test_resnet")):
        DistillTrainer(recipe(folder / name, options, {"student": {"model": model}})).train()
    return folder


def by_hand(folder, size=719):
    """First five choices of an artefact on the held-out digits, one image at a time, through timm alone."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from kd_hf.data.views import decode

    network = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    source = open_source(DataConfig(path="builtin:digits"), "eval")
    rows = [source.read(row) for row in range(size)]
    with torch.no_grad():
        logits = torch.stack([network(transform(decode(data))[None])[0] for data, _ in rows])
    return logits.topk(5).indices, torch.tensor([label for _, label in rows])


def test_counts_equal_timm_by_hand(trained):
    ranked, label = by_hand(trained / "vit")
    other, _ = by_hand(trained / "resnet")
    values = evaluate_models([str(trained / "vit")], str(trained / "resnet"), DIGITS, batch_size=50, use_cpu=True)
    found = values[str(trained / "vit")]
    hits = ranked == label[:, None]
    assert found["samples"] == 719
    assert found["top1"] == pytest.approx(100 * hits[:, 0].double().mean().item())
    assert found["top5"] == pytest.approx(100 * hits.any(1).double().mean().item())
    assert found["agreement"] == pytest.approx(100 * (ranked[:, 0] == other[:, 0]).double().mean().item())
    assert "agreement" not in values[str(trained / "resnet")]
    assert 20 < found["top1"] < 100


def test_training_and_command_measure_the_same(trained, tmp_path):
    done = run(
        "kd_hf.eval", str(trained / "vit"), "--data", "builtin:digits", "--teacher", str(trained / "resnet"),
        "--max-samples", "64", "--use-cpu", "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "out.json").read_text())
    from kd_hf.callbacks import read_log

    logged = [line for line in read_log(trained / "vit") if "eval_top1" in line][-1]
    assert values[str(trained / "vit")]["top1"] == logged["eval_top1"]
    assert "top1" in done.stdout and "agreement" in done.stdout and str(trained / "vit") in done.stdout


def test_gate_measures_the_teacher_as_training_feeds_it(trained, tmp_path):
    """Wrong mean and std cost accuracy only in the pipeline, and the gate says so."""
    teacher = {"model": str(trained / "resnet"), "preprocessing": {"mean": [3.0, 3.0, 3.0], "std": [0.1, 0.1, 0.1]}}
    lines = []
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}}))
    trainer.say = lines.append
    trainer.train()
    text = "\n".join(lines)
    assert "in its own preprocessing" in text and "as training feeds it" in text
    assert "warning: teacher 'teacher' loses" in text


def test_gate_of_a_teacher_at_another_size(trained, tmp_path):
    teacher = {"model": str(trained / "resnet"), "image_size": 16}
    lines = []
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}}))
    trainer.say = lines.append
    trainer.train()
    assert any("(32 px)" in line and "(16 px)" in line for line in lines)


def test_gate_result():
    fine = GateResult("t", 200, own=80.0, fed=79.0, own_size=224, fed_size=224)
    fine.check(GateConfig(), 1000)
    assert fine.warning() is None
    assert GateResult("t", 200, own=80.0, fed=70.0, own_size=224, fed_size=160).warning() is not None
    with pytest.raises(UserError, match=r"below gate\.min_top1 = 85"):
        fine.check(GateConfig(min_top1=85), 1000)
    with pytest.raises(UserError, match="no better than guessing among 10 classes"):
        GateResult("t", 200, own=11.0, fed=11.0, own_size=224, fed_size=224).check(GateConfig(), 10)


def test_label_order_is_compared_by_name():
    handle = load_model("test_resnet", num_classes=3)
    handle.label_names = ("cat", "dog", "fox")
    check_label_order("t", handle, ("cat", "dog", "fox"))
    check_label_order("t", handle, ("a", "b", "c"))  # other words: nothing to compare
    with pytest.raises(UserError, match="class 0 is 'cat' for the teacher and 'dog' in the data"):
        check_label_order("t", handle, ("dog", "cat", "fox"))


def test_classes_that_do_not_fit_are_refused(tmp_path):
    save_student(load_model("test_resnet", num_classes=7), tmp_path / "seven")
    with pytest.raises(UserError, match=r"7 classes.*10"):
        evaluate_models([str(tmp_path / "seven")], None, DIGITS, use_cpu=True)


def test_teacher_is_run_once(trained, tmp_path):
    teacher = {"model": str(trained / "resnet"), "gate": {"enabled": False}}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}, "train": options}))
    calls = []
    model = trainer.teachers["teacher"].model
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    trainer.train()
    assert calls == [8, 128, 8, 8]  # one batch a step, and the evaluation images at the first evaluation only
