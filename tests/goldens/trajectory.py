"""A recorded training: what enters the networks at every step, and what the official loop made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from kd_hf.outputs import Target
from tests.goldens.numbers import uniform
from tests.goldens.record import Below, Mismatch, Tensors

SAMPLE = 64  # elements that are stored of a tensor with more
PROJECTIONS = 4  # inner products that are stored of a tensor
DROP_PATH = "draw/drop_path/"
TOKENS = {"cls_token", "dist_token", "mask_token", "pos_embed", "position", "table", "relative_position_bias_table"}


class Facts(BaseModel):
    """The metadata of a file, each value JSON; a key that is not here is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    case: str
    source: str
    notes: str
    weights: str
    recipe: str
    overrides: list[str]
    steps: int
    steps_per_epoch: int
    accumulation: int
    classes: int
    pixels: list[int]
    """``[B, 3, H, W]`` of a micro batch."""
    schedule: Literal["own", "imposed"]
    """Whether the recipe's rates are the recorded ones, or these are set before every step."""
    late: int
    """Steps by which the official schedule is behind the recipe's."""
    average: Literal["initial weights", "first step"] | None
    """What the official average starts from."""


@dataclass(frozen=True)
class Trajectory:
    """A recorded training."""

    facts: Facts
    tensors: Tensors

    @classmethod
    def read(cls, file: Path) -> Trajectory:
        """Read a file. Raises Mismatch for metadata that it lacks or that nothing reads."""
        with safe_open(file, "pt", device="cpu") as stored:
            metadata = stored.metadata() or {}
            tensors = Tensors({key: stored.get_tensor(key) for key in sorted(stored.keys())})
        try:
            facts = Facts.model_validate({key: json.loads(value) for key, value in metadata.items()})
        except ValidationError as error:
            wrong = (f"metadata {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise Mismatch("; ".join(wrong)) from error
        return cls(facts, tensors)

    def under(self, prefix: str) -> Below[Tensor]:
        """Tensors whose names start so, without it."""
        return self.tensors.below(prefix)

    def pixels(self, step: int, micro: int) -> Tensor:
        """Images ``[B, 3, H, W]`` of about unit variance: 4 × 4 rectangles of one value each, and noise on them."""
        name, (batch, channels, height, width) = f"in/pixels/{step}/{micro}", self.facts.pixels
        coarse = uniform(f"{name}/coarse", (batch, channels, 4, 4))
        coarse = coarse.repeat_interleave(height // 4, 2).repeat_interleave(width // 4, 3)
        return 1.5 * coarse + 0.75 * uniform(name, self.facts.pixels)

    def target(self, step: int, micro: int) -> Target:
        """Labels, or rows of mixed labels."""
        labels = self.tensors["in/target"][step, micro]
        return Target(labels) if labels.ndim == 1 else Target(labels.argmax(1), labels)

    def draws(self, block: str, step: int, micro: int) -> Mapping[str, Tensor]:
        """What a block's method drew; what it does not look at stays unread."""
        return _Draws(self.under(f"draw/{block}/"), step, micro)

    def drop_paths(self) -> list[str]:
        """The passes whose drop paths are recorded."""
        names = self.under(DROP_PATH)
        return sorted({name.rpartition("/")[0] for name in names})

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        """The value that a parameter or statistic starts from."""
        key = f"weights/{name}"
        return self.tensors[key] if key in self.tensors else initial_value(name, shape)


@dataclass(frozen=True)
class _Draws(Mapping[str, Tensor]):
    recorded: Below[Tensor]
    step: int
    micro: int

    def __getitem__(self, key: str) -> Tensor:
        return self.recorded[key][self.step, self.micro]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorded)

    def __len__(self) -> int:
        return len(self.recorded)


def initial_value(name: str, shape: torch.Size) -> Tensor:
    """The starting value of a tensor that is not stored, from its name and shape alone."""
    values, last = uniform(name, shape), name.rpartition(".")[2]
    if last == "running_var":
        return 1 + 0.3 * values
    if last in TOKENS:
        return 0.5 * values
    if last.startswith("gamma"):
        return 0.3 + 0.1 * values
    if name.endswith(".bn3.weight"):  # ends a bottleneck, where values near 1 would let rounding grow tenfold a step
        return 0.2 + 0.1 * values
    if len(shape) <= 1:
        return 1 + 0.2 * values if last == "weight" else 0.1 * values
    return values * math.sqrt(3 / math.prod(shape[1:]))


def sampled(tensor: Tensor) -> Tensor:
    """At most SAMPLE elements, evenly spread over the flat tensor."""
    flat = tensor.flatten()
    return flat if len(flat) <= SAMPLE else flat[torch.arange(SAMPLE) * len(flat) // SAMPLE]


def projections(name: str, tensor: Tensor, count: int = PROJECTIONS) -> Tensor:
    """Inner products ``[count]`` with vectors of the name's own: any element that differs changes them."""
    flat = tensor.flatten()
    return torch.stack([uniform(f"{name}#{k}", flat.shape) @ flat for k in range(count)])


def is_trajectory(file: Path) -> bool:
    """Whether a file records a training, by the key that only those have."""
    with safe_open(file, "pt") as stored:
        return "recipe" in (stored.metadata() or {})
