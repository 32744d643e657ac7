"""Recorded cases of VkD: the projection starts from PyTorch's base, and W's own gradient is recorded too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_hf.methods.base import Method, Outputs
from kd_hf.methods.vkd import VkD
from tests.goldens.check import Run, TensorCase, Term


class VkDCase(TensorCase):
    """A case of tensors whose projection is watched."""

    def run(self, changes: Mapping[str, Any]) -> Run:
        """As every case; further the two vectors that are compared, and W as a leaf."""
        self.values: dict[str, Tensor] = {}
        self.effective = self.golden.tensors["param/projector.weight_effective"].clone()
        run = super().run(changes)
        return Run(
            run.terms,
            run.losses,
            {**run.values, **self.values},
            {**run.leaves, "param/projector.weight_effective": self.effective},
        )

    def _build(self, term: Term, changes: Mapping[str, Any], student: Outputs, teacher: Outputs) -> Method:
        if term.name != self.golden.method:
            return super()._build(term, changes, student, teacher)
        built = self._new(term, changes, student, teacher)
        assert isinstance(built, VkD) and built.projector is not None
        state = self.golden.group("param/projector.")
        built.projector.set_base(state["base"])
        with torch.no_grad():
            built.projector.original.copy_(state["original"])
        built.projector.register_forward_hook(self._watch)
        wanted = built.normalise(teacher.taps["feature"].mean((2, 3)))
        self.values["teacher_normalised"] = wanted
        return built

    def _watch(self, projector: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.values["student_projected"] = output.detach()
        pooled = inputs[0].detach()
        output.register_hook(lambda gradient: setattr(self.effective, "grad", gradient.T @ pooled))
