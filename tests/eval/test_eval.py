"""Evaluation: exact numbers, the command line, the teacher beside the student, the gate's two measurements."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
import torch
from torch.nn import functional

from kd_hf.data.opening import open_source
from kd_hf.distillation.gate import check_label_order
from kd_hf.errors import UserError
from kd_hf.eval.__main__ import main
from kd_hf.eval.networks import evaluate_models
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.recipe.config import DataConfig, GateConfig, PreprocessingConfig
from kd_hf.run.log import read_log
from kd_hf.tasks.base import GateResult, guessing_top1
from kd_hf.train.trainer import DistillTrainer
from tests.forked import launch
from tests.runs import recipe

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
    """Logits, features and labels of an artefact on the held-out digits, one image at a time, through timm alone."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from kd_hf.data.views import decode

    network = timm.create_model(f"local-dir:{folder / 'student'}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    source = open_source(DataConfig(path="builtin:digits"), "eval")
    rows = [source.read(row) for row in range(size)]
    with torch.no_grad():
        features = [network.forward_features(transform(decode(data))[None]) for data, _ in rows]
        logits = torch.cat([network.forward_head(feature) for feature in features])
        features = torch.cat([network.forward_head(feature, pre_logits=True) for feature in features])
    return logits.double(), features.double(), torch.tensor([label for _, label in rows])


def test_numbers_equal_timm_by_hand(trained):
    logits, features, label = by_hand(trained / "vit")
    other, others_features, _ = by_hand(trained / "resnet")
    values = evaluate_models([str(trained / "vit")], str(trained / "resnet"), DIGITS, batch_size=50, use_cpu=True)
    found = values[str(trained / "vit")]
    hits = logits.topk(5).indices == label[:, None]
    assert found["samples"] == 719
    assert found["top1"] == pytest.approx(100 * hits[:, 0].double().mean().item())
    assert found["top5"] == pytest.approx(100 * hits.any(1).double().mean().item())
    assert found["nll"] == pytest.approx(functional.cross_entropy(logits, label).item(), rel=1e-5)
    assert found["agreement"] == pytest.approx(100 * (logits.argmax(1) == other.argmax(1)).double().mean().item())
    divergence = functional.kl_div(logits.log_softmax(1), other.softmax(1), reduction="batchmean")
    assert found["kl"] == pytest.approx(divergence.item(), rel=1e-4)
    x, y = features - features.mean(0), others_features - others_features.mean(0)
    cka = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found["cka"] == pytest.approx(cka.item(), rel=1e-4)
    assert not {"agreement", "kl", "cka"} & values[str(trained / "resnet")].keys()
    assert 20 < found["top1"] < 100
    assert found["images_per_second"] > 0


def test_training_and_command_measure_the_same(trained, tmp_path, capsys):
    options = ["--data", "builtin:digits", "--max-samples", "64", "--batch-size", "20", "--use-cpu"]
    assert main([str(trained / "vit"), *options, "--json", str(tmp_path / "one.json")]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("top-1 %", str(trained / "vit"), "indicative"))
    values = json.loads((tmp_path / "one.json").read_text())["builtin:digits"][str(trained / "vit")]
    logged = [line for line in read_log(trained / "vit") if "eval_top1" in line][-1]
    assert values["top1"] == logged["eval_top1"]
    probabilities = ("nll", "ece", "brier")
    assert [values[key] for key in probabilities] == pytest.approx([logged[f"eval_{key}"] for key in probabilities])


def test_two_processes_give_the_numbers_of_one(trained, tmp_path):
    """Their shares of the 65 images are 33 and 32, in padded batches of 20."""
    models = [str(trained / name) for name in ("vit", "resnet")]
    options = ["--data", "builtin:digits", "--teacher", models[1], "--batch-size", "20", "--max-samples", "65"]
    done = launch("kd_hf.eval", models[0], *options, "--use-cpu", "--json", str(tmp_path / "two.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreement %") == 1
    found = json.loads((tmp_path / "two.json").read_text())["builtin:digits"]
    expected = evaluate_models(models[:1], models[1], DIGITS, max_samples=65, use_cpu=True)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert numbers["samples"] == 65
        for key in numbers.keys() - {"images_per_second"}:
            assert found[name][key] == pytest.approx(numbers[key], rel=1e-5), key


def test_several_models_and_sets(trained, tmp_path, capsys):
    """Two sets, two models; a Markdown table; by class, the largest gain first."""
    folder = tmp_path / "one_class" / "validation" / "3"
    folder.mkdir(parents=True)
    source = open_source(DataConfig(path="builtin:digits"), "eval")
    threes = [source.read(int(row))[0] for row in (source.labels() == 3).nonzero()[0]]
    for index, image in enumerate(threes):
        (folder / f"{index}.png").write_bytes(image)
    names, sets = [str(trained / name) for name in ("resnet", "vit")], ["builtin:digits", str(tmp_path / "one_class")]
    options = ["--data", sets[0], "--data", sets[1], "--use-cpu", "--markdown", "--per-class", str(tmp_path / "c.csv")]
    assert main([*names, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| data | model | images | top-1 % | top-5 % | nll | ece % | brier | images/s |")
    assert [line.split(" | ")[2] for line in lines[2:6]] == ["719", "719", str(len(threes)), str(len(threes))]
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    digits = [row for row in rows if row["data"] == "builtin:digits"]
    gains = [float(row["gain"]) for row in digits]
    assert gains == sorted(gains, reverse=True)
    assert sum(int(row["images"]) for row in digits) == 719
    for row in digits:
        assert float(row["gain"]) == pytest.approx(float(row[names[1]]) - float(row[names[0]]), abs=0.011)
    # the folder's only class is the fourth of the networks, which know it by its name
    mine, whole = rows[-1], next(row for row in digits if row["class"] == "3")
    assert (mine["data"], mine["class"], mine[names[0]]) == (sets[1], "3", whole[names[0]])


def test_by_class_on_the_screen(trained, capsys):
    model = str(trained / "vit")
    assert main([model, "--data", "builtin:digits", "--max-samples", "50", "--use-cpu", "--per-class"]) == 0
    table = capsys.readouterr().out.split("builtin:digits, top-1 % by class")[1].split()
    assert table[:3] == ["class", "images", model]
    shares = [float(cell) for cell in table[8::3]]  # after the rule
    assert len(shares) == 10 and shares == sorted(shares, reverse=True)


def test_gate_measures_the_teacher_as_training_feeds_it(trained, tmp_path):
    """Wrong mean and std cost accuracy only in the pipeline, and the gate says so."""
    teacher = {"model": str(trained / "resnet"), "preprocessing": {"mean": [3.0, 3.0, 3.0], "std": [0.1, 0.1, 0.1]}}
    lines = []
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}}))
    trainer.journal.say = lambda *text: lines.extend(text)
    trainer.train()
    text = "\n".join(lines)
    assert "in its own preprocessing" in text and "as training feeds it" in text
    assert "warning: teacher 'teacher' loses" in text


def test_gate_of_a_teacher_at_another_size(trained, tmp_path):
    teacher = {"model": str(trained / "resnet"), "image_size": 16}
    lines = []
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}}))
    trainer.journal.say = lambda *text: lines.extend(text)
    trainer.train()
    assert any("(32 px)" in line and "(16 px)" in line for line in lines)


def test_gate_result():
    fine = GateResult("t", 200, own=80.0, fed=79.0, own_size=224, fed_size=224)
    fine.check(GateConfig())
    assert fine.warning() is None
    assert GateResult("t", 200, own=80.0, fed=70.0, own_size=224, fed_size=160).warning() is not None
    with pytest.raises(UserError, match=r"below gate\.min_score = 85"):
        fine.check(GateConfig(min_score=85))
    chance = guessing_top1(10, 200)
    assert 16 < chance < 17
    with pytest.raises(UserError, match=r"reaches top-1 11\.0 on 200 held-out images, no better than guessing"):
        GateResult("t", 200, own=11.0, fed=11.0, own_size=224, fed_size=224, guessing=chance).check(GateConfig())


def test_label_order_is_compared_by_name():
    handle = load_model("test_resnet", num_classes=3)
    handle.label_names = ("cat", "dog", "fox")
    check_label_order("t", handle, ("cat", "dog", "fox"))
    check_label_order("t", handle, ("a", "b", "c"))  # other words: nothing to compare
    with pytest.raises(UserError, match="class 0 is 'cat' for the teacher and 'dog' in the data"):
        check_label_order("t", handle, ("dog", "cat", "fox"))


def test_what_does_not_fit_is_one_line(trained, tmp_path):
    save_student(load_model("test_resnet", num_classes=7), tmp_path / "seven")
    save_student(load_model("test_resnet", num_classes=12), tmp_path / "twelve")
    with pytest.raises(UserError, match=r"7 classes.*10$"):
        evaluate_models([str(tmp_path / "seven")], None, DIGITS, use_cpu=True)
    with pytest.raises(UserError, match=r"12 classes.* add --label-indices"):
        evaluate_models([str(tmp_path / "twelve")], None, DIGITS, use_cpu=True)
    with pytest.raises(UserError, match=r"--teacher: .*twelve chooses among 12 classes and .*vit among 10"):
        evaluate_models([str(tmp_path / "twelve")], str(trained / "vit"), DIGITS, label_indices=True, use_cpu=True)
    with pytest.raises(UserError, match="imagenet-a needs a network that knows ImageNet's classes"):
        (tmp_path / "set" / "n01498041").mkdir(parents=True)
        (tmp_path / "set" / "n01498041" / "a.png").touch()
        main([str(trained / "vit"), "--data", f"imagenet-a={tmp_path / 'set'}", "--use-cpu"])
    (tmp_path / "photos" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--split: .* has no split 'tests'\. Known: train\.$"):
        main([str(trained / "vit"), "--data", str(tmp_path / "photos"), "--split", "tests"])
    with pytest.raises(UserError, match=r"^--label-column: there is no column 'fine'\. Known: image, label\.$"):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
        table.to_parquet(tmp_path / "tables" / "validation.parquet")
        main([str(trained / "vit"), "--data", str(tmp_path / "tables"), "--label-column", "fine", "--streaming"])
    with pytest.raises(UserError, match=r"^--data: the folder .* does not exist"):
        main([str(trained / "vit"), "--data", str(tmp_path / "nowhere")])


def test_choice_among_the_classes_of_a_benchmark(trained, tmp_path):
    """A network of 1000 classes on a drawn ImageNet-A, by hand: argmax over the logits of the 200 classes."""
    from importlib.resources import files

    from PIL import Image

    listed, every = (
        (files("timm.data") / "_info" / name).read_text().split()
        for name in ("imagenet_a_synsets.txt", "imagenet_synsets.txt")
    )
    columns = [every.index(synset) for synset in listed]
    handle = load_model("test_vit", num_classes=1000, preprocessing=PreprocessingConfig(crop_pct=1.0))
    save_student(handle, tmp_path / "model")
    tiles = torch.randint(256, (12, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value) for value in (handle.info.preprocessing.mean, handle.info.preprocessing.std))
    with torch.no_grad():
        logits = handle.network((tiles / 255 - mean).div(std).permute(0, 3, 1, 2))
    restricted = logits[:, columns]
    for index, choice in enumerate(restricted.argmax(1).tolist()):
        folder = tmp_path / "set" / listed[(choice + (index % 3 == 0)) % 200]  # a third of them is wrong
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiles[index].numpy()).save(folder / f"{index}.png")
    assert not set(logits.argmax(1).tolist()) <= set(columns)
    data = {"path": f"imagenet-a={tmp_path / 'set'}"}
    (values,) = evaluate_models([str(tmp_path / "model")], None, data, use_cpu=True).values()
    assert (values["samples"], values["top1"]) == (12, pytest.approx(100 * 8 / 12))


def test_teacher_is_run_once(trained, tmp_path):
    teacher = {"model": str(trained / "resnet"), "gate": {"enabled": False}}
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}, "train": options}))
    calls = []
    model = trainer.teachers["teacher"].model
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    trainer.train()
    assert calls == [8, 128, 8, 8]  # one batch a step, and the evaluation images at the first evaluation only
