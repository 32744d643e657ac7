"""VkD: the projection starts from PyTorch's base, and W's own gradient is recorded too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_hf.methods.base import Method
from kd_hf.methods.vkd import VkD
from kd_hf.outputs import Outputs
from tests.goldens.case import Run, TensorCase
from tests.goldens.families.deit import criterion
from tests.goldens.layout import LOSS, NO_CHANGE, HParams, Layout, Output, Term, constant, size
from tests.goldens.record import Golden


def _task(hparams: HParams) -> Mapping[str, Any]:
    return criterion(hparams["criterion"], hparams)


LAYOUTS = {
    "vkd": Layout(
        options={"alpha": "alpha", "gamma": "gamma", "orthogonal_map": "map"},
        facts={
            "student_dim": size("in/student_patch_tokens", 2),
            "teacher_dim": size("in/teacher_feature_map", 1),
            "kl_T": constant(1.0),
            "layer_norm_eps": constant(1e-5),
            "smooth_l1_beta": constant(1.0),
            "use_trivialization": constant(True),
        },
        unused=frozenset({"mixup_lambda"}),  # how the targets were mixed
        task=_task,
        inputs={
            "student_patch_tokens": "student.feature",
            "teacher_feature_map": "teacher.feature",
            "student_logits_cls": "student.logits",
            "student_logits_dist": "student.dist_logits",
            "teacher_logits": "teacher.logits",
        },
        outputs={
            "loss": LOSS,
            "xe_loss": Output("task"),
            "kl_loss": Output("vkd", "logits"),
            "repr_distill_loss": Output("vkd", "feature"),
        },
    ),
}


class VkDCase(TensorCase):
    """A case of tensors whose projection is watched."""

    def run(self, change: Output = NO_CHANGE) -> Run:
        """As every case; further the two vectors that are compared, and W as a leaf."""
        self.values: dict[str, Tensor] = {}
        self.effective = self.golden.tensors["param/projector.weight_effective"].clone()
        run = super().run(change)
        return Run(
            run.terms,
            run.losses,
            {**run.values, **self.values},
            {**run.leaves, "param/projector.weight_effective": self.effective},
        )

    def _build(self, term: Term, change: Output, student: Outputs, teacher: Outputs) -> Method:
        if term.name != self.golden.method:
            return super()._build(term, change, student, teacher)
        built = self._new(term, change.options, student, teacher)
        assert isinstance(built, VkD) and built.projector is not None
        state = self.golden.group("param/projector.")
        built.projector.set_base(state["base"])
        with torch.no_grad():
            built.projector.original.copy_(state["original"])
            self.values["param/projector.weight_effective"] = built.projector.weight()
        built.projector.register_forward_hook(self._watch)
        self.values["teacher_normalised"] = built.normalise(teacher.taps["feature"].mean((2, 3)))
        return built

    def _watch(self, projector: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.values["student_projected"] = output.detach()
        pooled = inputs[0].detach()
        output.register_hook(lambda gradient: setattr(self.effective, "grad", gradient.T @ pooled))


def _open(golden: Golden) -> VkDCase:
    return VkDCase(golden, LAYOUTS["vkd"])


CASES = {"vkd": _open}
