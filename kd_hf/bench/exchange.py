"""What processes tell each other in a step: the bytes of gradients that DistributedDataParallel sends."""

# no annotations as strings here: DistributedDataParallel checks those of its hook

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kd_hf.bench.clock import Mark, Work


def sent_bytes(wrapped: nn.Module, step: Callable[[], object]) -> int | None:
    """Bytes of gradients that one process hands to its peers in `step`: 0 alone, None where parameters are sharded.

    Args:
        wrapped: the prepared module; a count stays hooked to it.
        step: runs a step of all processes.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return 0
    if not isinstance(wrapped, DistributedDataParallel):
        return None
    buckets: list[int] = []

    def count(group: Any, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, count)
    step()
    return sum(buckets)


def exchange(size: int, device: torch.device) -> Work:
    """Add `size` bytes of float32 over all processes, as gradients are, with nothing else to do meanwhile."""
    values = torch.zeros(size // 4, device=device)

    def work(mark: Mark) -> None:
        distributed.all_reduce(values)
        mark("exchange")

    return work
