"""What a user can get wrong ends in one line that names the place, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from kd_hf.errors import LocalError, run_command
from kd_hf.eval import __main__ as eval_command
from kd_hf.plan import __main__ as plan_command
from kd_hf.train import __main__ as train_command
from tests.runs import run

RECIPE = """\
base: base.yaml
student: {model: test_resnet}
teacher: {model: test_resnet, pretrained: false, num_classes: 10, gate: {enabled: false, samples: 64}}
methods:
  kd: {temperature: 4.0}
data:
  path: builtin:digits
  image_size: 32
train:
  max_steps: 2
  optim: adamw
"""
BASE = """\
train:
  output_dir: OUT
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 64
  eval_strategy: 'no'
  save_strategy: steps
  save_steps: 1
  use_cpu: true
  cpu_threads: 1
  disable_tqdm: true
eval: {max_samples: 16}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with ``recipe.yaml`` over ``base.yaml``; runs go to ``out``."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def write(folder, old="", new=""):
    """The recipe with `old` replaced by `new`."""
    assert old in RECIPE
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new) if old else RECIPE)
    (folder / "base.yaml").write_text(BASE.replace("OUT", str(folder / "out")))


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Runs a command in this process and returns the one line it must end with."""

    def call(command, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        with pytest.raises(SystemExit) as exit_:
            run_command(command.main)
        error = capsys.readouterr().err
        assert exit_.value.code == 2
        return one_line(error)

    return call


def one_line(stderr):
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("kd_hf: error: ")
    assert "Traceback" not in stderr
    return lines[0]


# what is written in a file: replaced text, and what the message must contain
WRITTEN = {
    "invalid YAML": ("{temperature: 4.0}", "{temperature: 4.0", ["recipe.yaml:6: not valid YAML"]),
    "foreign tag": ("4.0", "!!python/name:os.system x", ["recipe.yaml:5: not valid YAML"]),
    "tag that does not fit": ("4.0", "!!int four", ["recipe.yaml:5: not valid YAML"]),
    "key that is no word": ("temperature: 4.0", "[a]: 4.0", ["recipe.yaml:5: a key must be a single word"]),
    "alias within itself": ("{temperature: 4.0}", "&a {b: *a}", ["recipe.yaml: not valid YAML", "itself"]),
    "not a mapping": (RECIPE, "- a\n- b\n", ["recipe.yaml: a recipe is a mapping of blocks"]),
    "unknown block": ("methods:", "metods:", ["recipe.yaml:4: unknown key 'metods'", "'methods'"]),
    "unknown key": ("image_size", "image_sise", ["recipe.yaml:8: unknown key 'data.image_sise'", "'image_size'"]),
    "misspelt required key": ("{model: test_resnet}", "{modle: x}", ["recipe.yaml:2: unknown key", "'model'"]),
    "unknown key two deep": ("samples", "sampels", ["recipe.yaml:3: unknown key 'teacher.gate.sampels'", "'samples'"]),
    "unknown method": ("  kd:", "  dk:", ["recipe.yaml:5: unknown method 'dk'", "Did you mean"]),
    "unknown option": ("temperature", "temprature", ["recipe.yaml:5: unknown key 'methods.kd.temp", "'temperature'"]),
    "option out of range": ("4.0", "-4", ["recipe.yaml:5: methods.kd.temperature", "greater than 0", "-4"]),
    "wrong type": ("max_steps: 2", "max_steps: two", ["recipe.yaml:10: train.max_steps", "integer", "'two'"]),
    "wrong choice": ("optim: adamw", "eval_strategy: epok", ["recipe.yaml:11: train.eval_strategy", "'epoch'?"]),
    "block expected": ("{model: test_resnet}", "test_resnet", ["recipe.yaml:2: student", "block", "'test_resnet'"]),
    "missing key": ("{model: test_resnet}", "{pretrained: false}", ["recipe.yaml:2: 'student.model' is missing"]),
    "missing block": ("student: {model: test_resnet}", "", ["recipe.yaml: 'student' is missing"]),
    "missing base": ("base.yaml", "bass.yaml", ["recipe.yaml:1: base: no file 'bass.yaml'", "'base.yaml'"]),
    "base is not a list": ("base.yaml", "{a: b}", ["recipe.yaml:1: `base` is a list"]),
    "base loop": ("base.yaml", "recipe.yaml", ["recipe.yaml:1: `base:`", "include each other", "→ recipe.yaml"]),
    "duplicate key": ("optim: adamw", "max_steps: 3", ["recipe.yaml:11: 'train.max_steps' is written twice"]),
    "bad duration": ("optim: adamw", "warmup_steps: 5 weeks", ["recipe.yaml:11: train.warmup_steps", "'5 epochs'"]),
    "half a strategy": ("optim: adamw", "eval_strategy: steps", ["recipe.yaml:9: train", "`eval_steps`"]),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_mistakes_in_a_file(folder, complaint, case):
    old, new, wanted = WRITTEN[case]
    write(folder, old, new)
    line = complaint(train_command, "recipe.yaml")
    assert all(part in line for part in wanted), line
    assert not (folder / "out").exists()


def test_missing_recipe_names_the_nearest_file(folder, complaint):
    line = complaint(train_command, "recipee.yaml")
    assert "'recipee.yaml'" in line
    assert "Did you mean 'recipe.yaml'?" in line


# what is written on the command line: overrides, and what the message must contain
OVERRIDDEN = {
    "malformed": (["train.max_steps:3"], ["'train.max_steps:3'", "block.key=value"]),
    "into nowhere": (["trian.max_steps=3"], ["override 'trian.max_steps=3': unknown key 'trian'", "'train'"]),
    "below a value": (["train.max_steps.x=3"], ["override 'train.max_steps.x=3': train.max_steps"]),
    "not YAML": (["train.seed=["], ["override 'train.seed=['", "not valid YAML"]),
    "architecture": (["student.model=test_resnett"], ["'test_resnett'", "Did you mean 'test_resnet'?"]),
    "model kwargs": (["student.kwargs={widht: 3}"], ["kwargs.widht", "test_resnet"]),
    "data folder": (["data.path=./photo"], ["data.path", "'./photo'", "Did you mean 'photos'?"]),
    "no class folders": (["data.path=./photos"], ["data.path", "no class folders", "<class>"]),
    "Parquet columns": (
        ["data.path=./table", "data.streaming=true"],
        ["data.image_column", "name one of", "picture", "kind"],
    ),
    "built-in data": (["data.path=builtin:digit"], ["data.path", "Did you mean 'builtin:digits'?"]),
    "optimiser": (["train.optim=adammw"], ["train.optim", "Did you mean 'adamw'?"]),
    "optimiser argument": (["train.optim_args={betaz: [0.9]}"], ["train.optim_args", "betaz"]),
    "optimiser value": (["train.optim_args={betas: [0.9, 2.0]}"], ["train.optim_args", "beta"]),
    "tap": (["methods.mgd.student_tap=stage:9"], ["tap 'stage:9'", "test_resnet", "stage:1"]),
    "teacher's classes": (["teacher.num_classes=7"], ["methods.kd", "7 classes", "10"]),
    "student's classes": (
        ["student.num_classes=7", "methods.kd=false", "teacher="],
        ["student.num_classes", "7", "10"],
    ),
    "no teacher": (["teacher="], ["methods.kd needs a teacher", "`teacher:`"]),
    "batch too large": (["train.per_device_train_batch_size=5000"], ["batch", "5000", "1078"]),
    "index labels": (["methods.dkd={}", "data.augment.mixup=0.8"], ["methods.dkd", "data.augment", "mixup"]),
    "every weight 0": (["methods.kd.weight=0", "methods.task.weight=0"], ["methods", "every weight is 0"]),
    "too many labels": (["data.num_labels=5000"], ["data.num_labels", "5000", "1078"]),
    "resume nothing": (["train.resume_from_checkpoint=true"], ["train.resume_from_checkpoint", "no checkpoint"]),
    "fp16 on a CPU": (["train.fp16=true"], ["train.fp16", "GPU", "train.bf16"]),
    "tracker": (["train.report_to=[tensorbord]"], ["train.report_to", "Did you mean 'tensorboard'?"]),
}


@pytest.mark.parametrize("case", OVERRIDDEN)
def test_mistakes_in_overrides_leave_no_folder(folder, complaint, case):
    (folder / "photos" / "train").mkdir(parents=True)
    (folder / "photos" / "val").mkdir()
    write_table(folder / "table" / "train.parquet")
    overrides, wanted = OVERRIDDEN[case]
    line = complaint(train_command, "recipe.yaml", *overrides)
    assert all(part in line for part in wanted), line
    assert not (folder / "out").exists()


def test_odd_batch_with_mixing(folder, complaint):
    options = ["train.per_device_train_batch_size=7", "data.augment.mixup=0.8"]
    line = complaint(train_command, "recipe.yaml", *options)
    assert "train.per_device_train_batch_size: 7 is odd" in line
    assert "mixup" in line
    assert nothing_trained(folder / "out")


def nothing_trained(folder):
    return not any((folder / name).exists() for name in ("checkpoints", "student", "report"))


def write_table(path):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"picture": ["a.png"], "kind": [1]}), path)


def test_teacher_below_its_gate_leaves_nothing_trained(folder, complaint):
    gate = ["teacher.gate.enabled=true", "teacher.gate.min_score=99.5"]
    line = complaint(train_command, "recipe.yaml", *gate)
    assert "'teacher'" in line
    assert "gate.min_score = 99.5" in line
    assert nothing_trained(folder / "out")


def test_file_in_the_way_of_the_run_folder(folder, complaint):
    (folder / "taken").write_text("mine")
    line = complaint(train_command, "recipe.yaml", "train.output_dir=taken")
    assert "cannot write" in line
    assert "taken" in line
    assert (folder / "taken").read_text() == "mine"


def write_images(root, classes, broken=0):
    """Class folders of 8 pictures each for training and 2 for evaluation; `broken` of the former are not images."""
    import numpy as np
    from PIL import Image

    for split, count in (("train", 8), ("val", 2)):
        for label in range(classes):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(np.full((32, 32, 3), 20 * label, np.uint8)).save(place / f"{index}.png")
    for index in range(broken):
        (root / "train" / "class0" / f"{index}.png").write_bytes(b"no picture")


def test_more_unreadable_images_than_allowed(folder, complaint):
    write_images(folder / "images", classes=2, broken=6)
    options = ["teacher=", "methods.kd=false", "data.path=./images", "data.max_corrupt=1", "train.save_strategy=no"]
    line = complaint(train_command, "recipe.yaml", *options, "train.max_steps=4")
    assert "data.max_corrupt = 1" in line
    assert "images" in line
    assert nothing_trained(folder / "out")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of two steps; copied by those who break it."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder)
    assert train_command.main([str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture
def unfinished(trained, tmp_path, monkeypatch):
    """The same run, as if it had been stopped before the end."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    shutil.rmtree(tmp_path / "out" / "student")
    return tmp_path


def test_run_folder_of_another_recipe(unfinished, complaint):
    before = snapshot(unfinished / "out")
    line = complaint(train_command, "recipe.yaml", "train.learning_rate=0.5")
    assert "belongs to another run: train.learning_rate was 0.0005 and is 0.5;" in line
    assert "train.output_dir" in line
    assert snapshot(unfinished / "out") == before


def test_changed_global_batch(unfinished, complaint):
    before = snapshot(unfinished / "out")
    line = complaint(train_command, "recipe.yaml", "train.per_device_train_batch_size=8")
    assert "a step took 4 images and takes 8" in line
    assert "gradient_accumulation_steps" in line
    assert snapshot(unfinished / "out") == before


def test_damaged_checkpoint(unfinished, complaint):
    for damaged in (unfinished / "out" / "checkpoints").glob("*/module.safetensors"):
        damaged.write_bytes(damaged.read_bytes()[:-1])
    line = complaint(train_command, "recipe.yaml")
    assert "checkpoint-2 is damaged: module.safetensors has another size" in line
    assert "checkpoint-1 is damaged" in line and line.endswith("start over with train.resume_from_checkpoint=false")


def snapshot(folder):
    """Every file with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_evaluating_on_other_classes(trained, tmp_path, complaint):
    write_images(tmp_path / "images", classes=3)
    line = complaint(eval_command, str(trained / "out"), "--data", str(tmp_path / "images"), "--use-cpu")
    assert str(trained / "out") in line
    assert "10 classes" in line
    assert "has 3" in line


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["test_resnett", "--data", "builtin:digits"], ["test_resnett", "Did you mean 'test_resnet'?"]),
        (["./nowhere", "--data", "builtin:digits"], ["./nowhere", "no config.json"]),
        (["test_resnet", "--data", "./nowhere"], ["--data", "./nowhere"]),
    ],
)
def test_mistakes_of_eval(folder, complaint, argv, wanted):
    line = complaint(eval_command, *argv, "--use-cpu")
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], ["which recipe?"]),
        (["recipe.yaml", "--processes", "0"], ["--processes", "1 or more"]),
        (["recipe.yaml", "methods.mgd.teacher_tap=block:3"], ["tap 'block:3'", "stage:1"]),
        (["recipe.yaml", "teacher.recipe=other.yaml", "teacher.model="], ["no recipe 'other.yaml'"]),
        *(
            (
                ["recipe.yaml", f"methods.{name}={{}}", "train.per_device_train_batch_size=1"],
                [f"methods.{name} ", "is 1"],
            )
            for name in ("sp", "pkt", "rkd")
        ),
        (
            ["recipe.yaml", "--processes", "4", "methods.sp={}", "train.per_device_train_batch_size=1"],
            ["methods.sp ", "raise it, or set methods.sp.gather: true"],
        ),
        (["recipe.yaml", "methods.crd={}", "data.augment.repeats=2"], ["methods.crd ", "data.augment.repeats is 2"]),
        (["recipe.yaml", "methods.crd={}", "data.augment.mixup=0.8"], ["methods.crd ", "turn mixing off"]),
        (["recipe.yaml", "methods.at={student_taps: [stage:1]}"], ["methods.at", "give student_taps and teacher_taps"]),
        (["recipe.yaml", "methods.fitnet={teacher_tap: stage:9}"], ["tap 'stage:9'", "stage:1"]),
        (["recipe.yaml", "student.model=test_convnext", "methods.ofd={}"], ["methods.ofd ", "stages without one"]),
        (
            ["recipe.yaml", "student.model=test_efficientnet", "methods.sdd={}"],
            ["methods.sdd.student_tap", "takes 256"],
        ),
        (["recipe.yaml", "methods.sdd={}", "data.augment.mixup=0.8"], ["methods.sdd ", "turn mixing off"]),
        (["recipe.yaml", "methods.sdd={scales: [2, 4]}"], ["methods.sdd.scales", "[1, 2, 4]"]),
        (["recipe.yaml", "methods.ofa={eps: [1, 2]}"], ["methods.ofa.eps has 2 values"]),
        (
            ["recipe.yaml", "methods.reviewkd={}", "train.per_device_train_batch_size=1"],
            ["methods.reviewkd ", "is 1"],
        ),
        (["recipe.yaml", "methods.ctkd={kind: dkd}", "data.augment.cutmix=1"], ["methods.ctkd ", "turn mixing off"]),
        (["recipe.yaml", "methods.mlkd={wiring: asexecuted}"], ["methods.mlkd.wiring", "as_executed"]),
    ],
)
def test_mistakes_of_plan(folder, complaint, argv, wanted):
    line = complaint(plan_command, *argv)
    assert all(part in line for part in wanted), line


@pytest.mark.parametrize(
    ("module", "argv", "wanted"),
    [
        ("kd_hf.train", ["RECIPE", "train.lerning_rate=1"], "Did you mean 'learning_rate'?"),
        ("kd_hf.train", ["RECIPE", "train.optim=adammw"], "Did you mean 'adamw'?"),
        ("kd_hf.train", ["RECIPEx"], "Did you mean 'recipe.yaml'?"),
        ("kd_hf.plan", ["RECIPE", "methods.kdd={}"], "Did you mean 'kd'?"),
        ("kd_hf.eval", ["test_resnett", "--data", "builtin:digits", "--use-cpu"], "Did you mean 'test_resnet'?"),
    ],
)
def test_as_a_process(folder, module, argv, wanted):
    done = run(module, *(part.replace("RECIPE", str(folder / "recipe.yaml")) for part in argv))
    assert done.returncode == 2
    assert wanted in one_line(done.stderr)
    assert not (folder / "out").exists()


def test_interrupt_is_not_a_traceback(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "kd_hf: interrupted\n"


def test_only_the_main_process_complains(monkeypatch, folder, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["command", "missing.yaml"])
    with pytest.raises(SystemExit) as exit_:
        run_command(train_command.main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_process_says_what_only_it_can_know(monkeypatch, capsys):
    def fail(argv):
        raise LocalError("a file is gone")

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        run_command(fail)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "kd_hf: error (process 1): a file is gone\n"


def test_recipes_of_this_repository_are_valid():
    from kd_hf.recipe.read import load_recipe

    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).train.output_dir
