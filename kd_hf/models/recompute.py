"""Gradient checkpointing: blocks run again in the backward pass, and statistics count a batch once all the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kd_hf.compat import checkpointing_switch
from kd_hf.errors import UserError


def enable_checkpointing(network: nn.Module) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Raises:
        UserError: the network does not offer it.
    """
    transformers_way = checkpointing_switch(network)
    timm_way = getattr(network, "set_grad_checkpointing", None)
    try:
        if transformers_way is not None:
            transformers_way({"use_reentrant": False})
            return
        if callable(timm_way):
            timm_way(True)
            return
    except (ValueError, AssertionError):  # what transformers and timm say of an architecture without it
        pass
    raise UserError(f"train.activation_checkpointing: {type(network).__name__} does not support it")


class CountOnce:
    """Has the BatchNorm layers of a network work on copies of their statistics wherever a block is run again.

    Without it momentum would count every batch twice. To be set once no layer is replaced any more.
    """

    def __init__(self, network: nn.Module) -> None:
        self._first_pass = False
        self._kept: dict[nn.Module, dict[str, Tensor]] = {}
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end, always_call=True)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(self._lend)
                module.register_forward_hook(self._restore, always_call=True)  # a second run may break off inside

    def _begin(self, *_: Any) -> None:
        self._first_pass = True

    def _end(self, *_: Any) -> None:
        self._first_pass = False

    def _lend(self, module: nn.Module, *_: Any) -> None:
        if not self._first_pass and module.training:
            self._kept[module] = dict(module.named_buffers(recurse=False))
            for name, value in self._kept[module].items():
                setattr(module, name, value.clone())

    def _restore(self, module: nn.Module, *_: Any) -> None:
        for name, value in self._kept.pop(module, {}).items():
            setattr(module, name, value)
