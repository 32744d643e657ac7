"""Pushing runs to a real Hub on this machine, and fetching their checkpoints, by the real client."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import _http, are_progress_bars_disabled, logging

from kd_hf import hub_client
from kd_hf.errors import UserError, run_command
from kd_hf.hub.publisher import LAST, Publisher, fetch_checkpoint, push_run
from kd_hf.layout import LOG, RESOLVED
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.checkpoint import load_objects, read_state
from kd_hf.train.__main__ import main
from tests import runs
from tests.hub.folders import block, local, pushed, remote, titles, write_checkpoint, write_student
from tests.hub.server import User, serve

TOKEN, OTHER, READER = "hf_secretOfAnn", "hf_secretOfBob", "hf_secretOfAnnWhoReads"
USERS = {TOKEN: User("ann", orgs=("org",)), OTHER: User("bob"), READER: User("ann", orgs=("org",), writes=False)}
LINES = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, this process as its client; `pauses` holds the seconds that the client and kd_hf wanted to wait."""
    pauses = []
    clock = SimpleNamespace(sleep=pauses.append)
    for module in (_http, file_download, hub_client):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve(tmp_path / "hub", USERS) as server:
        server.pauses = pauses
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        home = {"HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_CACHE": str(tmp_path / "cache")}
        switches = {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "ENDPOINT": server.url}
        switches["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + template
        for name, value in (home | switches).items():
            monkeypatch.setattr(constants, name, value)
        yield server
    texts = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, text in texts.items() if b"hf_secret" in text]


@pytest.fixture
def run(tmp_path):
    """A finished run, as far as a push sees it."""
    folder = tmp_path / "digits"
    write_student(folder / "student", 0)
    resolved = dump_recipe(runs.recipe(folder))
    (folder / RESOLVED).write_text(resolved)
    (folder / "student" / RESOLVED).write_text(resolved)
    (folder / LOG).write_text(LINES)
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def publisher(hub, run, said):
    """Ready to push to ``ann/digits``."""
    result = Publisher(block(run), run, said.append)
    result.prepare()
    return result


def one_line(error, *parts):
    text = str(error)
    assert "\n" not in text and "hf_secret" not in text and "Traceback" not in text, text
    assert all(part in text for part in parts), text


# ------------------------------------------------------------------------------------------------ pushing


def test_a_push_is_the_artefact_and_the_log_in_one_commit(hub, run):
    expected = pushed(run)
    (run / "student" / "optimizer.pt").write_bytes(b"pickle")
    (run / "student" / "report" / "arguments.bin").write_bytes(b"pickle")
    with (run / LOG).open("a") as file:
        file.write('{"step": 3, "lo')  # being written
    assert push_run(run) == f"{hub.url}/ann/digits"
    assert remote(hub) == expected and {".eval_results/digits.yaml", "report/curve.png", RESOLVED} < expected.keys()
    assert titles(hub) == ["initial commit", "End of training"]
    assert not hub.store.repo("models", "ann/digits")["private"]
    assert push_run(run) == f"{hub.url}/ann/digits"
    assert remote(hub) == expected and len(titles(hub)) == 2
    assert not hub.pauses


@pytest.mark.parametrize(
    ("given", "name"), [(None, "ann/digits"), ("bare", "ann/bare"), ("ann/full", "ann/full"), ("org/x", "org/x")]
)
def test_names(hub, run, given, name):
    settings = [f"hub.hub_model_id={given}"] if given else []
    assert push_run(run, settings) == f"{hub.url}/{name}"
    assert remote(hub, name) == pushed(run)


def test_a_branch_and_a_private_repository(hub, run):
    settings = ["hub.hub_revision=try/it", "hub.hub_private_repo=true"]
    assert push_run(run, settings) == f"{hub.url}/ann/digits/tree/try%2Fit"
    assert remote(hub, branch="try/it") == pushed(run) and not remote(hub)
    assert hub.store.repo("models", "ann/digits")["private"]
    (run / "student" / "config.json").write_text("{}")
    push_run(run, settings)
    assert remote(hub, branch="try/it") == pushed(run) and not remote(hub)
    assert titles(hub, branch="try/it")[1:] == ["End of training"] * 2


def test_a_public_repository_is_not_taken_for_private(hub, run):
    push_run(run)
    with pytest.raises(UserError) as caught:
        push_run(run, ["hub.hub_private_repo=true"])
    one_line(caught.value, "hub.hub_private_repo: 'ann/digits' exists already and is public")


def test_another_student_replaces_what_a_push_left_and_nothing_else(hub, run):
    write_student(run / "student", 1, weights="model-00001-of-00001.safetensors", picture="old.png")
    for name in ("model.safetensors.index.json", "preprocessor_config.json"):
        (run / "student" / name).write_text("{}")
    push_run(run)
    owned = {"NOTES.md": b"mine", "onnx/model.safetensors": b"mine", "models.md": b"mine"}
    hub.store.write("models", "ann/digits", owned)
    assert "report/old.png" in remote(hub)
    for path in ("model-00001-of-00001.safetensors", "report/old.png"):
        (run / "student" / path).unlink()
    for name in ("model.safetensors.index.json", "preprocessor_config.json"):
        (run / "student" / name).unlink()
    push_run(run)
    assert remote(hub) == pushed(run) | owned


PASSING = [
    ("status", "^POST /api/repos/create", {"status": 503}),
    ("status", "^GET .*/auth-check", {"status": 500}),
    ("status", "^GET .*/tree/", {"status": 502}),
    ("status", "^POST /api/validate-yaml", {"status": 500}),
    ("status", "^POST .*/preupload/", {"status": 429, "retry_after": 7}),
    ("status", "^POST .*/objects/batch", {"status": 500}),
    ("status", "^PUT /lfs/", {"status": 500}),
    ("hang_up", "^PUT /lfs/", {}),
    ("status", "^POST .*/commit/", {"status": 429, "retry_after": 7}),
    ("status", "^POST .*/commit/", {"status": 412}),
    ("hang_up", "^POST .*/commit/", {}),
    ("drop", "^POST .*/commit/", {}),  # the commit is made, the answer lost
    ("slow", "^POST .*/commit/", {"seconds": 0.1}),
]


@pytest.mark.parametrize(("kind", "pattern", "options"), PASSING, ids=lambda value: str(value))
def test_passing_faults_are_outlived(hub, run, kind, pattern, options):
    fault = hub.fail(kind, pattern, **options)
    push_run(run)
    assert fault.times == 0 and remote(hub) == pushed(run)
    assert titles(hub) == ["initial commit", "End of training"]
    assert kind == "slow" or max(hub.pauses) >= options.get("retry_after", 1)


LASTING = [
    ("status", "^GET .*/tree/", {"status": 500}, "the Hub is out of order (500); try again later"),
    ("status", "^POST .*/preupload/", {"status": 500}, "the Hub is out of order (500); try again later"),
    ("status", "^PUT /lfs/", {"status": 400}, "the Hub refuses it (BadRequestError"),
    ("hang_up", "^PUT /lfs/", {}, "the Hub cannot be reached ("),
    ("status", "^POST .*/commit/", {"status": 401}, "the Hub does not accept the token; run `hf auth login`"),
    ("status", "^POST .*/commit/", {"status": 402}, "storage or plan does not allow it"),
    ("status", "^POST .*/commit/", {"status": 403}, "the token may not write there; give it write permission"),
    ("status", "^POST .*/commit/", {"status": 404}, "no such repository or branch"),
    ("status", "^POST .*/commit/", {"status": 409}, "another commit was made at the same time"),
    ("status", "^POST .*/commit/", {"status": 413}, "the Hub refuses an upload of that size"),
    ("status", "^POST .*/commit/", {"status": 418}, "the Hub refuses it (HfHubHTTPError: Client error '418"),
    ("status", "^POST .*/commit/", {"status": 429, "retry_after": 9999}, "the Hub asks for fewer requests"),
    ("status", "^POST .*/commit/", {"status": 504}, "the Hub is out of order (504); try again later"),
    ("hang_up", "^POST .*/commit/", {}, "the Hub cannot be reached ("),
]


def test_lasting_faults_leave_all_as_it_was_and_repeating_helps(hub, run, publisher):
    publisher.finish(run / "student", "first")
    for i, (kind, pattern, options, message) in enumerate(LASTING):
        before, commits = remote(hub), len(titles(hub))
        write_student(run / "student", i + 1)
        expected = local(run)
        fault = hub.fail(kind, pattern, times=999, **options)
        with pytest.raises(UserError) as caught:
            publisher.finish(run / "student")
        one_line(caught.value, "hub: 'ann/digits': the push failed: ", message, f"the run in {run} is whole, `python")
        assert f"`python -m kd_hf.train --push {run}` repeats it" in str(caught.value)
        assert fault.times < 999 and remote(hub) == before and local(run) == expected
        assert max(hub.pauses, default=0) <= 300
        hub.faults.clear()
        push_run(run)
        assert remote(hub) == pushed(run) and len(titles(hub)) == commits + 1


# ------------------------------------------------------------------------------------- before the first step


def prepare(folder, **values):
    publisher = Publisher(block(folder, **values), folder, print)
    publisher.prepare()
    return publisher


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("", None, "there is no token; run `hf auth login`, or set HF_TOKEN"),
        ("", "ann/x", "there is no token; run `hf auth login`, or set HF_TOKEN"),
        ("hf_secretThatIsNone", None, "the Hub does not accept the token"),
        ("hf_secretThatIsNone", "ann/x", "the Hub does not accept the token"),
        ("hf_secretÄ", "ann/x", "the Hub does not accept the token"),
        (READER, "ann/x", "the token may not write there; give it write permission"),
        (READER, "org/theirs", "the token may not write there; give it write permission"),
        (OTHER, "ann/x", "it belongs to 'ann', and the token to 'bob'; choose another hub.hub_model_id"),
        (OTHER, "org/theirs", "it belongs to 'org', and the token to 'bob'; choose another hub.hub_model_id"),
        (TOKEN, "a/b/c", "no valid id ("),
        (TOKEN, "ann/two words", "no valid id ("),
    ],
)
def test_what_forbids_a_push_is_told_before_the_first_step(hub, run, monkeypatch, token, name, message):
    hub.store.write("models", "org/theirs", {"README.md": b"# Theirs"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        prepare(run, hub_model_id=name)
    one_line(caught.value, message)
    assert remote(hub, "org/theirs") == {"README.md": b"# Theirs"}
    assert not (hub.store.root / "models" / "ann").exists()


def test_a_quoted_header_is_not_shown(hub, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise HTTPError(f"Illegal header value b'Bearer {TOKEN}\\x01 and more'")

    monkeypatch.setattr(HfApi, "auth_check", refuse)
    with pytest.raises(UserError) as caught:
        prepare(run)
    one_line(caught.value, "the Hub cannot be reached (HTTPError: Illegal header value b'")
    assert "more" not in str(caught.value)


def test_a_folder_whose_name_is_no_id(hub, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(tmp_path / "run no 1")
    one_line(caught.value, "no valid id (", "run no 1", "set hub.hub_model_id to user/name")


def test_offline_and_unreachable(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (None, "ann/x"):
        with pytest.raises(UserError) as caught:
            prepare(run, hub_model_id=name)
        one_line(caught.value, "HF_HUB_OFFLINE=1 is set; unset it, or train with hub.push_to_hub=false")
    assert not hub.log and not hub.pauses
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        prepare(run)
    one_line(caught.value, "the Hub cannot be reached (ConnectError", "check the network, and HF_ENDPOINT")
    assert sum(hub.pauses) < 10


# ------------------------------------------------------------------------------------------- in the background


def test_a_background_push_is_of_the_moment_it_was_asked_for(hub, run, publisher, said):
    expected = pushed(run)
    write_student(run / ".push" / "student", 2)  # left by a run that was killed
    hub.fail("slow", "^GET .*/tree/", seconds=0.3)
    publisher.in_background(run / "student", "step 2")
    for path in (run / "student").rglob("*"):
        if path.is_file():
            path.unlink()
    write_student(run / "student", 1)
    assert publisher.busy
    publisher._push.result()
    assert remote(hub) == expected and titles(hub)[1:] == ["step 2"]
    assert not said and not (run / ".push").exists()


def test_a_background_failure_is_told_and_not_raised(hub, run, publisher, said, caplog):
    level = logging.get_verbosity()
    hub.fail("status", "^POST .*/preupload/", times=999)
    publisher.in_background(run / "student", "step 2")
    publisher._push.result()
    assert len(said) == 1 and not remote(hub) and not (run / ".push").exists()
    one_line(said[0], "hub: 'ann/digits': this push failed, the training goes on: the Hub is out of order (500)")
    assert not caplog.records and logging.get_verbosity() == level and not are_progress_bars_disabled()
    hub.faults.clear()
    publisher.in_background(run / "student", "step 4")
    publisher._push.result()
    publisher.finish(run / "student")
    assert len(said) == 1 and remote(hub) == pushed(run) and titles(hub)[1:] == ["step 4"]


def test_a_background_push_of_nothing_is_told(hub, run, publisher, said):
    publisher.in_background(run / "student", "step 2", run / "nowhere")
    assert not publisher.busy and len(said) == 1 and not (run / ".push").exists()
    one_line(said[0], "hub: this push was left out, the training goes on", "nowhere")


def test_pushes_during_a_push_are_left_out_and_the_end_waits(hub, run, publisher, said):
    hub.fail("slow", "^POST .*/commit/", seconds=0.5)
    for step in (2, 4, 6):
        publisher.in_background(run / "student", f"step {step}")
    assert len(said) == 1
    one_line(said[0], "hub: the last push is still running")
    # a new folder, as a trainer's: what is being pushed must not be written to in place
    (run / "student").rename(run / "earlier")
    shutil.copytree(run / "earlier", run / "student")
    write_student(run / "student", 1)
    publisher.finish(run / "student")
    assert titles(hub)[1:] == ["step 2", "End of training"] and remote(hub) == pushed(run)
    one_line(said[1], "hub: waiting for the push in the background")
    publisher.in_background(run / "student", "late")
    assert len(said) == 2


def test_the_checkpoint_is_replaced_kept_and_removed(hub, run, publisher, said):
    for step in (2, 4):
        checkpoint = write_checkpoint(run, step)
        expected = pushed(run) | {f"{LAST}/{name}": text for name, text in local(checkpoint).items()}
        (checkpoint / "extra.safetensors").write_bytes(bytes(step))  # one that the next checkpoint does not have
        expected[f"{LAST}/extra.safetensors"] = bytes(step)
        if step == 4:
            (checkpoint / "extra.safetensors").unlink()
            del expected[f"{LAST}/extra.safetensors"]
        publisher.in_background(run / "student", f"step {step}", checkpoint)
        publisher._push.result()
        assert remote(hub) == expected
    write_student(run / "student", 1)
    publisher.in_background(run / "student", "step 5")
    publisher._push.result()
    assert remote(hub) == expected | pushed(run)
    publisher.finish(run / "student")
    assert remote(hub) == pushed(run)
    assert not said and titles(hub)[1:] == ["step 2", "step 4", "step 5", "End of training"]
    assert not [path for path in remote(hub) if path.endswith(".pt")]


# --------------------------------------------------------------------------------------------------- fetching


@pytest.fixture
def away(run, publisher):
    """A run whose machine is gone, with its newest checkpoint on the Hub; the checkpoint's files and the Hub's."""
    checkpoint = write_checkpoint(run, 4)
    publisher.in_background(run / "student", "step 4", checkpoint)
    publisher._push.result()
    return local(checkpoint)


def test_a_checkpoint_comes_back_as_it_was(hub, run, away, publisher, tmp_path):
    there, cfg = tmp_path / "new" / "digits", block(run)
    found = fetch_checkpoint(cfg, there)
    assert found == there / "checkpoints" / "checkpoint-4" and local(found) == away
    assert read_state(found).step == 4 and load_objects(found, "optimizer") == {"lr": 0.4}
    assert (there / LOG).read_text() == LINES and (there / RESOLVED).read_text() == (run / RESOLVED).read_text()
    assert sorted(path.name for path in there.iterdir()) == sorted(["checkpoints", LOG, RESOLVED])
    assert not (tmp_path / "cache").exists()
    (there / LOG).write_text("other\n")
    fetch_checkpoint(cfg, there)
    assert (there / LOG).read_text() == "other\n" and local(found) == away
    publisher.finish(run / "student")
    assert fetch_checkpoint(cfg, tmp_path / "late" / "digits") is None


@pytest.mark.parametrize("values", [{"hub_model_id": "ann/none"}, {"hub_revision": "none"}, {"hub_model_id": "bob/x"}])
def test_nothing_to_fetch(hub, run, away, tmp_path, values):
    assert fetch_checkpoint(block(run, **values), tmp_path / "there") is None
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(("token", "message"), [("", "there is no token"), ("hf_secretThatIsNone", "accept the token")])
def test_a_wrong_token_is_not_a_missing_repository(hub, run, away, tmp_path, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as caught:
        fetch_checkpoint(block(run, hub_model_id="ann/digits"), tmp_path / "there")
    one_line(caught.value, message)


def test_a_refusal_is_not_a_missing_repository(hub, run, away, tmp_path, monkeypatch):
    # on https the client takes most answers of 401 for a repository that is not there
    monkeypatch.setattr(_http, "REPO_API_REGEX", re.compile("/api/models/"))
    hub.fail("status", "^GET /api/models/", status=401)
    with pytest.raises(UserError) as caught:
        fetch_checkpoint(block(run), tmp_path / "digits2" / "digits")
    one_line(caught.value, "the Hub does not accept the token")


def test_the_token_is_sent_even_where_it_is_not_by_default(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    push_run(run)
    assert remote(hub) == pushed(run)


@pytest.mark.parametrize("kind", ["drop", "short", "corrupt", "status", "slow"])
@pytest.mark.parametrize("file", ["cdn/.*module.safetensors", "ann/digits/.*optimizer.pt"])
def test_a_checkpoint_that_did_not_arrive_whole_is_none(hub, run, away, tmp_path, kind, file):
    there, cfg = tmp_path / "digits2", block(run, hub_model_id="ann/digits")
    lasting = kind != "slow"
    hub.fail(kind, f"^GET /{file}", times=999 if lasting else 1, seconds=0.2)
    if lasting:
        with pytest.raises(UserError) as caught:
            fetch_checkpoint(cfg, there)
        one_line(caught.value, f"hub: 'ann/digits': cannot fetch {LAST}: ")
        assert not (there / "checkpoints").exists() and not (there / LOG).exists()
    hub.faults.clear()
    passing = hub.fail(kind, f"^GET /{file}", seconds=0.2)
    assert local(fetch_checkpoint(cfg, there)) == away
    assert passing.times == 0 or kind == "drop"  # what had arrived before was not asked for again
    assert not (there / ".fetch").exists()


def test_a_dropped_download_is_continued(hub, run, away, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 10)
    hub.fail("drop", "^GET /cdn/.*module.safetensors")
    left = tmp_path / "new" / "digits" / ".fetch" / LAST
    left.mkdir(parents=True)
    (left / "older.safetensors").write_bytes(b"of a checkpoint that has been replaced since")
    assert local(fetch_checkpoint(block(run), tmp_path / "new" / "digits")) == away
    ranges = [request.range for request in hub.requests("^GET /cdn/.*module.safetensors")]
    assert ranges[0] is None and ranges[1].startswith("bytes=")


@pytest.mark.parametrize("change", ["cut", "missing", "nameless"])
def test_a_checkpoint_that_is_not_whole_on_the_hub_is_none(hub, run, publisher, tmp_path, change):
    checkpoint = write_checkpoint(run, 4)
    if change == "cut":
        (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:-1])
    elif change == "missing":
        (checkpoint / "optimizer.pt").unlink()
    else:
        state = json.loads((checkpoint / "state.json").read_text()) | {"step": "../../4"}
        (checkpoint / "state.json").write_text(json.dumps(state))
    publisher.in_background(run / "student", "step 4", checkpoint)
    publisher._push.result()
    with pytest.raises(UserError) as caught:
        fetch_checkpoint(block(run), tmp_path / "new" / "digits")
    one_line(caught.value, f"hub: {LAST} of 'ann/digits' is no whole checkpoint", "train.resume_from_checkpoint=false")
    assert not local(tmp_path / "new" / "digits")


# ------------------------------------------------------------------------------------------------- the command


def test_the_command(hub, run, tmp_path):
    environment = runs.environment() | hub.environment(tmp_path / "home", TOKEN)
    done = subprocess.run(
        [sys.executable, "-m", "kd_hf.train", "--push", str(run), "hub.hub_model_id=org/x"],
        env=environment,
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed to {hub.url}/org/x\n" and "hf_secret" not in done.stderr
    assert remote(hub, "org/x") == pushed(run)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "no run folder '"),
        ("unfinished", "holds no student yet (its training has not ended)"),
        ("override", "'train.seed=1': with --push, only hub.… can be set"),
        ("key", "unknown key 'hub.hub_model'. Did you mean 'hub_model_id'?"),
        ("token", "hub: there is no token"),
    ],
)
def test_mistakes_of_the_command(hub, run, monkeypatch, capsys, case, message):
    settings = {"override": ["train.seed=1"], "key": ["hub.hub_model=x"]}.get(case, [])
    if case == "unfinished":
        os.remove(run / "student" / "config.json")
    if case == "token":
        monkeypatch.delenv("HF_TOKEN")
    before = local(run)
    monkeypatch.setattr(sys, "argv", ["train", "--push", str(run) + "x" * (case == "missing"), *settings])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out and err.startswith("kd_hf: error: ") and err.count("\n") == 1
    one_line(err.rstrip(), message)
    assert local(run) == before and not (hub.store.root / "models").exists()


def test_other_processes_of_a_launch_push_nothing(hub, run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["--push", str(run)]) == 0
    assert not hub.log
