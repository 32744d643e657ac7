"""The life of a distilled student on a Hub: a published teacher and data set, the run, its pushes, and its users."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file

from kd_hf.hub.publisher import LAST
from kd_hf.layout import RESOLVED
from kd_hf.models.load import load_model
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.resolved import recipe_hash
from kd_hf.run.log import read_log
from tests import runs
from tests.hub.folders import local, pushed, remote, titles
from tests.hub.server import User, serve
from tests.models.families import HF_VIT

TOKEN = "hf_secretOfMe"
NAMES = ["zero", "one", "two", "three", "four"]
STEPS = 4
BLOCKS: dict[str, Any] = {
    "teacher": {"model": "me/teacher", "gate": {"enabled": False}},
    "methods": {"kd": {"temperature": 2.0}},
    "data": {"path": "me/bars", "streaming": True},
    "train": {"max_steps": STEPS, "save_steps": STEPS // 2, "disable_tqdm": True},
    "eval": {"max_samples": None},
    "hub": {"push_to_hub": True, "tags": ["bars"]},
}
LOCAL: dict[str, Any] = {"teacher": runs.TEACHER, "data": {"path": "builtin:digits", "streaming": False}}
GOES_ON = "this push failed, the training goes on"
ROWS = "bytes=4-"  # how a request for the rows of a Parquet file ends; the footer was read before

# what others run, who have not got kd_hf
WITHOUT = """
import sys
sys.modules["kd_hf"] = None  # also where it is installed
try:
    import kd_hf
except ImportError:
    pass
else:
    sys.exit("kd_hf is here")
"""
PUBLISH = f"""
import numpy, timm, torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
names = {NAMES}
for repository, classes in (("me/teacher", names), ("me/fragile", names), ("me/small", names[:3])):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=len(classes))
    timm.models.push_to_hf_hub(network, repository, model_config={{"label_names": classes}}, safe_serialization=True)
rng = numpy.random.default_rng(0)
features = Features({{"image": Image(), "label": ClassLabel(names=names)}})
for split, count, shards in (("train", 120, 3), ("validation", 30, 1)):
    pixels, labels = rng.integers(0, 60, (count, 32, 32, 3), numpy.uint8), numpy.arange(count) % 5
    for picture, label in zip(pixels, labels):
        picture[:, 6 * label : 6 * label + 6] += 150
    rows = {{"image": [fromarray(picture) for picture in pixels], "label": labels}}
    Dataset.from_dict(rows, features=features).push_to_hub("me/bars", split=split, num_shards=shards)
"""
# in a folder with pixels.safetensors; argv: repositories
USE = """
import timm, torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
pixels, logits = load_file("pixels.safetensors")["pixels"], {}
with torch.no_grad():
    for name in sys.argv[1:]:
        card = ModelCard.load(name)
        card.save(name.replace("/", "-") + ".md")
        network = AutoModelForImageClassification.from_pretrained(name).eval()
        logits["transformers " + name] = network(pixels).logits
        assert network.config.id2label[4] == "four" and AutoImageProcessor.from_pretrained(name)
        if card.data.library_name == "timm":
            network = timm.create_model("hf-hub:" + name, pretrained=True).eval()
            logits["timm " + name] = network(pixels)
save_file(logits, "logits.safetensors")
"""
# `python -m MODULE …` again and again, each time in a process of its own, forked from one that has imported what a
# run needs; argv: a recipe, to plan for that
LAUNCHER = """
import contextlib, io, json, multiprocessing, os, runpy, sys, time
import datasets, kd_hf.report.build, kd_hf.train.trainer
from huggingface_hub import constants
from kd_hf.plan.__main__ import main as plan

def run(argv, folder, variables, *streams):
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.update(variables)
    constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"  # was read at the import
    time.sleep = lambda seconds: None  # the pauses before another try are not the subject
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)

with contextlib.redirect_stdout(io.StringIO()):
    plan(sys.argv[1:])
for line in sys.stdin:
    process = multiprocessing.get_context("fork").Process(target=run, args=json.loads(line))
    process.start()
    print(process.pid, flush=True)
    process.join()
    print(process.exitcode, flush=True)
"""


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Launcher:
    """Runs commands one after the other; what they write is kept in files of `folder`."""

    def __init__(self, environment, folder):
        self.folder, self.count = folder, 0
        recipe = runs.recipe_file(folder / "recipe.yaml", folder / "run", BLOCKS, LOCAL)
        line, pipe = [sys.executable, "-c", LAUNCHER, str(recipe)], subprocess.PIPE
        self.process = subprocess.Popen(line, env=environment, cwd=runs.ROOT, stdin=pipe, stdout=pipe, text=True)

    def start(self, folder, module, *args, **variables):
        """Begin ``python -m module …`` in a working folder, with variables of its environment; the process's id."""
        self.count += 1
        self.streams = [str(self.folder / f"{self.count}.{name}") for name in ("out", "err")]
        request = [[module, *map(str, args)], str(folder), variables, *self.streams]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Wait for the command that was begun."""
        return Done(int(self.process.stdout.readline()), *(Path(path).read_text() for path in self.streams))

    def __call__(self, folder, module, *args, **variables):
        """Both."""
        self.start(folder, module, *args, **variables)
        return self.end()


def environment(hub, home):
    """That of a machine with an empty `home`."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {key: value for key, value in runs.environment().items() if not key.startswith(foreign)}
    return kept | hub.environment(home, TOKEN)


def elsewhere(hub, folder, *args, **variables):
    """Run Python in `folder`, on a machine of its own."""
    variables = environment(hub, folder / "home") | variables
    line, quiet = [sys.executable, *args], {"capture_output": True, "text": True, "check": False}
    done = subprocess.run(line, env=variables, cwd=folder, timeout=300, **quiet)
    assert TOKEN not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def stranger(hub, folder, script, *args):
    """Run a script on a machine without kd_hf."""
    folder.mkdir(exist_ok=True)
    done = elsewhere(hub, folder, "-c", WITHOUT + script, *args, PYTHONPATH="")
    assert done.code == 0, done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with teachers and a data set, put there by timm and datasets, and a machine with kd_hf."""
    root = tmp_path_factory.mktemp("world")
    (root / "here").mkdir()
    with serve(root / "hub", {TOKEN: User("me"), "hf_secretOfYou": User("you")}) as hub:
        stranger(hub, root / "publisher", PUBLISH)
        launch = Launcher(environment(hub, root / "home"), root / "here")
        yield SimpleNamespace(root=root, hub=hub, launch=launch)
        launch.process.kill()
        launch.process.communicate()
    texts = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(texts) > 100 and not [path for path, text in texts.items() if b"hf_secret" in text]


@pytest.fixture
def hub(world):
    """The Hub without faults."""
    world.hub.faults.clear()
    return world.hub


def prepare(world, name, *blocks):
    """A working folder with ``recipe.yaml``, whose run goes to ``run`` and to ``me/<name>``."""
    folder = world.root / name
    folder.mkdir()
    runs.recipe_file(folder / "recipe.yaml", Path("run"), BLOCKS, {"hub": {"hub_model_id": f"me/{name}"}}, *blocks)
    return folder


def train(world, name, *blocks, **variables):
    """Train in such a folder."""
    folder = prepare(world, name, *blocks)
    return folder, world.launch(folder, "kd_hf.train", "recipe.yaml", **variables)


def one_line(done, *parts):
    """A command must have ended with exactly one line that holds `parts`."""
    assert done.code == 2 and done.err.startswith("kd_hf: error: ") and done.err.count("\n") == 1, done
    assert all(part in done.err for part in parts), done.err


def check_whole(folder):
    """Nothing that was trained is missing in ``run``, and the student is that of its last checkpoint."""
    log = read_log(folder / "run")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in log if "eval_top1" in line] == [STEPS]
    exported = load_file(folder / "run" / "student" / "model.safetensors")
    # transformers writes some tensors under other names than its networks have
    values = [sorted(value.numpy().tobytes() for value in found.values()) for found in (exported, trained(folder))]
    assert values[0] == values[1]


def trained(folder):
    """The state dict of the student in the last checkpoint."""
    start, tensors = "module/student.network.", runs.final_tensors(folder / "run")
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}


def check_pushed(hub, folder):
    """The repository holds the run's student, and nothing else."""
    check_whole(folder)
    name = f"me/{folder.name}"
    assert remote(hub, name) == pushed(folder / "run") and titles(hub, name)[-1] == "End of training"
    assert {"model.safetensors", "README.md", RESOLVED} < remote(hub, name).keys()


# ------------------------------------------------------------------------------------------- a run, and its users


@pytest.fixture(scope="module")
def student(world):
    """The folder of a run that nothing disturbed, with its report; it went to ``me/student``."""
    report = {"eval": {"report": True, "report_samples": 30}}
    folder, done = train(world, "student", report, {"hub": {"hub_strategy": "every_save"}})
    assert (done.code, done.err) == (0, ""), done
    assert f"pushed to {world.hub.url}/me/student" in done.out and "streamed" in done.out
    return folder


def test_the_student_is_pushed_at_every_save_and_at_the_end(world, student):
    check_pushed(world.hub, student)
    first, second, *_, last = titles(world.hub, "me/student")
    assert (first, second, last) == ("initial commit", "Step 2", "End of training")
    assert not list((student / "run").glob(".*"))  # no folder of a push is left


@pytest.fixture(scope="module")
def vit(world):
    """One of a transformers network, whose first push in the background failed; it went to ``me/vit``."""
    world.hub.fail("status", "^POST .*me/vit/commit/", status=500, times=3)  # as often as it is tried
    network = {"model": "transformers/vit", "kwargs": HF_VIT}
    folder, done = train(world, "vit", {"student": network}, {"hub": {"hub_strategy": "every_save"}})
    assert (done.code, done.err) == (0, ""), done
    return folder, done.out


def test_a_push_that_fails_in_the_background_does_not_stop_the_training(world, vit):
    folder, out = vit
    (told,) = [line for line in out.splitlines() if "failed" in line]
    assert told == f"hub: 'me/vit': {GOES_ON}: the Hub is out of order (500); try again later"
    check_pushed(world.hub, folder)


@pytest.fixture(scope="module")
def used(world, student, vit):
    """What a machine without kd_hf makes of both repositories: a folder with ``logits.safetensors`` and the cards."""
    folder = world.root / "user"
    folder.mkdir()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"pixels": pixels}, folder / "pixels.safetensors")
    stranger(world.hub, folder, USE, "me/student", "me/vit")
    return folder


def test_everyone_gets_the_logits_of_the_trained_student(used, student, vit):
    pixels, found = (load_file(used / f"{name}.safetensors") for name in ("pixels", "logits"))
    assert found.keys() == {"timm me/student", "transformers me/student", "transformers me/vit"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the order of the other process
    for name, folder in (("me/student", student), ("me/vit", vit[0])):
        cfg = load_recipe(folder / "recipe.yaml").student
        network = load_model(cfg.model, num_classes=5, image_size=32, kwargs=cfg.kwargs).network
        network.load_state_dict(trained(folder))
        with torch.no_grad():
            output = network(pixels["pixels"])
        expected = getattr(output, "logits", output)
        assert not [key for key, logits in found.items() if key.endswith(name) and not logits.equal(expected)]
    torch.set_num_threads(threads)


def test_the_card_says_what_it_is_and_where_it_came_from(world, used, student, tmp_path):
    card = ModelCard.load(used / "me-student.md")
    data, text = card.data, card.text
    files, commit = remote(world.hub, "me/student"), world.hub.store.resolve("models", "me/teacher", "main")
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert (data.datasets, data.base_model) == (["me/bars"], ["me/teacher"])
    assert data.tags == ["image-classification", "knowledge-distillation", "kd_hf", "kd", "bars"]
    lineage = data.to_dict()["distillation"]
    assert lineage["teachers"] == [{"name": "teacher", "model": "me/teacher", "revision": commit}]
    assert f"[me/teacher](https://huggingface.co/me/teacher/tree/{commit})" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 5 and set(pictures) == {path for path in files if path.endswith(".png")}
    (tmp_path / "recipe.yaml").write_bytes(files[RESOLVED])
    made, meant = load_recipe(tmp_path / "recipe.yaml"), load_recipe(student / "recipe.yaml")
    assert recipe_hash(made) == recipe_hash(meant) == lineage["recipe"]


def test_the_results_are_there_for_people_and_for_leaderboards(world, used, student):
    measured = next(line for line in reversed(read_log(student / "run")) if "eval_top1" in line)
    assert measured["eval_samples"] == 30 and measured["eval_teacher_top1"] > 0
    results = {result.metric_name: result for result in ModelCard.load(used / "me-student.md").data.eval_results}
    top1 = results["top-1 accuracy"]
    assert (top1.dataset_type, top1.dataset_split) == ("me/bars", "validation")
    assert top1.metric_value == pytest.approx(measured["eval_top1"] / 100, abs=1e-6)
    written = remote(world.hub, "me/student")[".eval_results/bars.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(written))
    assert entry.dataset_id == "me/bars" and entry.value == pytest.approx(measured["eval_top1"], abs=1e-4)


# ---------------------------------------------------------------------------------------------- another machine


@pytest.fixture(scope="module")
def killed(world):
    """What a run left on its machine that was killed at its end, when its first checkpoint had been pushed."""
    folder = prepare(world, "killed", {"hub": {"hub_strategy": "checkpoint"}})
    hold = world.hub.fail("slow", f"^GET /cdn/.*me/bars.*validation.* {ROWS}", seconds=60)  # the last evaluation
    process = world.launch.start(folder, "kd_hf.train", "recipe.yaml")
    while hold.times or f"{LAST}/state.json" not in remote(world.hub, "me/killed"):
        time.sleep(0.02)
        os.kill(process, 0)  # raises when the process has ended by itself
    os.kill(process, signal.SIGKILL)
    done = world.launch.end()
    assert (done.code, done.err) == (-signal.SIGKILL, "")
    assert not (folder / "run" / "student").exists()
    return folder


def test_a_killed_run_is_continued_on_another_machine(world, student, killed):
    there = world.root / "there" / "killed"
    there.mkdir(parents=True)
    shutil.copy(killed / "recipe.yaml", there)
    done = elsewhere(world.hub, there, "-m", "kd_hf.train", "recipe.yaml")
    assert (done.code, done.err) == (0, ""), done
    assert "fetched run/checkpoints/checkpoint-2 from the Hub" in done.out
    assert "continuing from run/checkpoints/checkpoint-2" in done.out
    check_pushed(world.hub, there)  # so last-checkpoint/ is gone
    runs.assert_same_tensors(runs.final_tensors(there / "run"), runs.final_tensors(student / "run"))


# -------------------------------------------------------------------------------------------------------- faults


def test_a_hub_that_stumbles_all_the_time_changes_no_bit(world, student, hub):
    faults = [
        hub.fail("status", "^GET /api/models/me/fragile/tree/", status=500),
        hub.fail("status", "^GET /cdn/.*me/fragile", status=429, retry_after=1),
        hub.fail("slow", "^GET /cdn/.*me/fragile", seconds=0.2),
        hub.fail("status", f"^GET /cdn/.*me/bars.*train-00000.* {ROWS}", status=429, retry_after=1),
        hub.fail("drop", f"^GET /cdn/.*me/bars.*train-00001.* {ROWS}"),
        hub.fail("slow", f"^GET /cdn/.*me/bars.*train-00002.* {ROWS}", seconds=0.2),
        hub.fail("status", f"^GET /cdn/.*me/bars.*validation.* {ROWS}", status=500),
        hub.fail("status", "^POST /api/repos/create", status=503),
        hub.fail("status", "^GET .*me/stumbling/tree/", status=500),
        hub.fail("status", "^POST .*me/stumbling/preupload/", status=429, retry_after=1),
        hub.fail("hang_up", "^POST /me/stumbling.git/info/lfs/objects/batch"),
        hub.fail("drop", "^POST .*me/stumbling/commit/"),
    ]
    blocks = {"teacher": {"model": "me/fragile"}, "hub": {"hub_strategy": "checkpoint"}}
    folder, done = train(world, "stumbling", blocks)
    assert done.code == 0 and "Traceback" not in done.err and "failed" not in done.out, done
    assert not [fault for fault in faults if fault.times]
    check_pushed(hub, folder)
    runs.assert_same_tensors(runs.final_tensors(folder / "run"), runs.final_tensors(student / "run"))


def test_data_that_arrive_damaged_stop_the_run_and_the_same_command_continues(world, student, hub):
    hub.fail("corrupt", f"^GET /cdn/.*me/bars.*train-00001.* {ROWS}")
    folder, done = train(world, "damaged")
    one_line(done, "data.path: cannot read row group 0 of hf://datasets/me/bars@", "the same command continues")
    assert not (folder / "run" / "student").exists() and not remote(hub, "me/damaged")
    done = world.launch(folder, "kd_hf.train", "recipe.yaml")
    assert (done.code, done.err) == (0, ""), done
    check_pushed(hub, folder)
    runs.assert_same_tensors(runs.final_tensors(folder / "run"), runs.final_tensors(student / "run"))


@pytest.mark.parametrize(
    ("name", "pattern", "options", "why"),
    [
        ("busy", "^POST .*/commit/", {"status": 429, "retry_after": 1}, "the Hub asks for fewer requests"),
        ("checksum", "^PUT /lfs/", {"status": 400}, "the Hub refuses it (BadRequestError"),
    ],
)
def test_a_last_push_that_fails_costs_nothing(world, hub, name, pattern, options, why):
    hub.fail("status", pattern, times=999, **options)
    seed = {"train": {"seed": len(name)}}  # what the Hub knows already is not uploaded
    folder, done = train(world, name, seed, {"hub": {"hub_strategy": "every_save"}})
    one_line(done, f"hub: 'me/{name}': the push failed: {why}", "the run in run is whole")
    assert GOES_ON in done.out
    assert not remote(hub, f"me/{name}")
    check_whole(folder)
    before, command = local(folder), shlex.split(re.search("`python -m (.*?)` repeats it", done.err)[1])
    hub.faults.clear()
    done = world.launch(folder, *command)
    assert done == (0, f"pushed to {hub.url}/me/{name}\n", "")
    assert local(folder) == before
    check_pushed(hub, folder)


# ------------------------------------------------------------------------------------------------------ mistakes


SMALL = {"teacher": {"model": "me/small", "num_classes": None}, "data": BLOCKS["data"]}


@pytest.mark.parametrize(
    ("block", "variables", "message"),
    [
        ({}, {"HF_TOKEN": ""}, "hub: there is no token; run `hf auth login`, or set HF_TOKEN"),
        ({}, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1 is set; unset it, or train with hub.push_to_hub=false"),
        ({"hub": {"hub_model_id": "you/x"}}, {}, "it belongs to 'you', and the token to 'me'; choose another"),
        (SMALL, {}, "methods.kd: the teacher 'me/small' has 3 classes and the student 'test_vit' has 5"),
    ],
    ids=["no token", "offline", "another's repository", "another label count"],
)
def test_mistakes_end_in_one_line_before_the_first_step(world, hub, tmp_path, block, variables, message):
    before = local(hub.store.root)
    recipe = runs.recipe_file(tmp_path / "recipe.yaml", Path("run"), BLOCKS, LOCAL, block)
    done = world.launch(tmp_path, "kd_hf.train", recipe, **variables)
    one_line(done, message)
    assert not done.out and not (tmp_path / "run").exists() and local(hub.store.root) == before


def test_a_push_that_cannot_be_is_told_before_the_teacher_is_trained(world, tmp_path):
    runs.recipe_file(tmp_path / "teacher.yaml", Path("taught"), {"student": {"model": "test_resnet"}})
    runs.recipe_file(tmp_path / "recipe.yaml", Path("run"), {**BLOCKS, "teacher": {"recipe": "teacher.yaml"}})
    one_line(world.launch(tmp_path, "kd_hf.train", "recipe.yaml", HF_TOKEN=""), "hub: there is no token")
    assert sorted(local(tmp_path)) == ["recipe.yaml", "teacher.yaml"]


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("kd_hf.train", ["--push"], "'run' holds no student yet (its training has not ended)"),
        ("kd_hf.export", ["--format", "torch-export"], "there is no config.json in that folder, nor in a student/"),
        ("kd_hf.compare", [], "'run' (step 4 of 4) has no eval_top1 in its log"),
    ],
)
def test_commands_that_need_a_finished_run(world, killed, module, options, message):
    before = local(killed)
    one_line(world.launch(killed, module, *options, "run"), message)
    assert local(killed) == before


def test_a_report_of_an_unfinished_run(world, killed, tmp_path):
    shutil.copytree(killed / "run", tmp_path / "run")
    done = world.launch(tmp_path, "kd_hf.report", "run", "--samples", "8")
    assert done.code == 0 and "report    run/report/index.html" in done.out, done
    assert (tmp_path / "run" / "report" / "losses.png").is_file()


@pytest.mark.parametrize(
    ("module", "options"), [("kd_hf.train", ["--push"]), ("kd_hf.report", []), ("kd_hf.compare", [])]
)
def test_a_run_folder_of_another_version(world, student, tmp_path, module, options):
    shutil.copytree(student / "run", tmp_path / "run")
    file = tmp_path / "run" / RESOLVED
    file.write_text(file.read_text().replace("hub:\n", "hub:\n  hub_colour: red\n"))
    before = local(tmp_path)
    done = world.launch(tmp_path, module, *options, "run")
    one_line(done, "'run' was written by another version of kd_hf: run/recipe.resolved.yaml", "'hub.hub_colour'")
    assert local(tmp_path) == before
