"""The state of the small Hub: repositories, commits, branches, tags and contents, in one folder."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png")
LFS_SIZE = 10 << 20  # bytes from which any file is stored as a large one


class Store:
    """Repositories on disk: ``blobs/<sha256>`` and, per repository, ``repo.json`` and ``commits/<sha>.json``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def _folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def create(self, kind: str, name: str, private: bool) -> bool:
        """Make a repository with an empty first commit; False when it exists."""
        folder = self._folder(kind, name)
        if folder.exists():
            return False
        (folder / "commits").mkdir(parents=True)
        self._write_repo(kind, name, {"private": private, "gated": False, "branches": {}, "tags": {}})
        self.commit(kind, name, "main", "initial commit", {})
        return True

    def repo(self, kind: str, name: str) -> dict[str, Any] | None:
        """What `repo.json` says, None without such a repository."""
        path = self._folder(kind, name) / "repo.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _write_repo(self, kind: str, name: str, repo: dict[str, Any]) -> None:
        (self._folder(kind, name) / "repo.json").write_text(json.dumps(repo))

    def change(self, kind: str, name: str, **values: Any) -> None:
        """Set `private`, `gated`, …"""
        self._write_repo(kind, name, {**(self.repo(kind, name) or {}), **values})

    def resolve(self, kind: str, name: str, revision: str) -> str | None:
        """The commit of a branch, tag or (abbreviated) commit."""
        repo = self.repo(kind, name) or {}
        known = {**repo.get("tags", {}), **repo.get("branches", {})}
        if revision in known:
            return known[revision]
        found = list(self._folder(kind, name).glob(f"commits/{revision}*.json")) if len(revision) >= 7 else []
        return found[0].stem if len(found) == 1 else None

    def read(self, kind: str, name: str, commit: str) -> dict[str, Any]:
        """A commit: parent, title, date and files."""
        return json.loads((self._folder(kind, name) / "commits" / f"{commit}.json").read_text())

    def commit(self, kind: str, name: str, branch: str, title: str, files: dict[str, Any]) -> str:
        """Record all `files` of a branch as its new head."""
        repo = self.repo(kind, name) or {}
        text = json.dumps(
            {
                "parent": repo["branches"].get(branch),
                "title": title,
                "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
                "files": dict(sorted(files.items())),
            }
        )
        sha = hashlib.sha1(f"{kind}/{name}/{branch}/{text}".encode()).hexdigest()
        (self._folder(kind, name) / "commits" / f"{sha}.json").write_text(text)
        self.point(kind, name, "branches", branch, sha)
        return sha

    def write(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        """Add files to the main branch without a client, making the repository if need be; returns the commit."""
        self.create(kind, name, private=False)
        present = self.read(kind, name, self.resolve(kind, name, "main") or "")["files"]
        added = {path: file_entry(self.put(data), data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        return self.commit(kind, name, "main", "written", present | added)

    def point(self, kind: str, name: str, refs: str, ref: str, sha: str) -> None:
        """Set a branch or tag."""
        repo = self.repo(kind, name) or {}
        self.change(kind, name, **{refs: {**repo[refs], ref: sha}})

    def put(self, data: bytes) -> str:
        """Keep a file's content and return its sha256."""
        sha = hashlib.sha256(data).hexdigest()
        self.blob(sha).write_bytes(data)
        return sha

    def blob(self, sha: str) -> Path:
        """Where a content lies."""
        return self.root / "blobs" / sha


def file_entry(sha: str, data: bytes, lfs: bool) -> dict[str, Any]:
    """How a commit lists a file; the oid is git's, of the content or of its LFS pointer."""
    size = len(data)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n".encode()
    content = pointer if lfs else data
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"oid": oid, "sha256": sha, "size": size, "pointer": len(pointer) if lfs else 0}
