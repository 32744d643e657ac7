"""Writing, replacing and removing files and folders so that they are never half there; their checksums."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kd_hf.errors import UserError

_AT_FDCWD = -100  # linux: paths are relative to the working folder
_RENAME_EXCHANGE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)
_NEW, _OLD, _GONE = ".tmp-", ".old-", ".gone-"  # beside a target: being written, its last state, being removed
_CHUNK = 1 << 22  # bytes


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
def atomic_folder(target: Path, ours: Callable[[str], object] = lambda name: True) -> Iterator[Path]:
    """Write a folder so that `target` is never half there: yields a temporary sibling, renamed at the end.

    An existing `target` stays until the new one is complete. A full disk or a missing permission becomes a
    :class:`UserError` and leaves nothing behind.

    Args:
        target: the folder.
        ours: whether a file of an existing `target`, by its path in there, may be replaced or left out; others move
            into the new folder.
    """
    temporary = target.parent / f"{_NEW}{target.name}"
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _delete(temporary)
            temporary.mkdir()
            yield temporary
            _take_over(target, temporary, ours)
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            _swap_in(temporary, target)
    except BaseException:
        _delete(temporary)
        raise


def _take_over(old: Path, new: Path, ours: Callable[[str], object]) -> None:
    for path in old.rglob("*") if old.is_dir() else ():
        name = path.relative_to(old).as_posix()
        if path.is_file() and not ours(name) and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; where the system can exchange names, `target` exists at every instant."""
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        _delete(new)
    else:
        aside = target.parent / f"{_OLD}{target.name}"
        _delete(aside)
        target.rename(aside)
        new.rename(target)
        _delete(aside)
    sync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the C library or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def remove(path: Path) -> None:
    """Delete a file or folder; a kill meanwhile leaves either all of it or nothing that has its name."""
    aside = path.parent / f"{_GONE}{path.name}"
    _delete(aside)
    if os.path.lexists(path):
        path.rename(aside)
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):  # a disk that is read only refuses also to remove what is not there
        path.unlink()


def tidy(folder: Path, names: Iterable[str]) -> None:
    """Finish what a killed process was doing to files and folders of these `names`: nobody may be at it now."""
    for name in names:
        aside = folder / f"{_OLD}{name}"
        if aside.exists() and not (folder / name).exists():  # killed between the two renames of :func:`_swap_in`
            aside.rename(folder / name)
        for prefix in (_NEW, _OLD, _GONE):
            _delete(folder / f"{prefix}{name}")


def is_passing(name: str) -> bool:
    """Whether a name is one that this module uses while it writes."""
    return name.startswith((_NEW, _OLD, _GONE))


@dataclass(frozen=True)
class FileSum:
    """What a file must be to be whole; the sum is XXH3's, of 128 bits (it notices damage, not malice)."""

    size: int
    xxh3: str | None = None
    """None where it was not taken."""

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """That of a file as it lies there."""
        total, size = xxhash.xxh3_128(), 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
                size += len(chunk)
        return cls(size, total.hexdigest())

    def fault(self, path: Path) -> str | None:
        """What is wrong with a file that should have this sum, in a few words; None when nothing is."""
        try:
            if path.stat().st_size != self.size:
                return "has another size than when it was written"
            changed = self.xxh3 is not None and FileSum.of(path).xxh3 != self.xxh3
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return "has another checksum than when it was written" if changed else None


def digest(*parts: bytes | memoryview) -> str:
    """Thirty-two hex digits over bytes, each part apart from the next."""
    total = xxhash.xxh3_128()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f"{_NEW}{path.name}")
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
