import hashlib
import http.client
import os
import re
import time

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.server import User, serve

LARGE = bytes(range(256)) * 8192  # 2 MiB
USERS = {
    "hf_ann": User("ann", orgs=("org",)),
    "hf_bob": User("bob"),
    "hf_eve": User("eve", accepted=("org/gated",)),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name, value in {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve(tmp_path / "hub", USERS) as server:
        yield server


def api(hub, token="hf_ann"):
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture
def repo(hub, tmp_path):
    """A repository of two commits: ``small.txt``, ``data/large.bin``."""
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "small.txt").write_text("one")
    (folder / "data" / "large.bin").write_bytes(LARGE)
    api(hub).create_repo("org/name")
    api(hub).upload_folder(repo_id="org/name", folder_path=folder)
    return "org/name"


def download(hub, repo, path, token=False, **options):
    with open(hf_hub_download(repo, path, endpoint=hub.url, token=token, **options), "rb") as file:
        return file.read()


def test_creating_twice(hub):
    url = api(hub).create_repo("org/name", repo_type="dataset")
    assert (url.repo_id, url.repo_type) == ("org/name", "dataset")
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub).create_repo("org/name", repo_type="dataset")
    assert caught.value.response.status_code == 409
    assert api(hub).create_repo("org/name", repo_type="dataset", exist_ok=True).repo_id == "org/name"
    assert api(hub).create_repo("own").repo_id == "ann/own"
    assert api(hub).whoami()["name"] == "ann"


def test_upload_and_download(hub, repo):
    assert download(hub, repo, "small.txt") == b"one"
    assert download(hub, repo, "data/large.bin") == LARGE
    info = api(hub).model_info(repo)
    assert [sibling.rfilename for sibling in info.siblings] == ["data/large.bin", "small.txt"] and not info.private
    folder = snapshot_download(repo, endpoint=hub.url, token=False)
    assert folder.endswith(info.sha) and sorted(os.listdir(folder)) == ["data", "small.txt"]


def test_lists_of_files(hub, repo):
    flat = {item.path: item for item in api(hub).list_repo_tree(repo)}
    assert sorted(flat) == ["data", "small.txt"] and flat["small.txt"].size == 3
    deep = {item.path: item for item in api(hub).list_repo_tree(repo, recursive=True)}
    assert deep["data/large.bin"].lfs.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert [item.path for item in api(hub).list_repo_tree(repo, "data")] == ["data/large.bin"]
    found = api(hub).get_paths_info(repo, ["data", "small.txt", "nowhere"])
    assert sorted(item.path for item in found) == ["data", "small.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree(repo, "nowhere"))


def test_commits_branches_and_tags(hub, repo):
    client = api(hub)
    first = client.model_info(repo).sha
    client.create_tag(repo, tag="v1")
    client.create_branch(repo, branch="try/it")
    change = [CommitOperationAdd("small.txt", b"two"), CommitOperationDelete("data/", is_folder=True)]
    second = client.create_commit(repo, change, commit_message="second", revision="try/it").oid
    assert client.model_info(repo, revision="try/it").sha == second != first == client.model_info(repo).sha
    assert client.list_repo_files(repo, revision="try/it") == ["small.txt"]
    for revision, text in (("main", b"one"), ("v1", b"one"), (first, b"one"), ("try/it", b"two"), (second, b"two")):
        assert download(hub, repo, "small.txt", revision=revision) == text
    refs = client.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "try/it": second}
    assert [ref.name for ref in refs.tags] == ["v1"]
    with pytest.raises(HfHubHTTPError) as caught:
        client.create_commit(repo, change[1:], commit_message="late", revision="try/it", parent_commit=first)
    assert caught.value.response.status_code == 412


def test_what_is_stored_is_not_uploaded_again(hub, repo, tmp_path):
    api(hub).create_repo("org/other")
    api(hub).upload_folder(repo_id="org/other", folder_path=tmp_path / "folder")
    assert len(hub.requests("^PUT /lfs/")) == 1
    assert download(hub, "org/other", "data/large.bin") == LARGE


def test_state_outlives_the_server(hub, repo, tmp_path):
    with serve(tmp_path / "hub") as again:
        assert download(again, repo, "small.txt") == b"one"


def test_what_is_not_there(hub, repo):
    with pytest.raises(EntryNotFoundError):
        download(hub, repo, "none.txt")
    with pytest.raises(RevisionNotFoundError):
        download(hub, repo, "small.txt", revision="v9")
    for token, status in ((False, 401), ("hf_ann", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).model_info("org/none")
        assert caught.value.response.status_code == status
    with pytest.raises(RepositoryNotFoundError):
        api(hub).dataset_info(repo)


def test_private(hub, repo):
    hub.store.change("models", repo, private=True)
    for token, status in ((False, 401), ("hf_bob", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            download(hub, repo, "small.txt", token=token)
        assert caught.value.response.status_code == status
    assert download(hub, repo, "small.txt", token="hf_ann") == b"one"
    assert api(hub).model_info(repo).private


def test_gated(hub, repo):
    api(hub).create_repo("org/gated")
    api(hub).upload_file(path_or_fileobj=b"terms", path_in_repo="file.txt", repo_id="org/gated")
    hub.store.change("models", "org/gated", gated="auto")
    assert api(hub, False).model_info("org/gated").gated == "auto"  # the description is open
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(GatedRepoError) as caught:
            download(hub, "org/gated", "file.txt", token=token)
        assert caught.value.response.status_code == status
    assert download(hub, "org/gated", "file.txt", token="hf_eve") == b"terms"


def test_tokens(hub, repo):
    with pytest.raises(HfHubHTTPError, match="401"):
        api(hub, "hf_wrong").model_info(repo)
    for token, status in ((False, 401), ("hf_bob", 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            api(hub, token).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo)
        assert caught.value.response.status_code == status
    assert "hf_" not in "".join(map(repr, hub.log))


def test_only_a_range_is_sent(hub, repo):
    files = HfFileSystem(endpoint=hub.url, token=False, skip_instance_cache=True)
    with files.open(f"{repo}/data/large.bin", "rb", block_size=1000, cache_type="none") as file:
        file.seek(70_001)
        assert file.read(500) == LARGE[70_001:70_501]
    assert [(line.range, line.status, line.sent) for line in hub.requests("^GET /cdn/")] == [
        ("bytes=70001-70500", 206, 500)
    ]


@pytest.mark.parametrize(
    ("wanted", "status", "body"),
    [
        ("bytes=0-3", 206, LARGE[:4]),
        ("bytes=-4", 206, LARGE[-4:]),
        (f"bytes={len(LARGE) - 2}-{len(LARGE) + 9}", 206, LARGE[-2:]),
        (f"bytes={len(LARGE)}-", 416, b""),
    ],
)
def test_forms_of_a_range(hub, repo, wanted, status, body):
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port)
    connection.request("GET", f"/cdn/{hashlib.sha256(LARGE).hexdigest()}", headers={"Range": wanted})
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, body)
    connection.close()


def test_clients_outlive_passing_faults(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.fail("status", "^GET .*/small.txt", status=429, retry_after=0)
    assert download(hub, repo, "small.txt") == b"one"
    hub.fail("drop", "^GET /cdn/.*large")
    assert download(hub, repo, "data/large.bin") == LARGE
    ranges = [line.range for line in hub.requests("^GET /cdn/")]
    assert ranges[0] is None and re.fullmatch(r"bytes=\d+-", ranges[1])  # resumed, not begun again
    assert all(fault.times == 0 for fault in hub.faults)
    files = HfFileSystem(endpoint=hub.url, token=False, skip_instance_cache=True)
    hub.fail("status", "^GET /cdn/", status=500)
    assert files.cat_file(f"{repo}/data/large.bin", start=10, end=20) == LARGE[10:20]


def test_faults_the_client_sees(hub, repo):
    hub.fail("short", "^GET /cdn/")
    with pytest.raises(OSError):
        download(hub, repo, "data/large.bin")
    hub.fail("corrupt", "^GET .*/small.txt")
    assert download(hub, repo, "small.txt") == bytes(byte ^ 0xFF for byte in b"one")
    hub.fail("slow", "^GET .*/small.txt", seconds=0.3)
    start = time.monotonic()
    download(hub, repo, "small.txt", force_download=True)
    assert time.monotonic() - start >= 0.09  # three bytes, three pieces


def test_a_wrong_checksum_is_refused(hub):
    connection = http.client.HTTPConnection("127.0.0.1", hub.server_port)
    connection.request("PUT", f"/lfs/{'0' * 64}", body=b"something")
    assert connection.getresponse().status == 400
    connection.close()


def test_who_may_write(hub, repo):
    api(hub).auth_check(repo, write=True)
    hub.users["hf_read"] = User("ann", orgs=("org",), writes=False)
    for token in ("hf_read", "hf_bob"):
        for request in (lambda client: client.auth_check(repo, write=True), lambda client: client.create_repo("org/x")):
            with pytest.raises(HfHubHTTPError) as caught:
                request(api(hub, token))
            assert caught.value.response.status_code == 403
    assert download(hub, repo, "small.txt", token="hf_read") == b"one"


def test_a_branch_is_made_once(hub, repo):
    client = api(hub)
    client.create_branch(repo, branch="try")
    done = client.upload_file(path_or_fileobj=b"two", path_in_repo="small.txt", repo_id=repo, revision="try").oid
    with pytest.raises(HfHubHTTPError) as caught:
        client.create_branch(repo, branch="try")
    assert caught.value.response.status_code == 409
    client.create_branch(repo, branch="try", exist_ok=True)
    assert client.model_info(repo, revision="try").sha == done


def test_what_is_not_there_cannot_be_deleted(hub, repo):
    before = api(hub).model_info(repo).sha
    with pytest.raises(EntryNotFoundError):
        api(hub).create_commit(repo, [CommitOperationDelete("none.txt")], commit_message="delete")
    assert api(hub).model_info(repo).sha == before


def test_an_upload_that_is_cut_off_does_nothing(hub, repo):
    hub.fail("hang_up", "^POST .*/commit/")
    upload = {"path_or_fileobj": b"two", "path_in_repo": "small.txt", "repo_id": repo}
    with pytest.raises(HTTPError):
        api(hub).upload_file(**upload)
    assert download(hub, repo, "small.txt") == b"one"
    api(hub).upload_file(**upload)
    assert download(hub, repo, "small.txt") == b"two"
