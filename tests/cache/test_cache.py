"""Storing what teachers say, and training from it: the same losses, resume, refusals, the Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kd_hf.cache.__main__ import main
from kd_hf.cache.speakers import Speakers
from kd_hf.cache.write import write_store
from kd_hf.distillation import assembly
from kd_hf.errors import UserError
from kd_hf.layout import RESOLVED
from kd_hf.plan.describe import describe, plan_recipe
from kd_hf.recipe.resolved import dump_recipe, recipe_hash
from kd_hf.run.log import read_log
from kd_hf.store.format import open_store
from kd_hf.train.chain import train_recipe
from kd_hf.train.trainer import DistillTrainer
from tests.forked import launch
from tests.hub.server import User, serve
from tests.runs import ROOT, TEACHER, assert_same_tensors, command, environment, final_tensors, recipe, recipe_file
from tests.train.test_trainer import Kill

# everything that changes an image; ten steps in two epochs
OPTIONS = {
    "student": {"model": "test_convnext"},
    "teacher": TEACHER,
    "methods": {"kd": {"weight": 1.0}, "mgd": {"weight": 0.001}},
    "data": {
        "num_labels": 200,
        "unlabelled": "drop",
        "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0},
    },
    "train": {"per_device_train_batch_size": 40, "per_device_eval_batch_size": 30, "max_steps": 10},
}
LIVE_TEACHER = {"teacher": {"model": "test_convnext2"}}  # LayerNorm, where two processes are compared
SHARD = 80  # rows of a file; no multiple of the batches, and no divisor of an epoch


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "s"
    write_store(recipe("unused", OPTIONS, LIVE_TEACHER), folder, shard_rows=SHARD)
    return folder


def stored(folder, *blocks):
    """The recipe of a run that reads a store."""
    return recipe(folder, OPTIONS, LIVE_TEACHER, *blocks)


def reads(store):
    return {"teacher": {"store": str(store)}}


@pytest.fixture(scope="module")
def reference(store, tmp_path_factory):
    """A run from the store."""
    folder = tmp_path_factory.mktemp("reference")
    DistillTrainer(stored(folder, reads(store))).train()
    return folder


def losses(folder):
    return [line for line in read_log(folder) if "loss" in line]


# --- training from a store ------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_live_teacher(reference, tmp_path):
    DistillTrainer(stored(tmp_path)).train()
    pairs = list(zip(losses(reference), losses(tmp_path), strict=True))
    for line, live in pairs:
        for part in ("task/ce", "kd/soft", "mgd/generation"):
            assert line[part] == pytest.approx(live[part], rel=2e-3)
    assert pairs[0][0]["kd/soft"] == pytest.approx(pairs[0][1]["kd/soft"], rel=2e-4)  # by the same student


def test_the_teacher_is_not_there(store, tmp_path, monkeypatch, capsys):
    loaded = []
    load = assembly.load_network

    def noted(cfg, *args, **kwargs):
        loaded.append(cfg.model)
        return load(cfg, *args, **kwargs)

    monkeypatch.setattr(assembly, "load_network", noted)
    trainer = DistillTrainer(stored(tmp_path, reads(store), {"train": {"max_steps": 1, "eval_strategy": "epoch"}}))
    assert loaded == ["test_convnext"] and list(trainer.parts.views()) == ["student"]
    metrics = trainer.train().metrics
    assert not {"eval_teacher_top1", "eval_agreement"} & metrics.keys()
    said, (start, *_) = capsys.readouterr(), read_log(tmp_path)
    assert f"test_convnext2: all classes for 2 epochs, stored in {store}" in said.out + said.err
    assert start["models"]["teacher"]["parameters"] > 0


def test_resume_in_an_epoch_is_equal_to_the_bit(store, reference, tmp_path):
    run = stored(tmp_path, reads(store), {"train": {"dataloader_num_workers": 1}})
    with pytest.raises(RuntimeError, match="killed"):
        DistillTrainer(run, callbacks=[Kill(5)]).train()
    DistillTrainer(run).train()
    assert_same_tensors(final_tensors(tmp_path), final_tensors(reference))


def test_two_processes_read_and_write_as_one(store, reference, tmp_path):
    half = {"train": {"per_device_train_batch_size": 20}}
    file = recipe_file(tmp_path / "r.yaml", tmp_path / "run", OPTIONS, LIVE_TEACHER, half)
    written = str(tmp_path / "s")
    done = launch("tests.programs.write_and_train", str(file), written, written, "--shard-rows", str(SHARD))
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (store / "data").iterdir())
    assert len(names) == 6 and names == sorted(path.name for path in (tmp_path / "s/data").iterdir())
    for name in names:
        assert (store / "data" / name).read_bytes() == (tmp_path / "s/data" / name).read_bytes()
    for one, two in zip(losses(reference), losses(tmp_path / "run"), strict=True):
        for key in ("loss", "task/ce", "kd/soft"):
            assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_where_a_store_lies_does_not_change_the_run_but_that_there_is_one_does(store, tmp_path):
    here, there = (stored(tmp_path, {"teacher": {"store": place}}) for place in ("here", "user/there@main"))
    assert recipe_hash(here) == recipe_hash(there) != recipe_hash(stored(tmp_path))


def test_a_stored_teacher_with_a_recipe_is_not_trained(store, tmp_path):
    file = recipe_file(tmp_path / "teacher.yaml", tmp_path / "teacher")
    blocks = {"teacher": {"model": None, "recipe": str(file), "store": str(store)}}
    with pytest.raises(UserError, match=rf"teacher\.recipe: {file} has not been trained"):
        write_store(stored("unused", blocks), tmp_path / "s")
    run = stored(tmp_path / "student", blocks)
    with pytest.raises(UserError, match=r'teacher\.model is "test_convnext2" in the store and ".*/teacher" here'):
        train_recipe(run)
    assert not (tmp_path / "teacher").exists()


def test_a_teacher_that_was_trained_anew_is_another_one(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the teacher's name is that of a run folder
    (tmp_path / "test_convnext2").mkdir()
    (tmp_path / "test_convnext2" / RESOLVED).write_text(dump_recipe(recipe("unused")))
    with pytest.raises(UserError, match=r"teacher\.recipe \(hash\) is nothing in the store and"):
        DistillTrainer(stored(tmp_path / "run", reads(store)))


def test_some_of_several_teachers_are_stored(tmp_path):
    two = {
        "teachers": {"one": TEACHER, "two": TEACHER | {"model": "test_convnext2", "image_size": 48}},
        "methods": {"kd": {"teacher": "one"}, "mgd": {"teacher": "one", "weight": 0}, "nkd": {"teacher": "two"}},
        "train": {"max_steps": 1, "save_strategy": "no"},
    }
    run = recipe("unused", {key: block for key, block in OPTIONS.items() if key != "teacher"}, two)
    write_store(run, tmp_path / "s", top_k=5)
    found = []
    for names in ((), ("two",), ("one", "two")):
        blocks = {name: cfg.model_copy(update={"store": str(tmp_path / "s") if name in names else None})
                  for name, cfg in run.teachers.items()}  # fmt: skip
        args = run.train.model_copy(update={"output_dir": str(tmp_path / "-".join(("run", *names)))})
        trainer = DistillTrainer(run.model_copy(update={"teachers": blocks, "train": args}))
        assert trainer.teachers.keys() == blocks.keys() - set(names)
        trainer.train()
        found.append(losses(Path(args.output_dir))[0])
    for some in found[1:]:
        assert some["task/ce"] == found[0]["task/ce"]
        assert some["kd/soft"] == pytest.approx(found[0]["kd/soft"], rel=1e-2)
    assert found[1]["kd/soft"] == found[0]["kd/soft"]  # its teacher ran
    assert found[1]["nkd/target"] == found[2]["nkd/target"] != found[0]["nkd/target"]


def test_plan_leaves_the_stored_teacher_out_of_the_cost(store, tmp_path):
    live, run = (plan_recipe(stored(tmp_path, *blocks)) for blocks in ((), (reads(store),)))
    assert run["cost_over_plain_training"] < live["cost_over_plain_training"]
    assert f"teacher does not run: its outputs are read from {store}" in describe(run)
    assert "gate " not in describe(run)


# --- what does not fit ----------------------------------------------------------------------------------------------

REFUSED = {
    "seed": ({"train": {"seed": 7}}, r"does not fit this recipe: train\.seed is 0 in the store and 7 here"),
    "augment": ({"data": {"augment": {"mixup": 0.1}}}, r"data\.augment\.mixup is 0.8 in the store and 0.1 here"),
    "batch": ({"train": {"per_device_train_batch_size": 20}}, "images per step .* is 40 in the store and 20 here"),
    "model": ({"teacher": {"model": "test_resnet"}}, r'teacher\.model is "test_convnext2" in the store and "test_r'),
    "kwargs": ({"teacher": {"kwargs": {"act_layer": "relu"}}}, r"teacher\.kwargs is {} in the store"),
    "precision": ({"train": {"bf16": True}}, r'teacher\.dtype is "float32" in the store and "bfloat16" here'),
    "view": ({"teacher": {"image_size": 64}}, r"teacher's view is .*\"image_size\": 32"),
    "epochs": ({"train": {"max_steps": 11}}, "holds 2 epochs and this run has 3; .* --epochs 3` adds what is missing"),
    "tap": ({"methods": {"mgd": {"teacher_tap": "stage:1"}}}, "mgd reads the teacher's tap 'stage:1', which"),
    "parts": (
        {"methods": {"mgd": {"weight": 0}, "srrl": {}}},
        r"methods\.srrl runs parts of the teacher by itself \(head\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_store_that_does_not_fit_is_refused(store, tmp_path, name):
    change, pattern = REFUSED[name]
    with pytest.raises(UserError, match=pattern) as caught:
        DistillTrainer(stored(tmp_path, reads(store), change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"teacher": {"mode": "batch_stats"}}, r"teacher\.mode: .* only eval can be stored"),
        ({"teacher": {"shard": True}}, r"teacher\.shard: "),
        ({"methods": {"srrl": {}}}, r"methods\.srrl runs parts of the teacher by itself"),
        ({"methods": {"mgd": {"student_tap": "stage:1", "teacher_tap": "stage:1"}}}, r"--taps: .*\(teacher_stage:1 4"),
        ({"methods": {"kd": {"weight": 0}, "mgd": {"weight": 0}}}, "none of them reads a teacher"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, change, pattern):
    with pytest.raises(UserError, match=pattern):
        write_store(stored("unused", change), tmp_path / "s")
    assert not (tmp_path / "s").exists()


# --- writing --------------------------------------------------------------------------------------------------------


def states(folder):
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (folder / "data").iterdir()}


def test_an_interrupted_command_continues_and_a_finished_store_grows(store, tmp_path, monkeypatch):
    folder, run, ask, asked = tmp_path / "s", stored("unused"), Speakers.ask, []

    def interrupted(self, batch):
        asked.append(len(batch))
        if len(asked) == 9:  # of 2 for the forecast and 3 for each file
            raise KeyboardInterrupt
        return ask(self, batch)

    monkeypatch.setattr(Speakers, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_store(run, folder, epochs=1, shard_rows=SHARD)
    done = states(folder)
    assert list(done) and all(not name.startswith(".") for name in done) and len(done) == 2
    with pytest.raises(UserError, match="is unfinished"):
        open_store(str(folder))
    with pytest.raises(UserError, match=r"holds another store: teacher\.top_k is 10 there and 3 here"):
        write_store(run, folder, epochs=1, shard_rows=SHARD, top_k=3)
    write_store(run, folder, epochs=1, shard_rows=SHARD)
    write_store(run, folder, shard_rows=SHARD)  # the recipe's two epochs
    assert states(folder).items() >= done.items()
    count = len(asked)
    write_store(run, folder, shard_rows=SHARD)
    assert len(asked) == count  # there was nothing to do
    for path in (store / "data").iterdir():
        assert (folder / "data" / path.name).read_bytes() == path.read_bytes()
    assert not (folder / "unfinished.json").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    folder = tmp_path / "s"
    write_store(stored("unused"), folder, epochs=1, shard_rows=SHARD)
    (folder / "data" / "epoch0000-0001.parquet").unlink()
    (folder / "data" / ".tmp-epoch0000-0001.parquet").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*epoch0000-0001"):
        write_store(stored("unused"), folder, epochs=1, shard_rows=SHARD)
    assert sorted(os.listdir(folder / "data")) == ["epoch0000-0000.parquet", "epoch0000-0002.parquet"]


def test_other_things_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other things than a store"):
        write_store(stored("unused"), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


# --- the command ----------------------------------------------------------------------------------------------------


def test_verify_finds_a_row_that_is_wrong(store, tmp_path, capsys):
    file = recipe_file(tmp_path / "r.yaml", tmp_path / "run", OPTIONS, LIVE_TEACHER)
    assert main([str(file), "-o", str(store), "--verify", "20"]) == 0
    assert "20 random images agree with the teacher" in capsys.readouterr().out
    shutil.copytree(store, tmp_path / "s")
    for path in (tmp_path / "s/data").iterdir():
        table = pyarrow.parquet.read_table(path)
        column = table.column_names.index("teacher_values")
        values = [(np.frombuffer(row, np.float16) - np.float16(0.25)).tobytes() for row in table[column].to_pylist()]
        changed = table.set_column(column, "teacher_values", pyarrow.array(values, pyarrow.binary()))
        pyarrow.parquet.write_table(changed, path, row_group_size=open_store(str(store)).manifest.group_rows)
    assert main([str(file), f"teacher.store={tmp_path / 's'}", "--verify"]) == 1
    assert "a log-probability is" in capsys.readouterr().out


def test_the_command_says_what_it_will_take(tmp_path, capsys):
    file = recipe_file(tmp_path / "r.yaml", tmp_path / "run", OPTIONS, LIVE_TEACHER)
    assert main([str(file), "-o", str(tmp_path / "s"), "--top-k", "2", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "for      1 epochs of 200 images, 40 a step" in out and "\ntime     about " in out
    assert open_store(str(tmp_path / "s")).manifest.teachers["teacher"].top_k == 2
    with pytest.raises(UserError, match="where is the store"):
        main([str(file)])


def test_a_store_is_pushed_and_read_from_the_hub(store, reference, tmp_path):
    file = recipe_file(tmp_path / "r.yaml", tmp_path / "run", OPTIONS, LIVE_TEACHER)
    kept = {key: value for key, value in environment().items() if not key.startswith("HF_")}
    with serve(tmp_path / "hub", {"hf_ann": User("ann")}) as hub:
        done = subprocess.run(
            command("tests.programs.write_and_train", str(file), str(store), "ann/said@main", "--push", "ann/said"),
            env=kept | hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_ann"},
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ranges = [request for request in hub.requests(r"^GET .*parquet") if request.range]
        assert ranges and "pushed to" in done.stdout
    assert_same_tensors(final_tensors(tmp_path / "run"), final_tensors(reference))
    assert "datasets" not in os.listdir(Path(tmp_path / "home"))  # no copy of the files
