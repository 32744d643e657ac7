"""A recorded file as it is read: tensors and hyper-parameters that remember whether something looked at them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from kd_hf.outputs import Target
from tests.goldens.options import PLAIN, Option

T = TypeVar("T")
METADATA = frozenset({"method", "hparams", "source", "notes", "weights"})
# names of the recorder's own, and the number that its inputs were drawn with
PROVENANCE = frozenset({"name", "use_this", "seed", "source"})


class Mismatch(Exception):
    """A file that our methods cannot reproduce, for the reason given."""


class NotCovered(Exception):
    """A file of a method that this package does not have."""


class Noted(Mapping[str, T], Generic[T]):
    """A mapping that remembers which of its values were read. Asking for names alone reads nothing."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = dict(values)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> T:
        value = self._values[key]
        self._read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """Names of values that nothing read."""
        return sorted(self._values.keys() - self._read)

    def below(self, prefix: str) -> Below[T]:
        """The part whose names start so, by the rest of the names."""
        return Below(self, prefix)


class Below(Mapping[str, T], Generic[T]):
    """A part of a :class:`Noted` mapping; what is read here is read there."""

    def __init__(self, whole: Noted[T], prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def __getitem__(self, key: str) -> T:
        return self._whole[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Tensors(Noted[Tensor]):
    """Recorded tensors; shapes may be asked for without reading."""

    def shape(self, key: str) -> torch.Size:
        """Of a tensor that need not be compared for it."""
        return self._values[key].shape


class Hyperparameters(Noted[Any]):
    """The official names and values; blocks are mappings of the same kind."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: Hyperparameters(v) if isinstance(v, Mapping) else v for key, v in values.items()})

    def unread(self) -> list[str]:
        """Names of values that nothing read, with the block they lie in."""
        names = super().unread()
        for key in self._read:
            value = self._values[key]
            if isinstance(value, Hyperparameters):
                names += [f"{key}.{name}" for name in value.unread()]
        return sorted(names)

    def without(self, *names: str) -> Self:
        """The same but for some names."""
        return type(self)({name: self[name] for name in self if name not in names})


@dataclass(frozen=True)
class Golden:
    """A recorded file and how it is run; the tensors named in `single` were stored with the precision of float32."""

    method: str
    hparams: Hyperparameters
    tensors: Tensors
    single: frozenset[str] = frozenset()
    option: Option = PLAIN
    unknown: tuple[str, ...] = field(default=())  # metadata of other names than the format's

    @classmethod
    def read(cls, file: Path, option: Option = PLAIN) -> Golden:
        """Read a file; floating-point tensors become float64."""
        with safe_open(file, "pt", device=str(torch.get_default_device())) as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in sorted(stored.keys())}
        return cls(
            metadata.get("method", file.parent.name),
            Hyperparameters(json.loads(metadata.get("hparams", "{}"))),
            Tensors({key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}),
            frozenset(key for key, value in tensors.items() if value.dtype == torch.float32),
            option,
            tuple(sorted(metadata.keys() - METADATA)),
        )

    def group(self, prefix: str) -> Below[Tensor]:
        """Tensors below a prefix such as ``in/``, by the rest of their names."""
        return self.tensors.below(prefix)

    def target(self) -> Target:
        """Labels: an index vector or rows, under whichever name; none at all gives -1."""
        inputs = self.group("in/")
        name = next((name for name in ("label", "labels", "target", "targets") if name in inputs), None)
        if name is None:
            first = next(name for name in self.tensors if name.startswith("in/"))
            return Target(torch.full((self.tensors.shape(first)[0],), -1))
        labels = inputs[name]
        return Target(labels) if labels.ndim == 1 else Target(labels.argmax(1), labels)

    def unread(self) -> list[str]:
        """What the file holds and nothing looked at."""
        hparams = [name for name in self.hparams.unread() if name.rpartition(".")[2] not in PROVENANCE]
        return [
            *(f"metadata {name}" for name in self.unknown),
            *(f"hparams {name}" for name in hparams),
            *self.tensors.unread(),
        ]
