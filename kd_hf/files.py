"""Writing files and folders so that they are never half there, and what a user is told when that fails."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd_hf.errors import UserError

_AT_FDCWD = -100  # linux: paths are relative to the working folder
_RENAME_EXCHANGE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says against writing `target` (full disk, no permission) into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        numbers = [cause.errno for cause in causes if isinstance(cause, OSError)]
        # safetensors gives the system's error in words only
        if any(number in _FULL for number in numbers) or any("No space left on device" in str(c) for c in causes):
            raise UserError(f"no space left on the disk while writing {target}; nothing there was changed") from None
        forbidden = next((number for number in numbers if number in _FORBIDDEN), None)
        if forbidden is not None:
            raise UserError(f"cannot write {target}: {os.strerror(forbidden)}") from None
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder so that `target` is never half there: yields a temporary sibling, renamed at the end.

    An existing `target` stays until the new one is complete. A full disk or a missing permission becomes a
    :class:`UserError` and leaves nothing behind.
    """
    temporary = target.parent / f".tmp-{target.name}"
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            _swap_in(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; where the system can exchange names, `target` exists at every instant."""
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new)
    else:
        aside = target.parent / f".old-{target.name}"
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        new.rename(target)
        shutil.rmtree(aside)
    sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the C library or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
    except UserError:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Have the system put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
