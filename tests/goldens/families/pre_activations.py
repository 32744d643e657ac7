"""Maps before the last ReLU of each stage: OFD, ReviewKD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests.goldens.case import Case, NormedCase, Run
from tests.goldens.layout import LOSS, HParams, Layout, Output, check_fact, constant
from tests.goldens.record import Golden

STAGES, SIDES = range(1, 9), ("student", "teacher")


def _count(prefix: str) -> Callable[[Golden], int]:
    """A fact: how many inputs there are of a kind."""
    return lambda golden: len(golden.group(prefix))


LAYOUTS = {
    "ofd": Layout(
        facts={"kernel_size": constant(1), "stages": _count("in/preact_s.")},
        weight="feat_weight",
        inputs={f"preact_{side[0]}.{i}": f"{side}.stage_{i}" for i in STAGES for side in SIDES},
        outputs={"loss": LOSS, "loss_unweighted": Output()},
    ),
    "reviewkd": Layout(options={"mid_channel": "mid_channels", "stu_preact": "preact"}, weight="reviewkd_weight"),
    "sdd": Layout(
        options={"kind": "kind", "temperature": "temperature"},
        optional={"alpha": "alpha", "beta": "beta", "gamma": "gamma"},
        fixed={"nontarget": "all"},  # as the official code is
        unused=frozenset({"warmup", "epoch"}),  # by SDD-KD
        inputs={f"{kind}_{side[0]}": f"{side}.feature" for kind in ("patch", "feature") for side in SIDES},
    ),
}


class OFDCase(NormedCase):
    """OFD, whose margins are those of the recorded BatchNorms."""

    def _parts(self) -> dict[str, nn.Module]:
        inputs = self.golden.group("in/")
        parts: dict[str, nn.Module] = {}
        for stage in range(1, self.golden.hparams["stages"] + 1):
            weight, bias = (inputs[f"bn_{name}.{stage}"] for name in ("weight", "bias"))
            norm = nn.BatchNorm2d(len(weight), dtype=torch.float64)
            with torch.no_grad():
                norm.weight.copy_(weight), norm.bias.copy_(bias)
            parts[f"norm:preact:{stage}"] = norm
        return parts

    def _further(self, run: Run) -> Mapping[str, Tensor]:
        stages = range(1, self.golden.hparams["stages"] + 1)
        return {f"margin.{stage}": self.built.get_buffer(f"margin_stage_{stage}").flatten() for stage in stages}


class ReviewKDCase(NormedCase):
    """ReviewKD with the loss of several epochs of its ramp."""

    def _further(self, run: Run) -> Mapping[str, Tensor]:
        hparams, total = self.golden.hparams, run.value(Output()).detach() * self.golden.hparams["reviewkd_weight"]
        return {f"loss_epoch.{epoch}": ramp(hparams, epoch) * total for epoch in hparams["epochs"]}


def _open_reviewkd(golden: Golden) -> Case:
    """Files count stages from the first one on and have the pooled feature last; levels are counted the other way."""
    hparams, levels = golden.hparams, golden.hparams["stages"]
    inputs = {"pooled_s": "student.pooled", "pooled_t": "teacher.pooled"}
    for level in range(1, levels):
        inputs[f"feats_s.{levels - level}"] = f"student.level{level}"
        inputs[f"preact_t.{levels - level}"] = f"teacher.level{level}"
    parts = {"conv1.": "reduce.", "conv2.": "expand.", "att_conv.0.": "gate."}
    layout = replace(
        LAYOUTS["reviewkd"],
        inputs=inputs,
        parameters={f"abfs.{j}.{part}": f"levels.{j}.{ours}" for j in range(levels) for part, ours in parts.items()},
        modules={f"result.{levels - level}": f"levels.{level}.expand" for level in range(levels)},
    )
    for side, sizes, widths, kind in (("s", "shapes", "in_", "feats"), ("t", "out_shapes", "out_", "preact")):
        shapes = [golden.tensors.shape(f"in/{kind}_{side}.{stage}") for stage in range(1, levels)]
        pooled = golden.tensors.shape(f"in/pooled_{side}")
        check_fact(hparams, sizes, [1, *(shape[2] for shape in reversed(shapes))])
        check_fact(hparams, f"{widths}channels", [*(shape[1] for shape in shapes), pooled[1]])
    case = ReviewKDCase(golden, layout)
    factor = ramp(hparams, hparams["epochs"][-1])
    case.terms = [replace(term, weight=term.weight * factor) for term in case.terms]
    return case


def ramp(hparams: HParams, epoch: float) -> float:
    """The factor of an epoch, for the names of either repository."""
    length = hparams["warmup_epochs"] if "warmup_epochs" in hparams else hparams["warmup"]
    return min(epoch / length, 1.0)


def _open_ofd(golden: Golden) -> Case:
    return OFDCase(golden, LAYOUTS["ofd"])


CASES = {"ofd": _open_ofd, "reviewkd": _open_reviewkd}
