"""Read a checkpoint of other code: its tensors and plain containers; nothing that the file names is imported or run."""

from __future__ import annotations

import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from kd_hf.errors import UserError, nearest
from kd_hf.text.words import enumerate_names

# the only things a pickle may call by name; torch.load itself puts in the storages
_ADMITTED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}


class Inert:
    """Stands for an object of any other class or function: bears whatever a pickle does to it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """A function of another name, or a method of it, is not called either."""
        return self

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, and the names of the objects in it that were not admitted (``mmengine.….HistoryBuffer``)."""

    path: Path
    entries: Mapping[str, Any]
    foreign: tuple[str, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file that ``torch.save`` or safetensors wrote, on the CPU.

    Args:
        path: the file. Anything but tensors, numbers, strings and containers in it becomes an :class:`Inert`.

    Raises:
        UserError: there is no such file, it is not a checkpoint, or it is damaged.
    """
    if not path.is_file():
        folder = path.parent
        others = [other.name for other in folder.iterdir() if other.is_file()] if folder.is_dir() else []
        what = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint '{path}' {what}.{nearest(path.name, others)}")
    if tarfile.is_tarfile(path):
        raise UserError(f"checkpoint '{path}' is a tar archive; unpack it and give the file in it")
    if _is_torchscript(path):
        raise UserError(f"checkpoint '{path}' is a TorchScript program, which would run; expected a dict of weights")
    foreign: set[str] = set()
    try:
        entries = _load(path, foreign)
    except Exception as error:  # damaged bytes can lead an unpickler to raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{path}' cannot be read as a checkpoint (torch.save or safetensors): {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(entries, Mapping):
        held = f"{enumerate_names(sorted(foreign))}, not run" if foreign else f"a {type(entries).__name__}"
        raise UserError(f"'{path}' is no checkpoint: expected a dict of weights (found {held})")
    return Checkpoint(path, {str(key): value for key, value in entries.items()}, tuple(sorted(foreign)))


def _load(path: Path, foreign: set[str]) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted_pickle(foreign))


def _is_torchscript(path: Path) -> bool:
    """True for an archive that torch.load would hand over to its just-in-time compiler."""
    try:
        # torch's own reader, for another could see other names in a file that was made to deceive
        return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no archive
        return False


def _restricted_pickle(foreign: set[str]) -> SimpleNamespace:
    """What torch.load wants of the pickle module; names that are not admitted go to `foreign`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _ADMITTED:
                return _ADMITTED[module, name]
            foreign.add(f"{module}.{name}")
            return Inert

    def load(file: IO[bytes], **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__="restricted pickle", Unpickler=Unpickler, load=load)
