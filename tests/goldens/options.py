"""Ways of running a case that must not change a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_hf.models.recompute import enable_checkpointing
from kd_hf.outputs import Outputs


@dataclass(frozen=True)
class Option:
    """How tensors lie in memory, and how modules are run.

    Args:
        channels_last: maps and weights of four dimensions lie with their channels last.
        checkpointing: students recompute their activations.
        backend: of torch.compile, for methods and for students together with their methods.
    """

    channels_last: bool = False
    checkpointing: bool = False
    backend: str | None = None

    def tensor(self, value: Tensor) -> Tensor:
        """A tensor as a network gives it."""
        if not self.channels_last or value.ndim != 4:
            return value
        return value.contiguous(memory_format=torch.channels_last)

    def outputs(self, outputs: Outputs) -> Outputs:
        """All that a network gives."""
        return outputs.map(self.tensor)

    def frozen(self, network: nn.Module) -> None:
        """Prepare a teacher, or a part of it."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def student(self, network: nn.Module) -> None:
        """Prepare a network that learns."""
        if self.checkpointing:
            enable_checkpointing(network)

    def trained(self, module: nn.Module) -> None:
        """Prepare what has parameters, once they are loaded and before it is called."""
        self.frozen(module)
        if self.backend is not None:
            torch.compiler.reset()  # else the ninth module of a class runs as it is
            module.compile(backend=self.backend, dynamic=False)


PLAIN = Option()
OPTIONS: Mapping[str, Option] = {
    "channels_last": Option(channels_last=True),
    # its sines differ from torch's by one rounding of float32, in which ViDT's positions are: vidt is off by 2e-8
    "compile": Option(backend="inductor"),
    "checkpointing": Option(checkpointing=True),
}
