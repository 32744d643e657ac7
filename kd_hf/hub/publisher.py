"""The Hugging Face Hub: pushing a run's student, in the background or at the end, and fetching a pushed checkpoint.

The repository holds the artefact at its root, with the run's log; under ``hub_strategy: checkpoint``, and until the
run ends, also the newest checkpoint in ``last-checkpoint/``. Every push is one commit: a failure midway leaves the
repository as it was, and repeating a push that has arrived changes nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from kd_hf.errors import UserError
from kd_hf.files import atomic_folder, is_passing, writing
from kd_hf.hub_client import WAITS, no_bars, patiently, telling_part
from kd_hf.layout import CHECKPOINTS, INCOMING, LOG, OUTGOING, RESOLVED, STUDENT
from kd_hf.recipe.config import HubConfig
from kd_hf.recipe.read import load_recipe
from kd_hf.run.record import RunRecord

LAST = "last-checkpoint"
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# what earlier pushes may have left and a student without it must not inherit; everything else is the owner's
_OURS = re.compile(rf"model[^/]*\.safetensors(\.index\.json)?|preprocessor_config\.json|(report|{LAST})/.*")
_TOKENS = "https://huggingface.co/settings/tokens"
_LOGIN = f"run `hf auth login`, or set HF_TOKEN to a token with write permission ({_TOKENS})"
_ADVICE = {
    401: f"the Hub does not accept the token; {_LOGIN}",
    402: "the account's storage or plan does not allow it; see https://huggingface.co/settings/billing",
    404: "no such repository or branch, or the token may not see it; check hub.hub_model_id and hub.hub_revision",
    409: "another commit was made at the same time; try again",
    412: "another commit was made at the same time; try again",
    413: "the Hub refuses an upload of that size",
    429: "the Hub asks for fewer requests; try again in some minutes",
}


class Publisher:
    """Pushes what a run makes, from the main process only.

    Args:
        cfg: the recipe's ``hub`` block.
        run_path: the run folder; its log goes with every push.
        say: shows one line to the user; also called from the background thread.
    """

    def __init__(self, cfg: HubConfig, run_path: Path, say: Callable[[str], None]) -> None:
        self.cfg = cfg
        self.run_path = Path(run_path)
        self.say = say
        self._repository: _Repository | None = None
        self._push: Future[None] | None = None
        self._told_of_skipping = False

    def prepare(self) -> None:
        """Make the repository and the branch, and check that the token may write there.

        Raises:
            UserError: no token or one that may not write, offline, no network, a bad id, or another's repository.
        """
        repository = _Repository(self.cfg, self.run_path)
        with repository.telling("cannot push"):
            patiently(lambda: repository.create(self.cfg.hub_private_repo), WAITS[:2])
        self._repository = repository

    @property
    def repo_id(self) -> str:
        """``user/name``; known after :meth:`prepare`."""
        return self._prepared.id

    @property
    def _prepared(self) -> _Repository:
        if self._repository is None:
            raise RuntimeError("call prepare() before the first push")
        return self._repository

    @property
    def busy(self) -> bool:
        """Whether a background push is still running."""
        return self._push is not None and not self._push.done()

    def in_background(self, folder: Path, message: str, checkpoint: Path | None = None) -> None:
        """Start one commit in a thread and return; while the last one still runs, nothing is started.

        The files are hard-linked first, so both folders may be replaced or deleted as soon as this returns (their
        files must not be written to in place). A failure is told by `say` in one line and never raised.

        Args:
            folder: the artefact.
            message: the commit's title.
            checkpoint: a checkpoint folder, to replace the one in ``last-checkpoint/``.
        """
        if self.busy:
            if not self._told_of_skipping:
                self.say("hub: the last push is still running; pushes that fall due before its end are left out")
            self._told_of_skipping = True
            return
        outgoing = self.run_path / OUTGOING
        repository = self._prepared
        try:
            shutil.rmtree(outgoing, ignore_errors=True)
            shutil.copytree(folder, outgoing / STUDENT, copy_function=_link)
            if checkpoint is not None:
                shutil.copytree(checkpoint, outgoing / LAST, copy_function=_link)
        except OSError as error:
            shutil.rmtree(outgoing, ignore_errors=True)
            self.say(f"hub: this push was left out, the training goes on: {error}")
            return
        self._push = repository.api.run_as_future(self._push_quietly, repository, outgoing, message)

    def _push_quietly(self, repository: _Repository, outgoing: Path, message: str) -> None:
        """Runs in the thread."""
        checkpoint = outgoing / LAST if (outgoing / LAST).is_dir() else None
        try:
            with no_bars(), repository.telling("this push failed, the training goes on"):
                sources = _sources(outgoing / STUDENT, self.run_path / LOG, checkpoint)
                keep_last = checkpoint is None
                patiently(lambda: repository.commit(sources, message, keep_last), WAITS[:2])  # the next save comes
        except UserError as error:
            self.say(str(error))
        finally:
            shutil.rmtree(outgoing, ignore_errors=True)

    def finish(self, folder: Path, message: str = "End of training") -> str:
        """Wait for the background push, then push for good, in one commit that also removes ``last-checkpoint/``.

        Args:
            folder: the artefact.
            message: the commit's title.

        Returns:
            Where the student is, as a link.

        Raises:
            UserError: the push failed; the run folder is untouched, and the message says how to repeat it.
        """
        repository = self._prepared
        if self._push is not None and self.busy:
            self.say("hub: waiting for the push in the background")
            wait([self._push])
        again = f"`python -m kd_hf.train --push {self.run_path}` repeats it"
        with repository.telling("the push failed", f"; the run in {self.run_path} is whole, {again}"):
            sources = _sources(folder, self.run_path / LOG)
            patiently(lambda: repository.commit(sources, message))
        return repository.url


def check_token(cfg: HubConfig, run_path: Path) -> None:
    """See that there is a Hub and a token for `cfg`, before anything is downloaded or trained; changes nothing there.

    Raises:
        UserError: no token or an unknown one, offline, no network, or a bad id.
    """
    repository = _Repository(cfg, run_path)
    with repository.telling("cannot push"):
        patiently(repository.api.whoami, WAITS[:2])


def push_run(folder: str | Path, overrides: Sequence[str] = ()) -> str:
    """Push the student of a finished run, whether or not its recipe asked for it; repeating it is harmless.

    Args:
        folder: the run folder.
        overrides: ``hub.key=value`` strings, laid over the run's recipe.

    Returns:
        Where the student is, as a link.

    Raises:
        UserError: no run, none that has ended, another override, or what :class:`Publisher` raises.
    """
    record = RunRecord.read(folder)
    student = record.need()
    for override in overrides:
        if not override.lstrip("-").startswith("hub."):
            raise UserError(f"'{override}': with --push, only hub.… can be set; the student is trained already")
    recipe = load_recipe(record.path / RESOLVED, overrides) if overrides else record.recipe
    publisher = Publisher(recipe.hub, record.path, print)
    publisher.prepare()
    return publisher.finish(student)


def fetch_checkpoint(cfg: HubConfig, run_path: Path) -> Path | None:
    """Download ``last-checkpoint/`` of the repository as a checkpoint of the run folder; log and recipe if missing.

    For a run whose machine is gone. The checkpoint appears in one step, after every file's checksum was compared with
    the Hub's; a download that was cut off is continued by the next call.

    Returns:
        ``run_path/checkpoints/checkpoint-<step>``; None where the repository, the branch or the checkpoint is missing.

    Raises:
        UserError: the Hub cannot be asked, or what it holds is no whole checkpoint.
    """
    from kd_hf.run.checkpoint import STATE

    repository, incoming = _Repository(cfg, run_path), Path(run_path) / INCOMING
    with repository.telling(f"cannot fetch {LAST}"):
        commit = patiently(lambda: repository.head_holding(f"{LAST}/{STATE}"))
        if commit is None:
            return None
        with writing(incoming):
            patiently(lambda: repository.download(commit, [f"{LAST}/*", LOG, RESOLVED], incoming))
    checkpoint = _place(incoming, Path(run_path), repository.id)
    shutil.rmtree(incoming, ignore_errors=True)
    return checkpoint


def _place(incoming: Path, run_path: Path, repo_id: str) -> Path:
    """Move what was downloaded to where a run looks for it, the checkpoint last."""
    from kd_hf.run.checkpoint import PREFIX, STATE, check_files, files_of, read_state

    try:
        step, names = read_state(incoming / LAST).step, {STATE, *files_of(incoming / LAST)}
        check_files(incoming / LAST)
    except UserError as error:
        shutil.rmtree(incoming, ignore_errors=True)
        raise UserError(
            f"hub: {LAST} of '{repo_id}' is no whole checkpoint ({error}); to start over, set "
            "train.resume_from_checkpoint=false"
        ) from None
    for name in (LOG, RESOLVED):
        if (incoming / name).is_file() and not (run_path / name).exists():
            (incoming / name).replace(run_path / name)
    checkpoint = run_path / CHECKPOINTS / f"{PREFIX}{step}"
    with atomic_folder(checkpoint) as temporary:
        for path in (incoming / LAST).iterdir():
            if path.name in names:  # and not what an older download, cut off, has left
                path.replace(temporary / path.name)
    return checkpoint


def _sources(student: Path, log: Path, checkpoint: Path | None = None) -> dict[str, Path | bytes]:
    """What a push consists of, by its path in the repository: the artefact without pickles, the log, a checkpoint."""
    inside = [path for path in sorted(student.rglob("*")) if path.is_file() and path.suffix not in _PICKLES]
    named = {path.relative_to(student): path for path in inside}
    # nothing that a killed process was writing
    found: dict[str, Path | bytes] = {
        name.as_posix(): path for name, path in named.items() if not any(is_passing(part) for part in name.parts)
    }
    if log.is_file():
        lines = log.read_bytes()  # not a path: the file may grow between the client's looks at it
        found[LOG] = lines[: lines.rfind(b"\n") + 1]
    if checkpoint is not None:
        found |= {f"{LAST}/{path.name}": path for path in sorted(checkpoint.iterdir())}
    return found


class _Repository:
    """A model repository at one branch, as the token of the environment or of the login sees it.

    Raises:
        UserError: there is no token, or no such id can exist.
    """

    def __init__(self, cfg: HubConfig, run_path: Path) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import validate_repo_id

        self.api = HfApi(library_name="kd_hf", token=True)  # sends the token, which is looked up for each request
        self.branch = cfg.hub_revision
        self.id = cfg.hub_model_id or Path(run_path).resolve().name
        with self.telling("cannot be used"):
            if not get_token():
                raise UserError(f"hub: there is no token; {_LOGIN}, or train with hub.push_to_hub=false")
            validate_repo_id(self.id)
            if "/" not in self.id:
                self.id = f"{patiently(self.api.whoami, WAITS[:2])['name']}/{self.id}"

    @property
    def url(self) -> str:
        """The link to the repository, at its branch."""
        return f"{self.api.endpoint}/{self.id}" + (f"/tree/{quote(self.branch, safe='')}" if self.branch else "")

    def create(self, private: bool | None) -> None:
        """Make the repository and the branch unless they are there, and see that they may be written to."""
        self.api.create_repo(self.id, private=private, exist_ok=True)
        self.api.auth_check(self.id, write=True)  # exist_ok lets a repository pass that belongs to another
        if private and not self.api.model_info(self.id).private:
            raise UserError(
                f"hub.hub_private_repo: '{self.id}' exists already and is public; make it private in its settings on "
                "the Hub, or choose another hub.hub_model_id"
            )
        if self.branch not in (None, "main"):
            self.api.create_branch(self.id, branch=self.branch, exist_ok=True)

    def commit(self, sources: Mapping[str, Path | bytes], message: str, keep_last: bool = False) -> None:
        """Make the branch hold `sources` in one commit, and nothing more of what earlier pushes left in it.

        Args:
            sources: files and contents by their path in the repository.
            message: the commit's title.
            keep_last: leave ``last-checkpoint/`` as it is.
        """
        # not upload_folder: it may spread one push over several commits
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        old = set(self.api.list_repo_files(self.id, revision=self.branch)) - sources.keys()
        stale = [path for path in sorted(old) if _OURS.fullmatch(path)]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path, source) for path, source in sources.items()),
            *(CommitOperationDelete(path) for path in stale if not (keep_last and path.startswith(f"{LAST}/"))),
        ]
        self.api.create_commit(self.id, changes, commit_message=message, revision=self.branch, num_threads=1)

    def head_holding(self, path: str) -> str | None:
        """The newest commit if it holds a file; None when repository, branch or file is missing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = self.api.model_info(self.id, revision=self.branch)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if error.response.status_code != 404:  # the token is at fault, not the repository
                raise
            return None
        return info.sha if path in [file.rfilename for file in info.siblings or ()] else None

    def download(self, commit: str, patterns: list[str], folder: Path) -> None:
        """Download files of a commit, continuing what is in `folder`, and compare their checksums."""
        # one thread at a time, here as in uploads: when one cannot connect, it closes the client under the others
        self.api.snapshot_download(self.id, revision=commit, local_dir=folder, allow_patterns=patterns, max_workers=1)
        found = self.api.verify_repo_checksums(self.id, revision=commit, local_dir=folder)
        if found.mismatches:
            shutil.rmtree(folder)
            raise OSError(f"{found.mismatches[0]['path']} arrived with another checksum than the Hub's")

    @contextmanager
    def telling(self, what: str, then: str = "") -> Iterator[None]:
        """Turn whatever the client raises into one line for the user: `what`, the reason, `then`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the client lets through whatever its HTTP library raises
            raise UserError(f"hub: '{self.id}': {what}: {self._why(error)}{then}") from None

    def _why(self, error: BaseException) -> str:
        from huggingface_hub import errors

        error = telling_part(error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, UnicodeEncodeError):  # a token that does not even fit into a header
            status = 401
        # some HTTP libraries quote the header of a request that cannot be sent
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}".partition("Bearer ")[0][:300]
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 is set; unset it, or train with hub.push_to_hub=false"
        if isinstance(error, errors.HFValidationError):
            return f"no valid id ({' '.join(str(error).split())}); set hub.hub_model_id to user/name"
        if status == 403:
            return self._why_forbidden()
        if status is not None:
            broken = f"the Hub is out of order ({status}); try again later"
            return broken if status >= 500 else _ADVICE.get(status, f"the Hub refuses it ({detail})")
        if isinstance(error, errors.HTTPError):
            return f"the Hub cannot be reached ({detail}); check the network, and HF_ENDPOINT if it is set"
        return detail

    def _why_forbidden(self) -> str:
        """Whose repository it is, as far as the Hub tells."""
        owner, who = self.id.partition("/")[0], {}
        with suppress(Exception):
            who = self.api.whoami()
        names = [who.get("name"), *(org.get("name") for org in who.get("orgs", ()))]
        if who and owner not in names:
            return f"it belongs to '{owner}', and the token to '{names[0]}'; choose another hub.hub_model_id"
        return f"the token may not write there; give it write permission ({_TOKENS})"


def _link(source: str, target: str) -> None:
    """A second name for a file's content, or a copy where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
