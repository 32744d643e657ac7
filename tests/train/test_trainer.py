"""The loop: exact resume, what is trained and saved, schedules, callbacks, failures."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import EarlyStoppingCallback, TrainerCallback

from kd_hf.errors import UserError
from kd_hf.models.load import load_model
from kd_hf.recipe.config import TrainConfig
from kd_hf.run.checkpoint import list_checkpoints, load_objects, read_state, step_of
from kd_hf.run.log import read_log
from kd_hf.train.chain import train_recipe
from kd_hf.train.trainer import DistillTrainer
from tests.runs import TEACHER, assert_same_tensors, final_tensors, merged, recipe

# everything that draws random numbers, and everything that has state
EVERYTHING = {
    "student": {"model": "test_resnet", "drop_path": 0.2},
    "teacher": TEACHER,
    "methods": {"mgd": {"weight": 0.01}, "kd": {"weight": {"warmup": [0, 1, "3 steps"]}}},
    "data": {"augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}},
    "train": {"max_steps": 5, "ema": {"decay": 0.9}, "max_grad_norm": 1.0, "weight_decay": 0.05},
}


class Kill(TrainerCallback):
    """Ends a run as a crash would, after `step` steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    DistillTrainer(recipe(folder, EVERYTHING)).train()
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_equal_to_the_bit(tmp_path, reference, workers):
    run = recipe(tmp_path, EVERYTHING, {"train": {"dataloader_num_workers": workers}})
    with pytest.raises(RuntimeError, match="killed"):
        DistillTrainer(run, callbacks=[Kill(3)]).train()
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [2]
    output = DistillTrainer(run).train()
    assert output.global_step == 5
    assert_same_tensors(final_tensors(tmp_path), final_tensors(reference))
    steps = [line["step"] for line in read_log(tmp_path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]  # what the lost steps had logged is forgotten


def test_log_is_the_same_after_resume(tmp_path, reference):
    run = recipe(tmp_path, EVERYTHING)
    with pytest.raises(RuntimeError, match="killed"):
        DistillTrainer(run, callbacks=[Kill(4)]).train()
    DistillTrainer(run).train()
    losses = [[line["loss"] for line in read_log(folder) if "loss" in line] for folder in (tmp_path, reference)]
    assert losses[0] == losses[1]


def test_teacher_is_not_trained_and_not_saved(tmp_path):
    trainer = DistillTrainer(recipe(tmp_path, EVERYTHING))
    before = {key: value.clone() for key, value in trainer.teachers["teacher"].model.state_dict().items()}
    trainer.train()
    teacher = trainer.teachers["teacher"]
    assert all(value.equal(before[key]) for key, value in teacher.model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.model.parameters())
    trained = {id(p) for group in trainer.trained.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in trainer.trained.plain.parameters()}
    assert not any("teacher" in key for key in final_tensors(tmp_path))


def test_every_parameter_gets_a_gradient_and_moves(tmp_path):
    trainer = DistillTrainer(recipe(tmp_path, EVERYTHING, {"train": {"max_steps": 2, "save_strategy": "no"}}))
    before = {name: value.detach().clone() for name, value in trainer.trained.plain.named_parameters()}
    trainer.train()
    still = [name for name, value in trainer.trained.plain.named_parameters() if value.equal(before[name])]
    assert not still


def test_teacher_mode_is_held(tmp_path):
    trainer = DistillTrainer(recipe(tmp_path, EVERYTHING))
    teacher = trainer.teachers["teacher"]
    pixels = torch.randn(4, 3, 32, 32)
    expected = teacher(pixels).logits
    teacher.model.train()
    assert teacher(pixels).logits.equal(expected)
    assert not teacher.model.network.training


def test_batch_stats_teacher_uses_them(tmp_path):
    run = recipe(tmp_path, EVERYTHING, {"teacher": {"mode": "batch_stats"}})
    teacher = DistillTrainer(run).teachers["teacher"]
    pixels = torch.randn(4, 3, 32, 32)
    assert not torch.allclose(teacher(pixels).logits[:2], teacher(pixels[:2]).logits)


def test_accumulation_equals_the_larger_batch(tmp_path):
    options = {"methods": {"kd": {"weight": 1.0}}, "teacher": TEACHER, "data": {"augment": {"mixup": 0.8}}}
    sgd = {"train": {"optim": "momentum", "learning_rate": 0.05}}
    whole = recipe(tmp_path / "whole", options, sgd, {"train": {"per_device_train_batch_size": 8}})
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    DistillTrainer(whole).train()
    DistillTrainer(recipe(tmp_path / "split", options, sgd, {"train": split})).train()
    left, right = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "split")
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=1e-5, atol=1e-6)


def test_weights_follow_their_schedule_and_a_paused_loss_is_not_computed(tmp_path):
    methods = {"task": {"weight": 0.5}, "kd": {"weight": {"warmup": [0, 1, "2 steps"]}, "until": "3 steps"}}
    DistillTrainer(recipe(tmp_path, {"teacher": TEACHER, "methods": methods})).train()
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert [line["weight/kd"] for line in lines] == [0, 0.5, 1, 0]
    assert ["kd/soft" in line for line in lines] == [False, True, True, False]
    for line in lines:
        expected = 0.5 * line["task/ce"] + line["weight/kd"] * line.get("kd/soft", 0.0)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_runs_only_while_a_loss_reads_it(tmp_path):
    methods = {"kd": {"weight": {"warmup": [0, 1, "2 steps"]}, "until": "3 steps"}}
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": TEACHER, "methods": methods, "eval": {"teacher": False}}))
    calls = []
    trainer.teachers["teacher"].model.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))
    trainer.train()
    assert calls == [1, 2]  # of the steps 0 to 3


def test_several_teachers(tmp_path):
    teachers = {"small": TEACHER, "other": merged(TEACHER, {"model": "test_efficientnet"})}
    methods = {"first": {"method": "kd", "teacher": "small"}, "second": {"method": "kd", "teacher": "other"}}
    DistillTrainer(recipe(tmp_path, {"teachers": teachers, "methods": methods})).train()
    last = [line for line in read_log(tmp_path) if "loss" in line][-1]
    assert last["first/soft"] != last["second/soft"]


def test_non_finite_loss_stops_with_its_part_and_keeps_the_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    next(trainer.trained.plain.methods["mgd"].parameters()).fill_(float("nan"))

    run = recipe(tmp_path, EVERYTHING, {"train": {"logging_steps": 2}})
    trainer = DistillTrainer(run, callbacks=[Poison()])
    with pytest.raises(UserError, match=r"'mgd/generation' became NaN or infinite at step 3.*checkpoint-2"):
        trainer.train()
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [step_of(path) for path in kept] == [2]
    assert all(value.isfinite().all() for value in final_tensors(tmp_path).values())


def test_early_stopping_callback_of_transformers(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 8}
    run = recipe(tmp_path, {"train": {**options, "learning_rate": 0.0}})
    output = DistillTrainer(run, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)]).train()
    assert output.global_step == 3  # a rate of 0 never improves on the first evaluation
    assert (tmp_path / "student" / "model.safetensors").is_file()
    again = DistillTrainer(run).train()
    assert again.metrics["eval_top1"] == output.metrics["eval_top1"]


def test_callbacks_see_every_event_in_order(tmp_path):
    class Recorder:
        def __init__(self) -> None:
            self.events: list[str] = []

        def __getattr__(self, name: str):
            if not name.startswith("on_"):
                raise AttributeError(name)
            return lambda *args, **kwargs: self.events.append(name)

    recorder = Recorder()
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    DistillTrainer(recipe(tmp_path, {"train": options}), callbacks=[recorder]).train()
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"]
    begin = ["on_init_end", "on_train_begin", "on_epoch_begin"]
    end = ["on_log", "on_evaluate", "on_save", "on_train_end"]
    assert recorder.events == [*begin, *step, *step, *end]


def test_best_weights_are_exported(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    options["learning_rate"] = 0.01
    trainer = DistillTrainer(recipe(tmp_path, {"train": options}))
    trainer.train()
    best = trainer.state.best_global_step
    assert best is not None
    saved = load_model(str(tmp_path), pretrained=True).network.state_dict()
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "checkpoints" / f"checkpoint-{best}" / "module.safetensors")
    assert all(kept[f"student.network.{key}"].equal(value) for key, value in saved.items())


def test_average_is_exported_and_both_are_measured(tmp_path):
    options = {"ema": {"decay": 0.5}, "eval_strategy": "steps", "eval_steps": 4}
    trainer = DistillTrainer(recipe(tmp_path, {"train": options}))
    output = trainer.train()
    assert {"eval_top1", "eval_raw_top1"} <= output.metrics.keys()
    saved = load_model(str(tmp_path), pretrained=True).network.state_dict()
    trained = final_tensors(tmp_path)
    assert all(trained[f"ema/network.{key}"].equal(value) for key, value in saved.items())
    assert not all(trained[f"module/student.network.{key}"].equal(value) for key, value in saved.items())
    assert_same_tensors(trainer.trained.plain.student.network.state_dict(), saved)


@pytest.mark.parametrize("start", ["initial_weights", "first_step"])
def test_where_the_average_starts(tmp_path, start):
    """Of plain SGD's weights, which differ at every step; the default is the definition, from the initial weights."""
    given = {} if start == "initial_weights" else {"start": start}
    options = {"ema": {"decay": 0.9, **given}, "optim": "momentum", "max_steps": 3, "eval_strategy": "no"}
    trainer = DistillTrainer(recipe(tmp_path, {"train": {**options, "gradient_accumulation_steps": 2}}))
    weight = next(trainer.parts.student.network.parameters())
    expected, feed = weight.detach().clone(), trainer.feed()
    for step in range(3):
        trainer.step(feed)
        trainer.state.global_step += 1
        copied = start == "first_step" and step == 0
        expected = weight.detach().clone() if copied else 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(next(trainer.trained.ema.module.parameters()), expected)


PAIRS = {
    "timm": (
        {"model": "deit_tiny_patch16_224", "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}},
        {"model": "convnext_atto", "kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}},
    ),
    "transformers": (
        {
            "model": "transformers/vit",
            "kwargs": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
                       "patch_size": 8},
        },
        {
            "model": "transformers/swin",
            "kwargs": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4},
        },
    ),
}  # fmt: skip
PAIRS["mixed"] = (PAIRS["transformers"][0], PAIRS["timm"][1])


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_both_libraries_train(tmp_path, name):
    student, teacher = PAIRS[name]
    teacher = merged(TEACHER, {"model": None, "kwargs": {}}, teacher)
    methods = {"kd": {"weight": 1.0}, "nkd": {"weight": 1.0}}
    options = {"student": student, "teacher": teacher, "methods": methods, "train": {"max_steps": 2}}
    run = recipe(tmp_path, options)
    trainer = DistillTrainer(run)
    before = {key: value.clone() for key, value in trainer.trained.plain.state_dict().items()}
    trainer.train()
    assert any(not value.equal(before[key]) for key, value in trainer.trained.plain.state_dict().items())
    network = load_model(str(tmp_path), pretrained=True).network
    pixels = torch.randn(2, 3, 32, 32)
    trainer.trained.plain.eval()
    found = network(pixels)
    found = found if isinstance(found, torch.Tensor) else found.logits
    assert found.equal(trainer.trained.plain.student(pixels).logits)


def test_distilled_heads(tmp_path):
    student = {"model": "deit_tiny_distilled_patch16_224", "kwargs": PAIRS["timm"][0]["kwargs"]}
    methods = {"task": {"weight": 0.5}, "deit_hard": {"weight": 0.5}}
    trainer = DistillTrainer(recipe(tmp_path, {"student": student, "teacher": TEACHER, "methods": methods}))
    before = trainer.trained.plain.student.network.head_dist.weight.detach().clone()
    trainer.train()
    assert not trainer.trained.plain.student.network.head_dist.weight.equal(before)


def test_bf16_is_close_to_fp32(tmp_path):
    options = {"teacher": TEACHER, "methods": {"mgd": {"weight": 0.01}, "kd": {}}, "student": {"model": "test_resnet"}}
    losses = {}
    for name, extra in (("fp32", {}), ("bf16", {"bf16": True})):
        run = recipe(tmp_path / name, options, {"train": {"max_steps": 1, **extra}})
        losses[name] = DistillTrainer(run).train().training_loss
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_gate_refuses_a_teacher_that_guesses(tmp_path):
    teacher = merged(TEACHER, {"gate": {"enabled": True, "samples": 200, "min_score": 60}})
    trainer = DistillTrainer(recipe(tmp_path, {"teacher": teacher, "methods": {"kd": {}}}))
    with pytest.raises(UserError, match=r"below gate\.min_score = 60"):
        trainer.train()
    assert not (tmp_path / "checkpoints").exists()


def test_finished_run_is_not_trained_again(tmp_path):
    run = recipe(tmp_path)
    DistillTrainer(run).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert DistillTrainer(run).train().global_step == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert DistillTrainer(run).train(resume_from_checkpoint=False).global_step == 4


def test_teacher_by_recipe_and_plain_twin_are_trained_first(tmp_path, monkeypatch):
    import yaml

    teacher = recipe(tmp_path / "teacher", {"train": {"max_steps": 2}})
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher.model_dump(mode="json", exclude_none=True)))
    options = {
        "teacher": {"recipe": str(tmp_path / "teacher.yaml"), "gate": {"enabled": False}},
        "baseline": "train",
        "methods": {"kd": {"weight": 1.0}},
        "data": {"num_labels": 50},
        "train": {"eval_strategy": "steps", "eval_steps": 4},
    }
    run = recipe(tmp_path / "run", options)
    train_recipe(run)
    assert (tmp_path / "teacher" / "student" / "config.json").is_file()
    plain = read_log(tmp_path / "run" / "plain")
    assert not any("kd/soft" in line for line in plain)
    assert any("kd/soft" in line for line in read_log(tmp_path / "run"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*")}
    train_recipe(run.model_copy(update={"train": run.train.model_copy(update={"output_dir": str(tmp_path / "b")})}))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher").rglob("*")} == times


def test_checkpoint_holds_no_pickled_objects(tmp_path):
    DistillTrainer(recipe(tmp_path, EVERYTHING)).train()
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert {path.suffix for path in last.iterdir()} == {".safetensors", ".pt", ".json"}
    assert load_objects(last, "optimizer")["state"]
    state = read_state(last)
    assert (state.step, state.processes) == (5, 1)


def test_tracker_gets_the_log_and_the_recipe(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    DistillTrainer(recipe(tmp_path, {"train": {"report_to": ["tensorboard"]}})).train()
    events = EventAccumulator(str(tmp_path / "kd_hf")).Reload()
    values = [event.value for event in events.Scalars("loss")]
    assert values == pytest.approx([line["loss"] for line in read_log(tmp_path) if "loss" in line])
    assert "train.learning_rate" in (tmp_path / "kd_hf").rglob("hparams.yml").__next__().read_text()


def test_own_code_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DistillTrainer(recipe(tmp_path, EVERYTHING, {"train": {"max_steps": 2}})).train()


class Overflows(torch.amp.GradScaler):
    """A scaler on a CPU whose first step has gradients that are not finite."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**126)


def test_steps_that_half_precision_overflows_are_counted_in_the_log(tmp_path):
    trainer = DistillTrainer(recipe(tmp_path))
    trainer.accelerator.scaler = Overflows()
    trainer.trained.optimizer = AcceleratedOptimizer(
        trainer.trained.optimizer.optimizer, device_placement=False, scaler=trainer.accelerator.scaler
    )
    trainer.accelerator._optimizers = [trainer.trained.optimizer]
    trainer.train()
    counts = [line.get("skipped_steps", 0) for line in read_log(tmp_path) if "loss" in line]
    assert counts == sorted(counts) and counts[0] == 1


@pytest.mark.parametrize(
    ("device", "options", "sharded", "expected"),
    [
        ("cuda", {"bf16": True}, False, True),
        ("cuda", {"fp16": True}, False, True),
        ("cuda", {}, False, False),
        ("cuda", {"bf16": True}, True, False),
        ("cuda", {"bf16": True, "channels_last": False}, False, False),
        ("cpu", {"bf16": True}, False, False),
        ("cpu", {"channels_last": True}, False, True),
    ],
)
def test_channels_last_by_default_on_gpus_in_half_precision(device, options, sharded, expected):
    assert TrainConfig(output_dir=".", **options).lies_channels_last(device, sharded) == expected
