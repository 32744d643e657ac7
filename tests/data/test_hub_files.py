"""Files of Hub data sets over HTTP, in a process of its own: tar files, and what is said about addresses."""

import json
import subprocess
import sys

import pytest

from tests import runs
from tests.data.conftest import encode, make_image, write_parquet, write_tar
from tests.detection import scenes
from tests.hub.server import serve

# each line: a `data` block and a split; answers with what was found, or with the message
OPEN = """
import json, sys, time
from kd_hf.recipe.config import DataConfig
from kd_hf.data.opening import open_source
from kd_hf.detection.data.opening import open_boxes
from kd_hf.errors import UserError
time.sleep = lambda seconds: None  # the client's pauses before it tries again are not the subject
for block, split in json.load(sys.stdin):
    try:
        cfg = DataConfig(**block)
        source = open_boxes(cfg, split) if cfg.boxes else open_source(cfg, split)
        told = str if cfg.boxes else lambda label: label
        rows = [[data.hex(), told(label)] for data, label in map(source.read, range(len(source)))]
        print(json.dumps([source.class_names, source.group_sizes, rows, source.revision]), flush=True)
    except UserError as error:
        print(json.dumps(str(error)), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with tar files, whose labels are names, and with Parquet files."""
    root = tmp_path_factory.mktemp("hub")
    names = ("ant", "bee", "cat")
    for name, rows in {"train-0": range(3), "train-1": range(3, 5), "validation-0": range(1, 3)}.items():
        samples = {f"{i}": {"png": encode(make_image(i)), "cls": names[i % 3]} for i in rows}
        write_tar(root / f"{name}.tar", samples)
    with serve(root / "state") as server:
        server.store.write("datasets", "org/tars", {path.name: path.read_bytes() for path in root.glob("*.tar")})
        write_parquet(root / "train.parquet", 8)
        server.store.write("datasets", "org/table", {"train.parquet": (root / "train.parquet").read_bytes()})
        server.store.write("datasets", "org/table", {"LICENSE": b"mine"})
        scenes.write_parquet(root / "boxes.parquet", [scenes.scene(index) for index in range(3)])
        server.store.write("datasets", "org/boxes", {"train.parquet": (root / "boxes.parquet").read_bytes()})
        yield server


def opened(hub, home, *requests):
    kept = {key: value for key, value in runs.environment().items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", OPEN],
        env=kept | hub.environment(home),
        cwd=runs.ROOT,
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_tar_files_are_downloaded_and_read_like_local_ones(hub, tmp_path):
    block = {"path": "org/tars"}
    found = opened(
        hub, tmp_path, [block, "eval"], [block, "train"], [block, "eval"], [block | {"streaming": True}, "eval"]
    )
    commit = hub.store.resolve("datasets", "org/tars", "main")
    pictures = [[encode(make_image(i)).hex(), i % 3] for i in range(5)]
    # an evaluation by itself does not download the training split to learn its classes
    assert found[0] == [["bee", "cat"], [2], [[pictures[1][0], 0], [pictures[2][0], 1]], commit]
    assert found[1] == [["ant", "bee", "cat"], [3, 2], pictures, commit]
    assert found[2] == [["ant", "bee", "cat"], [2], pictures[1:3], commit]
    assert found[3].startswith("data.streaming: the tar files of 'org/tars' are downloaded before they are read; set")
    assert len(hub.requests(r"^GET .*train-0\.tar")) <= 2  # the redirection and the file, once


def test_errors_show_addresses_without_their_signature(hub, tmp_path):
    hub.fail("status", r"^GET /cdn/.*table", status=403, times=99)
    found = opened(
        hub,
        tmp_path,
        [{"path": "org/table", "streaming": True}, "train"],
        [{"path": "org/table"}, "train"],
    )
    for message in found:
        assert message.startswith("data.path: ") and "/cdn/" in message, message
        assert "?repo=" not in message and "file=" not in message, message


def test_a_prepared_table_is_in_the_same_order_without_the_hub(hub, tmp_path):
    hub.faults.clear()
    (online,) = opened(hub, tmp_path, [{"path": "org/table"}, "train"])
    hub.fail("status", ".", status=503, times=999)
    try:
        (offline,) = opened(hub, tmp_path, [{"path": "org/table"}, "train"])
    finally:
        hub.faults.clear()
    assert offline == online and online[1] == [4, 4]
    assert online[3] == hub.store.resolve("datasets", "org/table", "main")


def test_the_commit_that_was_resolved_is_known(hub, tmp_path):
    hub.faults.clear()
    newest = hub.store.resolve("datasets", "org/table", "main")
    older = hub.store.read("datasets", "org/table", newest)["parent"]
    block = {"path": "org/table", "streaming": True}
    boxes = {"path": "org/boxes", "streaming": True, "boxes": {}}
    few, pinned, detection = opened(
        hub,
        tmp_path,
        [block | {"num_labels": 6}, "train"],
        [block | {"revision": older[:8]}, "train"],
        [boxes, "train"],
    )
    assert (few[3], pinned[3]) == (newest, older)
    assert detection[3] == hub.store.resolve("datasets", "org/boxes", "main")
