"""One process trains in a run folder at a time: a lock that its owner's death releases."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd_hf.errors import UserError
from kd_hf.files import writing
from kd_hf.layout import LOCK
from kd_hf.process import agreed
from kd_hf.text.terminal import say

if sys.platform != "win32":
    import fcntl

_BUSY = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_PAUSE = 1.0  # seconds between two looks at a lock that another process has
_held: dict[Path, int] = {}  # by this process; a lock belongs to a process, so one that it has is not taken again


class RunLock:
    """The lock of a run folder.

    The system keeps it (``fcntl``, also over NFS) for this process and not for those forked from it, and drops it when
    the process ends, however that happens. The file says whose it is, for people.

    Args:
        folder: the run folder; made when it is missing, and removed again on release when it is still empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder.absolute() / LOCK
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> str | None:
        """Take the lock; None when it is taken, else who has it, in words.

        Raises:
            UserError: the folder cannot be made.
        """
        if self.file in _held:
            return None
        self._make_folder()
        while True:
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if error.errno in _READ_ONLY:  # what is finished can be looked at; whoever writes is told
                    return None
                raise UserError(f"cannot write {self.file}: {error.strerror}") from None
            if (refused := _lock(descriptor)) is not None:
                os.close(descriptor)
                return self._owner() if refused in _BUSY else None
            if self._is_still_there(descriptor):
                break
            os.close(descriptor)  # its last owner has removed it meanwhile
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        self._descriptor = _held[self.file] = descriptor
        return None

    def _is_still_there(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError):
            return os.fstat(descriptor).st_ino == self.file.stat().st_ino
        return False

    def _make_folder(self) -> None:
        with writing(self.folder):
            missing = [path for path in (self.file.parent, *self.file.parent.parents) if not path.exists()]
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self._made = missing

    def _owner(self) -> str:
        """Who holds it, as its file says; another process, so reading the file releases nothing."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads(self.file.read_text(encoding="utf-8"))
            return f"process {int(owner['pid'])} on {owner['host']}, since {owner['since']}"
        return "another process"

    def release(self) -> None:
        """Give it back; folders that were made for it and hold nothing else are removed."""
        if self._descriptor is not None:
            with suppress(OSError):
                self.file.unlink()
            os.close(self._descriptor)
            del _held[self.file]
            self._descriptor = None
        for folder in self._made:
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()
        self._made = []


@contextmanager
def locked(lock: RunLock, patient: bool = False) -> Iterator[None]:
    """Hold a lock on the main process while all are inside; a call of all.

    Args:
        lock: of a run folder.
        patient: wait until another run has left it.

    Raises:
        UserError: another run is there.
    """
    said = False
    while (owner := agreed(lock.acquire)) is not None:
        if not patient:
            raise UserError(
                f"train.output_dir: {lock.folder} is in use by {owner}, which trains there; wait for its end, stop it "
                "with `kill` (it saves), or choose another folder"
            )
        if not said:
            say(f"waiting for {owner}, which trains {lock.folder}")
        said = True
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        lock.release()


def _lock(descriptor: int) -> int | None:
    """Lock a file for this process; the error's number where that cannot be, at least not now."""
    if sys.platform == "win32":
        return errno.ENOSYS
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY + _NO_LOCKS:
            raise
        return error.errno
    return None
