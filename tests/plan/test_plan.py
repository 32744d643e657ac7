import json

import pytest
import torch

from kd_hf.distillation.assembly import assemble
from kd_hf.plan import __main__ as plan_command
from kd_hf.plan.describe import describe, plan_recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.resolved import recipe_hash
from kd_hf.run.log import JsonLines
from tests.detection.runs import MODEL, SIZES, detection_recipe
from tests.programs import plan_recipes
from tests.runs import ROOT, TEACHER, recipe, recipe_file

DISTILLED = {
    "student": {"model": "test_vit", "num_classes": 10},
    "teacher": {"model": "test_vit", "num_classes": 10},
    "methods": {"mgd": {"until": "0.9"}, "kd": {"weight": {"warmup": [0, 1, "2 epochs"]}, "temperature": 4}},
    "data": {"augment": {"mixup": 0.8, "erasing": 0.25}},
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    run = recipe(tmp_path_factory.mktemp("run"), DISTILLED)
    return run, plan_recipe(run, processes=3)


def test_numbers_are_those_of_the_built_networks(planned):
    run, plan = planned
    plain = run.teacher.model_copy(update={"pretrained": False})
    parts = assemble(run.model_copy(update={"teacher": plain}), 10)
    assert plan["trained_parameters"] == sum(p.numel() for p in parts.module.parameters())
    for name, model in (("student", parts.student), ("teacher", parts.teachers["teacher"])):
        assert plan["networks"][name]["parameters"] == sum(p.numel() for p in model.network.parameters())
        assert plan["networks"][name]["taps"] == {"stage:-1": [64, 2, 2]}
    own = sum(p.numel() for p in parts.module.methods["mgd"].parameters())
    assert plan["methods"]["mgd"]["parameters"] == own > 0
    with torch.no_grad():
        taps = parts.module.student(torch.zeros(1, 3, 32, 32)).taps
    assert list(taps["stage:-1"].shape[1:]) == plan["networks"]["student"]["taps"]["stage:-1"]


def test_what_a_launch_will_do(planned):
    run, plan = planned
    assert plan["global_batch"] == 3 * 8
    assert plan["recipe_hash"] == recipe_hash(run)
    assert plan["length"] == "4 steps, 44 an epoch, 0.09091 epochs"
    assert plan["methods"].keys() == {"task", "mgd", "kd"}
    assert plan["methods"]["mgd"]["until"] == "0.9"
    assert plan["methods"]["kd"]["weight"]["warmup"] == [0, 1, "2 epochs"]
    assert plan["methods"]["kd"]["options"] == {"temperature": 4.0, "logit_std": False}
    assert {"mixup", "erasing"} <= set(plan["augmentation"])
    assert "auto_augment" not in plan["augmentation"]


def test_a_plan_is_plain_json_and_text(planned):
    _, plan = planned
    assert json.loads(json.dumps(plan)) == plan
    text = describe(plan)
    for part in ("test_vit", "tap stage:-1 [64, 2, 2]", "kd ×", "temperature 4", "24 images a step", "until 0.9"):
        assert part in text, text


def test_a_loss_that_mixes_images_is_pointed_out(tmp_path):
    plan = plan_recipe(recipe(tmp_path))
    assert plan["batch_coupled"] == []
    assert "coupled" not in describe(plan)
    both = describe({**plan, "batch_coupled": ["some_loss", "other"], "gathered": ["other"]})
    assert "coupled    some_loss: this loss mixes the images of one process's batch" in both
    assert "coupled    other: this loss mixes the images of all processes" in both


def test_weights_are_neither_needed_nor_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    plan = plan_recipe(recipe(tmp_path, {"teacher": {"model": "timm/vit_base_patch16_224.augreg_in1k"}}))
    assert plan["networks"]["teacher"]["parameters"] > 80e6


def test_the_command_prints_text_json_or_the_schema(tmp_path, capsys):
    path = str(recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", DISTILLED))
    assert plan_command.main([path, "train.seed=5"]) == 0
    assert capsys.readouterr().out.startswith(f"recipe {recipe_hash(load_recipe(path, ['train.seed=5']))}\n")
    assert plan_command.main([path, "--json", "--processes", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["global_batch"] == 16
    assert plan_command.main(["--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "kd_hf recipe"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("classes", "assumed"), [(10, False), (None, True)])
def test_a_head_that_only_the_data_knows_is_pointed_out(tmp_path, classes, assumed):
    plan = plan_recipe(recipe(tmp_path, {"student": {"num_classes": classes}}))
    assert plan["networks"]["student"]["classes"] == (classes or 1000)
    assert ("1000 classes assumed" in describe(plan)) is assumed


def test_a_teacher_that_is_trained_first_is_planned_as_its_recipe_says(capsys):
    plan = plan_recipe(load_recipe(ROOT / "recipes" / "quickstart.yaml"))
    assert plan["networks"]["teacher"]["model"] == "test_resnet"
    assert plan["networks"]["student"]["model"] == "test_efficientnet"


def test_the_gate_and_what_it_measured(tmp_path):
    teacher = {**TEACHER, "gate": {"min_score": 60, "samples": 100}}
    run = recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}})
    assert "must reach top-1 at least 60 on 100 held-out images" in describe(plan_recipe(run))
    JsonLines(tmp_path, 0).write({"step": 0, "gate": "teacher", "top1": 71.25, "top1_as_fed": 70.0})
    plan = plan_recipe(run)
    assert plan["gates"]["teacher"]["measured"] == 71.25
    assert "it reached 71.2 (70.0 as training feeds it)" in describe(plan)
    off = recipe(tmp_path, {"teacher": {**TEACHER, "gate": {"enabled": False}}, "methods": {"kd": {}}})
    assert "teacher is not measured" in describe(plan_recipe(off))


def test_a_detector_is_planned_by_its_shortest_side_and_precision(tmp_path):
    teacher = {"model": MODEL, "kwargs": SIZES, "pretrained": False, "num_classes": 3, "gate": {"min_score": 20}}
    plan = plan_recipe(detection_recipe(tmp_path, {"teacher": teacher, "student": {"num_classes": 3}}))
    assert plan["networks"]["student"]["shortest_side"] == 64 and "image_size" not in plan["networks"]["student"]
    assert plan["augmentation"] == ["flip"]
    assert plan["warnings"] == ["no method reads the teacher"]
    assert "at 64 px shortest side, teacher" in plan_recipes.describe(plan)
    assert "3 classes, 64 px shortest side" in describe(plan) and "random     flip\n" in describe(plan)
    assert "teacher must reach AP at least 20 on 256 held-out images" in describe(plan)
    JsonLines(tmp_path, 0).write({"step": 0, "gate": "teacher", "ap": 31.25, "ap_as_fed": 30.0})
    gate = plan_recipe(detection_recipe(tmp_path, {"teacher": teacher, "student": {"num_classes": 3}}))["gates"]
    assert (gate["teacher"]["measured"], gate["teacher"]["measured_as_fed"]) == (31.25, 30.0)
