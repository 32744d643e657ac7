"""A detector through the whole trainer: resume to the bit, two processes as one, the artefact, distillation."""

import json

import pytest
import torch

from kd_hf.detection.networks.load import load_detector
from kd_hf.draws import generator
from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.recipe.read import load_recipe, make_recipe
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.run.log import read_log
from kd_hf.tasks import open_task
from kd_hf.tasks.score import best_by
from kd_hf.train.trainer import DistillTrainer
from tests.detection.scenes import draw, write_parquet
from tests.forked import launch
from tests.runs import assert_same_tensors, final_tensors, merged, recipe_file
from tests.train.test_trainer import Kill

SIZES = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "num_queries": 6, "d_model": 64,
         "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "decoder_n_points": 2}  # fmt: skip
STUDENT = {**SIZES, "embed_dim": 8, "dropout": 0.1}
TEACHER = {**SIZES, "embed_dim": 16, "dropout": 0.0}
AUGMENT = {"sizes": [64], "eval_size": 64, "max_size": 128, "crop_sizes": [64], "crop_range": [40, 64]}


def same_size(index):
    """Two rectangles in an image of 96 × 64, so that no batch is filled up more than another."""
    draws = generator("same size", index)
    boxes = [[int(draws.integers(0, 50)), int(draws.integers(0, 30)), 40, 30] for _ in range(2)]
    return draw((96, 64), boxes, [index % 3, (index + 1) % 3])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set, and the folder of a teacher with random weights."""
    folder = tmp_path_factory.mktemp("detection")
    for split, start in (("train", 0), ("validation", 100)):
        write_parquet(folder / "scenes" / "data" / f"{split}-0.parquet", [same_size(start + i) for i in range(16)])
    torch.manual_seed(0)
    teacher = load_detector("kd_hf/vidt_nano", kwargs=TEACHER, num_classes=3)
    save_student(teacher, folder / "teacher")
    return folder


def blocks(world, **augment):
    """A short run that distils the teacher's tokens."""
    return {
        "student": {"model": "kd_hf/vidt_nano", "kwargs": STUDENT},
        "teacher": {"model": str(world / "teacher"), "gate": {"enabled": False}},
        "methods": {"vkd_tokens": {}},
        "data": {"path": str(world / "scenes"), "image_size": None, "augment": {"crop": {"kind": "random_resized"}},
                 "boxes": {"augment": {**AUGMENT, **augment}}},
        "train": {"max_steps": 4, "max_grad_norm": 0.1, "ema": {"decay": 0.9}},
    }  # fmt: skip


def run_of(world, folder, *more):
    return load_recipe(recipe_file(folder.with_suffix(".yaml"), folder, blocks(world), *more))


@pytest.fixture(scope="module")
def trained(world):
    folder = world / "run"
    output = DistillTrainer(run_of(world, folder)).train()
    return folder, output


def test_losses_and_average_precision_are_logged(trained):
    folder, output = trained
    assert {"eval_ap", "eval_ap50", "eval_teacher_ap", "eval_samples"} <= output.metrics.keys()
    line = next(line for line in read_log(folder) if "loss" in line)
    assert {"task/class", "task/bbox", "task/giou"} <= line.keys()
    assert any(key.startswith("vkd_tokens/") for key in line)


def test_resume_is_equal_to_the_bit(world, trained, tmp_path):
    run = run_of(world, tmp_path / "run", {"train": {"dataloader_num_workers": 1}})
    with pytest.raises(RuntimeError, match="killed"):
        DistillTrainer(run, callbacks=[Kill(3)]).train()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    DistillTrainer(run).train()
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(trained[0]))


def test_two_processes_are_one(world, tmp_path):
    """Without crops, so that the images of a batch are filled up alike; without dropout, which each process draws."""
    plain = {
        "student": {"kwargs": {"dropout": 0.0}},
        "data": {"boxes": {"augment": {"crop": 0.0}}},
        "methods": {"vkd_tokens": False},
    }
    one = load_recipe(recipe_file(tmp_path / "one.yaml", tmp_path / "one", blocks(world), plain))
    DistillTrainer(one).train()
    half = {"train": {"per_device_train_batch_size": 4}}
    done = launch("kd_hf.train", str(recipe_file(tmp_path / "two.yaml", tmp_path / "two", blocks(world), plain, half)))
    assert done.returncode == 0, done.stderr
    lines = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)
    found, expected = final_tensors(tmp_path / "two"), final_tensors(tmp_path / "one")
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=2e-4), key
    precision = [read_log(tmp_path / name)[-1]["eval_ap"] for name in ("one", "two")]
    assert precision[0] == pytest.approx(precision[1], abs=0.5)


def test_the_artefact_is_a_detector_of_transformers(trained):
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    folder = trained[0] / "student"
    network = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True).eval()
    again = load_detector(str(trained[0]), pretrained=True).network
    state = network.state_dict()
    assert all(value.equal(state[key]) for key, value in again.state_dict().items())
    assert network.config.id2label == {0: "red", 1: "green", 2: "blue"}
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixels = processor(same_size(3).image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 96)
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"]["shortest_edge"] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"kd": {}}}, r"unknown method 'kd'.*detr_kd"),
        ({"student": {"num_classes": 7}}, r"student\.num_classes is 7.*3 classes"),
        ({"student": {"model": "test_resnet", "kwargs": {}}}, "test_resnet"),
        ({"data": {"image_size": 64}}, r"data\.image_size: not for images with boxes"),
        ({"teacher": {"gate": {"enabled": True}}}, "reaches AP .* no better than guessing"),
    ],
)
def test_mistakes(world, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        DistillTrainer(run_of(world, tmp_path / "run", change)).train()


def test_predict_is_for_classifiers(world, tmp_path):
    trainer = DistillTrainer(run_of(world, tmp_path / "run", {"teacher": None, "methods": {"vkd_tokens": False}}))
    with pytest.raises(UserError, match="predict and compute_metrics are for classifiers"):
        trainer.predict(trainer.eval_source)


def test_a_recipe_of_boxes_is_measured_by_average_precision():
    values = merged({"student": {"model": "x"}, "data": {"path": "x", "boxes": {}}, "train": {"output_dir": "x"}})
    for boxes, metric in (({}, "eval_ap"), (None, "eval_top1")):
        values["data"]["boxes"] = boxes
        made = make_recipe(values, "here")
        assert best_by(made.train, open_task(made).score) == (metric, True)
