"""kd_hf with a real Hub over HTTP: every client runs unmodified, in a process of its own."""

import json
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_hf.data.digits import DigitsSource
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.run.log import read_log
from tests import runs
from tests.hub.server import User, serve
from tests.models.families import HF_VIT, VIT

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TOKEN, STRANGER = "hf_secretOfTheMember", "hf_secretOfAStranger"
FILES, ROWS, GROUP, NOTE = 3, 80, 16, 4000  # parquet files of the training split, rows in each, in a group, ballast
CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
"""

FOOTER = 1 << 16  # bytes that pyarrow reads from the end of a file

PUBLISH = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
for kind, folder, name, revision in json.load(sys.stdin):
    api.create_repo(name, repo_type=kind, exist_ok=True)
    if revision:
        api.create_branch(name, repo_type=kind, branch=revision)
    api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind, revision=revision)
api.create_tag("org/timm", tag="v1")
"""
# argv: images, file for the logits of each reader, then model ids with the revision after an @
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
# each data set streamed: one row, then all labels; then both ways in full
DATA = """
import sys
from kd_hf.recipe.config import DataConfig
from kd_hf.data.opening import open_source
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
import contextlib, io, json, logging, os, sys, time, traceback
import huggingface_hub
from kd_hf import errors
from kd_hf.train.__main__ import main
time.sleep = lambda seconds: None  # the client's pauses before it tries again are not the subject
for argv, token in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv[1:] = argv
    os.environ["HF_TOKEN"] = token
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.setStream(err)  # it would keep to the stream of its beginning
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            errors.run_command(main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    print("RESULT", json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


class Case(NamedTuple):
    """A mistake: a block of the recipe, its settings, what must be said, with which token, and before or in the run."""

    block: str
    settings: dict[str, Any]
    message: str
    token: str = ""
    begun: bool = False


def python(environment, *args, stdin=None):
    """Run Python in the environment of a client; what it wrote to both streams, after a good end."""
    hub_keys = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {key: value for key, value in runs.environment().items() if not key.startswith(hub_keys)}
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
    return done.stdout + done.stderr


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
    save_student(handle, folder, extra_files={"README.md": "---\npipeline_tag: image-classification\n---\n"})
    return handle.network


def make_uploads(root):
    """Networks by id, and what is to be published: kind, folder, id and branch."""
    networks = {
        "org/timm": make_student(root / "timm", "vit_tiny_patch16_224", 0, kwargs=VIT),
        "org/timm@try": make_student(root / "timm-try", "vit_tiny_patch16_224", 1, kwargs=VIT),
        "org/vit": make_student(root / "vit", "transformers/vit", 2, kwargs=HF_VIT),
    }
    (root / "bare").mkdir()
    (root / "bare" / "config.json").write_bytes((root / "timm" / "config.json").read_bytes())
    (root / "bare" / "pytorch_model.bin").write_bytes(b"pickle")
    listed, plain = write_data(root / "listed", True), write_data(root / "plain", False)
    folders = {"timm": root / "timm", "vit": root / "vit", "bare": root / "bare"}
    models = folders | dict.fromkeys(("private", "gated", "short", "corrupt", "down"), root / "timm")
    data = {"digits": listed, **dict.fromkeys(("plain", "private", "gated", "closed", "cut", "down", "late"), plain)}
    uploads = [("model", str(folder), f"org/{name}", None) for name, folder in models.items()]
    uploads += [("dataset", str(folder), f"org/{name}", None) for name, folder in data.items()]
    return networks, [*uploads, ("model", str(root / "timm-try"), "org/timm", "try")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub with models and data sets, put there by `huggingface_hub`."""
    root = tmp_path_factory.mktemp("world")
    networks, uploads = make_uploads(root)
    with serve(root / "hub", {TOKEN: User("ann", orgs=("org",)), STRANGER: User("eve")}) as hub:
        python(hub.environment(root / "up", TOKEN), "-c", PUBLISH, stdin=json.dumps(uploads))
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


@pytest.fixture
def one_thread():
    """Sums in the order of the subprocesses, which run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_models_by_id_in_every_reader(hub, tmp_path, one_thread):
    commit = hub.store.resolve("models", "org/timm", "v1")
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    ids = {name: name for name in hub.networks} | {"org/timm@v1": "org/timm", f"org/timm@{commit}": "org/timm"}
    files = [str(tmp_path / name) for name in ("pixels.safetensors", "logits.safetensors")]
    python(hub.environment(tmp_path / "home"), "-c", MODELS, *files, *ids)
    with torch.no_grad():
        outputs = {name: network.eval()(pixels) for name, network in hub.networks.items()}
    expected = {name: getattr(output, "logits", output) for name, output in outputs.items()}
    assert not torch.equal(expected["org/timm"], expected["org/timm@try"])
    found = load_file(files[1])
    assert len(found) == 3 * len(ids) - 1  # timm does not read the transformers layout
    different = [name for name, logits in found.items() if not logits.equal(expected[ids[name.split()[1]]])]
    assert not different, different


def test_data_streamed_and_whole(hub, tmp_path):
    hub.fail("drop", "^GET /cdn/.*org/plain.*train-00001")
    output = python(hub.environment(tmp_path / "home"), "-c", DATA, "org/digits", "org/plain")
    assert output.count(f"{FILES * ROWS} images in {FILES * ROWS // GROUP} row groups") == 2
    assert not [fault for fault in hub.faults if fault.times]
    for name in ("digits", "plain"):
        sizes = [entry["size"] for path, entry in files_of(hub, f"org/{name}").items() if "train-" in path]
        ranges = [request for request in hub.requests(f"^GET /cdn/.*org/{name}.*train-") if request.range]
        ends = {f"bytes={size - FOOTER}-{size - 1}" for size in sizes}
        one, *rest = [request.sent for request in ranges if request.range not in ends]
        assert one < GROUP * 2000  # one row: the images and labels of its group
        assert all(sent < 500 for sent in rest[: FILES * ROWS // GROUP])  # labels alone
        assert one + sum(rest) < sum(sizes) / 2  # and never the ballast


def files_of(hub, name):
    commit = hub.store.resolve("datasets", name, "main")
    return hub.store.read("datasets", name, commit)["files"]


def test_a_run_with_private_teacher_and_data_outlives_passing_faults(hub, tmp_path):
    hub.fail("drop", "^GET /cdn/.*org/private.*safetensors")
    hub.fail("status", "^GET /cdn/.*org/private.*train-00002", status=429, retry_after=0)
    hub.fail("status", "^GET /cdn/.*org/private.*validation", status=500)
    hub.fail("slow", "^GET /cdn/.*org/private.*train-00000", seconds=0.5)
    blocks = {
        "teacher": {"model": "org/private", "gate": {"enabled": False}},
        "methods": {"kd": {}},
        "data": {"path": "org/private", "streaming": True},
        "train": {"dataloader_num_workers": 1},
    }
    run = tmp_path / "run"
    file = runs.recipe_file(tmp_path / "recipe.yaml", run, blocks)
    output = python(hub.environment(tmp_path / "home", TOKEN), "-m", "kd_hf.train", str(file))
    assert not [fault for fault in hub.faults if fault.times]
    assert "org/private, split train, streamed" in output
    log = read_log(run)
    assert sum("kd/soft" in line for line in log) == runs.RECIPE["train"]["max_steps"]
    commit = hub.store.resolve("datasets", "org/private", "main")
    assert log[0]["data_revision"] == {"train": commit, "eval": commit}
    assert (run / "student" / "model.safetensors").is_file()
    assert TOKEN not in output
    holding = [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not holding


def check_mistakes(environment, tmp_path, cases):
    """Run ``kd_hf.train`` for each case over the tiny recipe: all must end in one line and exit code 2."""
    recipes = []
    for i, case in enumerate(cases):
        extra = {"gate": {"enabled": False}} if case.block == "teacher" else {"streaming": True}
        blocks = {case.block: {**extra, **case.settings}, "train": {"dataloader_num_workers": 1}}
        recipes.append(([str(runs.recipe_file(tmp_path / f"{i}.yaml", tmp_path / f"run{i}", blocks))], case.token))
    output = python(environment, "-c", COMMANDS, stdin=json.dumps(recipes))
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(cases)
    for i, ((code, out, err), case) in enumerate(zip(results, cases, strict=True)):
        *before, last = err.splitlines()
        assert code == 2 and last.startswith("kd_hf: error: ") and case.message in last, (case, err)
        assert (case.begun or not before) and "Traceback" not in err, (case, err)
        assert not case.token or case.token not in out + err
        left = {path.name for path in (tmp_path / f"run{i}").glob("*")}
        assert not left & {"student", "checkpoints", "report"}, (case, left)


NO_MODEL = "is neither a folder nor a repository on the Hub (a private one needs `hf auth login` or HF_TOKEN)"
NO_DATA = "Check the spelling; a private one needs `hf auth login` or HF_TOKEN"
GATED = "is gated: accept its terms on https://huggingface.co/org/gated, then `hf auth login`"
GATED_DATA = "Accept its terms on the Hub, then run `hf auth login` or set HF_TOKEN"


def forbidden():
    """What is not there, or not for the one who asks."""
    cases = [
        Case("teacher", {"model": "org/none"}, f"model 'org/none' {NO_MODEL}"),
        Case("teacher", {"model": "org/timm", "revision": "v9"}, "model 'org/timm' has no revision 'v9'"),
        Case("teacher", {"model": "org/bare"}, "'org/bare' has no safetensors weights"),
        Case("teacher", {"model": "org/timm"}, "the Hub does not accept the token; renew HF_TOKEN", "hf_unknown"),
        Case("data", {"path": "org/none"}, NO_DATA),
        Case("data", {"path": "org/digits", "revision": "v9"}, "on the Hub. Check `data.revision`"),
        Case("data", {"path": "org/digits"}, "Renew HF_TOKEN", "hf_unknown"),
    ]
    for token in ("", STRANGER):
        cases += [
            Case("teacher", {"model": "org/private"}, f"model 'org/private' {NO_MODEL}", token),
            Case("teacher", {"model": "org/gated"}, f"model 'org/gated' {GATED}", token),
            Case("data", {"path": "org/private"}, NO_DATA, token),
            Case("data", {"path": "org/gated"}, GATED_DATA, token),
            Case("data", {"path": "org/gated", "streaming": False}, GATED_DATA, token),
        ]
    return cases


def broken(hub):
    """What does not arrive, however often it is tried: faults of repositories of their own."""
    hub.fail("short", "^GET /cdn/.*org/short.*safetensors", times=99)
    hub.fail("corrupt", "^GET /cdn/.*org/corrupt.*safetensors", times=99)
    hub.fail("status", "^(GET|HEAD) .*org/down", status=500, times=99)
    hub.fail("status", "^(GET|HEAD) /org/vit/resolve/", status=429, retry_after=1, times=99)
    hub.fail("status", "^GET /cdn/.*org/closed", status=403, times=99)
    hub.fail("short", "^GET /cdn/.*org/cut.*train-00001", times=99)
    in_front = r"bytes=([0-3]\d{5}|\d{1,5})-"  # not the footer, which is read before training
    hub.fail("status", f"^GET /cdn/.*org/late.*train-.* {in_front}", status=429, retry_after=1, times=99)
    return [
        Case("teacher", {"model": "org/short"}, "could not be downloaded: OSError: Consistency check failed"),
        Case("teacher", {"model": "org/corrupt"}, "model.safetensors arrives damaged from the Hub"),
        Case("teacher", {"model": "org/down"}, "could not be downloaded: HfHubHTTPError: Server error '500"),
        Case("teacher", {"model": "org/vit"}, "the Hub asks for fewer requests; try again in some"),
        Case("data", {"path": "org/closed"}, "data.path: cannot read the Parquet file hf://datasets/org/closed@"),
        Case("data", {"path": "org/cut"}, "data.path: cannot read the Parquet file hf://datasets/org/cut@"),
        Case("data", {"path": "org/down"}, "Check the network (and HF_HUB_OFFLINE), or give a local folder"),
        Case("data", {"path": "org/late"}, "data.path: cannot read row group", begun=True),
    ]


def test_what_cannot_be_read_ends_in_one_line(hub, tmp_path):
    check_mistakes(hub.environment(tmp_path / "home"), tmp_path, [*forbidden(), *broken(hub)])


@pytest.mark.parametrize(
    ("changes", "model", "data"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "download it where there is a network (`hf download org/timm`)", "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached", "Check the network"),
    ],
    ids=["offline", "unreachable"],
)
def test_a_hub_that_cannot_be_asked(hub, tmp_path, changes, model, data):
    cases = [Case("teacher", {"model": "org/timm"}, model), Case("data", {"path": "org/digits"}, data)]
    check_mistakes(hub.environment(tmp_path / "home") | changes, tmp_path, cases)
    assert not hub.log
