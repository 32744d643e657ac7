"""kd_hf with a real Hub over HTTP: every client runs unmodified, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_hf.callbacks import read_log
from kd_hf.data.source import DigitsSource
from kd_hf.hub import save_student
from kd_hf.models.load import load_model
from tests import runs
from tests.hub.server import User, serve
from tests.models.families import HF_VIT, VIT

NAMES = tuple("zero one two three four five six seven eight nine".split())
TOKEN, STRANGER = "hf_secretOfTheMember", "hf_secretOfAStranger"
FILES, ROWS, GROUP, NOTE = 3, 80, 16, 4000  # parquet files of the training split, rows in each, in a group, ballast
CARD = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:\n"

PUBLISH = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
for kind, folder, name, revision in json.load(sys.stdin):
    api.create_repo(name, repo_type=kind, exist_ok=True)
    if revision:
        api.create_branch(name, repo_type=kind, branch=revision)
    print(api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind, revision=revision).oid)
api.create_tag("org/timm", tag="v1")
"""
# model ids as argv[2:], revision after the @; logits of each reader by name
MODELS = """
import sys, torch, timm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from kd_hf.models.load import load_model
pixels = load_file(sys.argv[1])["pixels"]
logits = {}
with torch.no_grad():
    for name in sys.argv[3:]:
        repository, _, revision = name.partition("@")
        handle = load_model(repository, pretrained=True, revision=revision or None)
        assert handle.label_names[0] == "zero", handle.label_names
        logits["kd_hf " + name] = handle.network(pixels)
        other = AutoModelForImageClassification.from_pretrained(repository, revision=revision or "main").eval()
        logits["auto " + name] = other(pixels).logits
        if "timm" in name:
            network = timm.create_model("hf-hub:" + name, pretrained=True).eval()
            logits["timm " + name] = network(pixels)
logits = {key: getattr(value, "logits", value).contiguous() for key, value in logits.items()}
save_file(logits, sys.argv[2])
"""
# each data set streamed: all labels, one row; then both ways in full
DATA = """
import sys
from kd_hf.config import DataConfig
from kd_hf.data.source import open_source
for name in sys.argv[1:]:
    streamed = open_source(DataConfig(path=name, streaming=True), "train")
    streamed.read(100)
    print(streamed.describe(), flush=True)
    print(streamed.labels().sum(), flush=True)
    whole = open_source(DataConfig(path=name), "train")
    assert streamed.class_names == whole.class_names and whole.class_names[9] == "nine", whole.class_names
    assert (streamed.labels() == whole.labels()).all() and len(streamed) == len(whole)
    assert all(streamed.read(row) == whole.read(row) for row in range(len(whole)))
    assert len(open_source(DataConfig(path=name, streaming=True), "eval")) == 40
"""
# the command line, several times in one process: importing torch and the libraries takes seconds
COMMANDS = """
import contextlib, io, json, sys, traceback
from kd_hf import errors, train
for argv in json.load(sys.stdin):
    out, code = io.StringIO(), None
    sys.argv[1:] = argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            errors.run_command(train.main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    print("RESULT", json.dumps([code, out.getvalue()]), flush=True)
"""


def python(environment, *args, stdin=None):
    """Run Python in the environment of a client; what it wrote, after a good end."""
    kept = {key: value for key, value in runs.environment().items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, *args],
        env=kept | environment,
        cwd=runs.ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_data(folder, listed):
    """The digits in several files and row groups; class names in the card, or in the Parquet schema."""
    digits = DigitsSource("train")
    rng = np.random.default_rng(0)
    names = {"names": list(NAMES), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": names, "note": {"dtype": "binary", "_type": "Value"}}
    metadata = None if listed else {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("note", pa.binary())], metadata=metadata)
    (folder / "data").mkdir(parents=True)
    parts = [(f"train-{i:05d}-of-{FILES:05d}", i * ROWS, ROWS) for i in range(FILES)]
    for name, start, count in [*parts, ("validation-00000-of-00001", 500, 40)]:
        rows = [digits.read(row) for row in range(start, start + count)]
        columns = [
            [{"bytes": data, "path": None} for data, _ in rows],
            [label for _, label in rows],
            [rng.bytes(NOTE) for _ in rows],
        ]
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        pq.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=GROUP)
    if listed:
        lines = "".join(f"          '{i}': {name}\n" for i, name in enumerate(NAMES))
        (folder / "README.md").write_text(f"{CARD}{lines}  - name: note\n    dtype: binary\n---\n# Digits\n")
    return folder


def make_student(folder, model, seed, **options):
    torch.manual_seed(seed)
    handle = load_model(model, num_classes=10, image_size=32, **options)
    handle.label_names = NAMES
    save_student(handle, folder, extra_files={"README.md": "---\nlibrary_name: timm\n---\n# Student\n"})
    return handle.network


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with models and data sets, put there by `huggingface_hub`."""
    root = tmp_path_factory.mktemp("world")
    networks = {
        "org/timm": make_student(root / "timm", "vit_tiny_patch16_224", 0, kwargs=VIT),
        "org/timm@try": make_student(root / "timm-try", "vit_tiny_patch16_224", 1, kwargs=VIT),
        "org/vit": make_student(root / "vit", "transformers/vit", 2, kwargs=HF_VIT),
    }
    bare = root / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((root / "timm" / "config.json").read_bytes())
    (bare / "pytorch_model.bin").write_bytes(b"pickle")
    models = ["timm", "vit", "bare", "private", "gated"]
    uploads = [("model", str(root / (n if n in ("vit", "bare") else "timm")), f"org/{n}", None) for n in models]
    uploads.append(("model", str(root / "timm-try"), "org/timm", "try"))
    listed, plain = write_data(root / "listed", True), write_data(root / "plain", False)
    for name, folder in {"digits": listed, "plain": plain, "private": plain, "gated": plain}.items():
        uploads.append(("dataset", str(folder), f"org/{name}", None))
    with serve(root / "hub", {TOKEN: User("ann", orgs=("org",)), STRANGER: User("eve")}) as hub:
        hub.commits = python(hub.environment(root / "up", TOKEN), "-c", PUBLISH, stdin=json.dumps(uploads)).split()
        for kind in ("models", "datasets"):
            hub.store.change(kind, "org/private", private=True)
            hub.store.change(kind, "org/gated", gated="auto")
        hub.networks = networks
        yield hub


@pytest.fixture
def hub(world):
    """The Hub without faults and with an empty log."""
    world.faults.clear()
    world.log.clear()
    return world


def test_models_by_id_in_every_reader(hub, tmp_path):
    first = hub.commits[0]
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    ids = {"org/timm": "org/timm", "org/timm@try": "org/timm@try", "org/timm@v1": "org/timm", "org/vit": "org/vit"}
    ids[f"org/timm@{first}"] = "org/timm"
    files = (str(tmp_path / "pixels.safetensors"), str(tmp_path / "logits.safetensors"))
    python(hub.environment(tmp_path / "home"), "-c", MODELS, *files, *ids)
    logits = load_file(files[1])
    with torch.no_grad():
        expected = {key: network(pixels) for key, network in hub.networks.items()}
    assert len(logits) == 5 * 2 + 4
    for name, value in logits.items():
        wanted = expected[ids[name.split()[1]]]
        assert torch.equal(value, getattr(wanted, "logits", wanted)), name


def test_data_streamed_and_whole(hub, tmp_path):
    output = python(hub.environment(tmp_path / "home"), "-c", DATA, "org/digits", "org/plain")
    assert output.count("240 images in 15 row groups") == 2
    size = sum(entry.stat().st_size for entry in Path(hub.store.root.parent / "plain" / "data").glob("train*"))
    ranges = [request for request in hub.requests("^GET /cdn/.*org/plain.*train-") if request.range]
    print(size, [(r.range, r.sent) for r in ranges])


@pytest.mark.parametrize("workers", [1])
def test_a_run_with_teacher_and_data_by_id(hub, tmp_path, workers):
    blocks = {
        "teacher": {"model": "org/vit", "gate": {"enabled": False}},
        "methods": {"kd": {}},
        "data": {"path": "org/private", "streaming": True},
        "train": {"dataloader_num_workers": workers},
    }
    file = runs.recipe_file(tmp_path / "r.yaml", tmp_path / "run", blocks)
    output = python(hub.environment(tmp_path / "home", TOKEN), "-m", "kd_hf.train", str(file))
    print(output, os.listdir(tmp_path / "run"), read_log(tmp_path / "run"))


def commands(environment, tmp_path, cases):
    """Exit code, output and run folder of ``kd_hf.train`` with each block over the tiny recipe."""
    argvs = [
        [str(runs.recipe_file(tmp_path / f"{i}.yaml", tmp_path / f"run{i}", block))] for i, block in enumerate(cases)
    ]
    output = python(environment, "-c", COMMANDS, stdin=json.dumps(argvs))
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    return [(code, text, tmp_path / f"run{i}") for i, (code, text) in enumerate(results)]


def test_errors(hub, tmp_path):
    T = lambda **k: {"teacher": {"gate": {"enabled": False}, **k}}
    D = lambda **k: {"data": {"streaming": True, **k}}
    print("=== bad token")
    cases = [T(model="org/timm"), D(path="org/digits")]
    for c in commands(hub.environment(tmp_path / "home", "hf_bad"), tmp_path, cases): print(c[0], c[1], c[2].exists())
    print("=== offline")
    for c in commands(hub.environment(tmp_path / "home2")|{"HF_HUB_OFFLINE":"1"}, tmp_path, cases): print(c[0], c[1], c[2].exists())
    print("=== unreachable")
    for c in commands(hub.environment(tmp_path / "home3")|{"HF_ENDPOINT":"http://127.0.0.1:9"}, tmp_path, cases): print(c[0], c[1], c[2].exists())
