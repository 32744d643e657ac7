"""The images of all processes in one loss, for losses that compare the images of a batch with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(tensor: Tensor) -> Tensor:
    """The rows ``[B, …]`` of every process, in the order of their ranks: ``[B · processes, …]``; a call of all of them.

    Every process then computes the same loss of the same rows. Its gradient is right after the mean over processes
    that DDP and FSDP take, for what a process's own rows depend on as well as for what is learned behind this call.
    """
    return tensor if processes() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """The gradient of a process's own rows, times the number of processes that it will be divided by."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(processes())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = distributed.get_rank() * ctx.rows
        return grad[first : first + ctx.rows] * processes()
