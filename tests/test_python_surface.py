"""The trainer as Python sees it: ordinary networks and data sets in, an ordinary model out."""

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from transformers import EarlyStoppingCallback, TrainerCallback, ViTConfig, ViTForImageClassification
from transformers.integrations import TensorBoardCallback

from kd_hf import DistillTrainer, TrainConfig, UserError, load_model
from kd_hf.data.digits import DigitsSource
from kd_hf.metrics.hf import TopAccuracy
from kd_hf.run.log import read_log
from kd_hf.run.record import RunRecord

NAMES = [f"digit {index}" for index in range(10)]
ARGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "use_cpu": True,
    "cpu_threads": 1,
}
DATA = {"image_size": 32, "augment": {"crop": {"kind": "pad"}}}
VIT = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def table(split, rows, with_label=True):
    """Handwritten digits as an ordinary data set of the datasets library."""
    source = DigitsSource(split)
    images = [{"bytes": source.read(row)[0], "path": None} for row in range(rows)]
    columns = {"picture": images, "digit": [source.read(row)[1] for row in range(rows)]}
    features = Features({"picture": Image(), "digit": ClassLabel(names=NAMES)})
    dataset = Dataset.from_dict(columns, features=features)
    return dataset if with_label else dataset.remove_columns("digit")


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10)


def vit():
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**VIT, intermediate_size=64, num_labels=10))


def trainer(folder, student=None, **changes):
    """A trainer over networks and data sets made here."""
    given = {
        "teacher": resnet(),
        "methods": {"task": 0.5, "kd": {"weight": 0.5, "temperature": 2}},
        "args": {**ARGS, "output_dir": str(folder)},
        "train_dataset": table("train", 64),
        "eval_dataset": table("eval", 50),
        "data": DATA,
        "eval": {"report": False},
    }
    return DistillTrainer(student or resnet(), **{**given, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student of transformers, evaluated and saved twice, with callbacks of transformers and metrics of a user."""
    folder = tmp_path_factory.mktemp("python") / "run"
    callbacks = [TensorBoardCallback, EarlyStoppingCallback(early_stopping_patience=3)]
    args = {**ARGS, "output_dir": str(folder), "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    args |= {"save_steps": 2, "load_best_model_at_end": True}
    made = trainer(
        folder, vit(), teacher=None, methods=None, args=args, callbacks=callbacks, compute_metrics=own_metrics
    )
    return made, made.train(), folder


def own_metrics(prediction):
    """As a user writes it, with a metric of this package and one of his own."""
    chosen = prediction.predictions.argmax(-1)
    found = TopAccuracy().compute(predictions=chosen, references=prediction.label_ids)
    return {"own_top1": found["top1"], "rows": float(len(chosen))}


def test_a_student_of_transformers_becomes_a_model_of_transformers(trained):
    _, output, folder = trained
    assert output.global_step == 4
    again = ViTForImageClassification.from_pretrained(folder / "student")
    assert again.config.id2label[3] == "digit 3"
    record = RunRecord.read(folder)
    assert record.networks["student"].library == "transformers"
    assert "64 images" in record.start["data"]["train"]
    assert (folder / "student" / "README.md").is_file()


def test_metrics_of_the_user_are_logged_beside_ours(trained):
    _, output, folder = trained
    assert output.metrics["eval_rows"] == 50
    assert output.metrics["eval_own_top1"] == pytest.approx(output.metrics["eval_top1"])
    assert [line["eval_rows"] for line in read_log(folder) if "eval_rows" in line] == [50, 50]


def test_a_tracker_callback_of_transformers_writes_its_files(trained):
    _, _, folder = trained
    assert list(folder.rglob("events.out.tfevents.*"))


def test_predict_gives_logits_in_the_order_of_the_images(trained):
    made, _, _ = trained
    test = table("eval", 50).select(range(49, 9, -1))
    predictions, labels, metrics = made.predict(test)
    assert predictions.shape == (40, 10)
    assert labels.tolist() == test["digit"]
    assert metrics["test_top1"] == pytest.approx(100 * (predictions.argmax(1) == labels).mean())
    assert metrics["test_rows"] == 40
    assert made.predict(test.select([3])).predictions[0] == pytest.approx(predictions[3], abs=1e-5)


def test_networks_are_measured_at_the_size_they_are_trained_at(tmp_path):
    made = trainer(tmp_path / "run")
    sizes = [
        made.parts.student.info.preprocessing,
        made.teachers["teacher"].info.preprocessing,
        *made.parts.views().values(),
    ]
    assert {facts.image_size for facts in sizes} == {32}
    assert made.teachers["teacher"].info.native.image_size == 32  # it may have been trained here


def test_another_data_set_is_measured_without_touching_the_best(trained):
    made, _, _ = trained
    before = made.state.best_metric
    metrics = made.evaluate(table("eval", 20), metric_key_prefix="other")
    assert metrics["other_samples"] == 20
    assert made.state.best_metric == before


def test_the_card_can_be_written_again_with_another_license(trained):
    made, _, folder = trained
    made.create_model_card(license="mit", tags=["handwriting"])
    text = (folder / "student" / "README.md").read_text()
    assert "license: mit" in text
    assert "- handwriting" in text


def test_callbacks_come_and_go_and_see_the_live_objects(tmp_path):
    class Watcher(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            gradient = next(model.parameters()).grad
            self.seen.append((state.global_step, gradient is not None, type(optimizer).__name__))

    watcher, student = Watcher(), resnet()
    made = trainer(tmp_path / "run", student, teacher=None, methods=None, callbacks=[Watcher])
    made.remove_callback(Watcher)
    made.add_callback(watcher)
    made.train()
    assert watcher.seen == [(step, True, "AcceleratedOptimizer") for step in range(4)]
    # the very network that was handed over was trained
    saved = load_model(str(tmp_path / "run"), pretrained=True).network.state_dict()
    assert all(value.equal(saved[key]) for key, value in student.state_dict().items())


def test_teacher_and_student_may_be_any_torch_classifier(tmp_path):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(3, 8, 8, 8)
            self.head = torch.nn.Linear(8, 10)

        def forward(self, pixels):
            return self.head(self.body(pixels).relu().mean((2, 3)))

    unlabelled = table("train", 64, with_label=False)
    with pytest.raises(UserError, match="class"):
        trainer(tmp_path / "none", Small(), train_dataset=unlabelled)
    teachers = {"a": Small(), "b": vit()}
    methods = {"one": {"method": "kd", "teacher": "a"}, "two": {"method": "dkd", "teacher": "b", "weight": 0.25}}
    built_in = {"eval_dataset": None, "data": {**DATA, "path": "builtin:digits"}}
    made = trainer(tmp_path / "run", Small(), teacher=teachers, methods=methods, **built_in)
    assert set(made.teachers) == {"a", "b"}
    losses = dict(made.weights(0))
    assert losses == {"task": 1.0, "one": 0.5, "two": 0.25}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": {"learning_rte": 1}}, r"DistillTrainer: .*learning_rte.*Did you mean 'learning_rate'"),
        ({"methods": ["kdd"]}, r"unknown method 'kdd'.*'kd'"),
        ({"data": {"augment": {"mixupp": 1}}}, "mixupp.*Did you mean 'mixup'"),
        ({"train_dataset": None}, "train_dataset: give a datasets.Dataset"),
        ({"args": object()}, "args: object cannot say"),
        ({"args": {**ARGS, "push_to_hub": "perhaps"}}, "hub.push_to_hub"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_recipe_says_everything_itself(tmp_path):
    from tests.runs import recipe

    with pytest.raises(UserError, match="a recipe says all"):
        DistillTrainer(recipe(tmp_path), methods=["kd"])


def test_settings_may_be_an_object_or_a_folder(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), learning_rate=0.25, **{**ARGS, "max_steps": 2})
    made = trainer(tmp_path, args=config, teacher=None, methods=None)
    assert made.args.learning_rate == 0.25
    assert made.recipe.student.model == "given:test_resnet"
    assert trainer(tmp_path, args=str(tmp_path / "x"), teacher=None, methods=None).args.output_dir == str(
        tmp_path / "x"
    )


def test_a_picture_and_label_pair_is_enough(tmp_path):
    class Pairs:
        classes = ("dark", "light")

        def __len__(self):
            return 32

        def __getitem__(self, index):
            return Picture.fromarray(np.full((32, 32, 3), 200 * (index % 2) + 20, dtype=np.uint8)), index % 2

    student = timm.create_model("test_resnet", num_classes=2)
    made = trainer(tmp_path / "run", student, teacher=None, methods=None, train_dataset=Pairs(), eval_dataset=Pairs())
    assert made.train().metrics["eval_samples"] == 32
