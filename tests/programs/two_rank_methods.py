"""A step of every method on tiny networks, as one process takes it, or as two do:

``accelerate launch --config_file accelerate_configs/2cpu.yaml -m tests.programs.two_rank_methods FOLDER``
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_hf.data.noise import NoiseSource
from kd_hf.distillation.assembly import Assembly, assemble
from kd_hf.distillation.choices import weights_at
from kd_hf.distillation.module import DistillModule
from kd_hf.distillation.sharding import prepare
from kd_hf.distillation.teacher import Teacher
from kd_hf.draws import Draws, hash_key
from kd_hf.methods import get_method, method_names
from kd_hf.methods.base import Moment
from kd_hf.outputs import Outputs, Target
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import Recipe, TrainConfig
from kd_hf.train.optim import build_optimizer
from tests.runs import merged

CLASSES, PER_RANK, RANKS = 7, 4, 2
IMAGES = 20  # of the training set
MOMENT = Moment(0, 1, 1)
# without BatchNorm, which would couple the images of a process whatever the method does
CONVNEXT = ({"model": "test_convnext"}, {"model": "test_convnext2"})
VIT = (
    {"model": "test_vit", "kwargs": {"patch_size": 4, "depth": 4}},
    {"model": "test_vit", "kwargs": {"patch_size": 4, "depth": 5, "embed_dim": 96}},
)
# with BatchNorm, for methods that couple images themselves and need a network with ReLUs
RESNET = (
    {"model": "resnet10t", "kwargs": {"channels": [8, 12, 16, 24], "zero_init_last": False}},
    {"model": "resnet10t", "kwargs": {"channels": [8, 16, 24, 32], "zero_init_last": False}},
)
DISTILLED = (
    {"model": "deit_tiny_distilled_patch16_224", "kwargs": {"patch_size": 8, "depth": 2, "embed_dim": 48}},
    {"model": "test_convnext2"},
)
PAIRS = {
    "at": CONVNEXT,
    "cls_kd": VIT,
    "crd": CONVNEXT,
    "ctkd": CONVNEXT,
    "deit_hard": DISTILLED,
    "deit_soft": DISTILLED,
    "dist": CONVNEXT,
    "dkd": CONVNEXT,
    "fitnet": CONVNEXT,
    "kd": CONVNEXT,
    "manifold": VIT,
    "mgd": CONVNEXT,
    "mlkd": CONVNEXT,
    "nkd": CONVNEXT,
    "ofa": CONVNEXT,
    "ofd": RESNET,
    "pkt": CONVNEXT,
    "reviewkd": CONVNEXT,
    "rkd": CONVNEXT,
    "scalekd": VIT,
    "sdd": CONVNEXT,
    "sp": CONVNEXT,
    "srrl": CONVNEXT,
    "task": CONVNEXT,
    "ttm": CONVNEXT,
    "uskd": VIT,
    "vid": CONVNEXT,
    "vitkd": VIT,
    "vkd": DISTILLED,
    "wsld": CONVNEXT,
    "wttm": CONVNEXT,
}
# logits of untrained networks are so small that at CTKD's temperatures nothing but rounding is left of the loss
OPTIONS = {"ctkd": {"t_start": 0.01, "t_end": 0.1}}


GATHER = "+gather"
# every method, and those that can once more with the images of all processes as one batch
CASES = (
    *method_names(),
    *(f"{name}{GATHER}" for name in method_names() if "gather" in get_method(name).Config.model_fields),
)


def recipe_of(case: str) -> Recipe:
    """The task loss and the method of a case with its defaults, unless it has other options here, on its pair."""
    name = case.removesuffix(GATHER)
    options = OPTIONS.get(name, {}) | ({"gather": True} if case.endswith(GATHER) else {})
    student, teacher = PAIRS[name]
    fixed = {"num_classes": CLASSES, "pretrained": False}
    return Recipe.model_validate(
        {
            "student": merged(student, fixed),
            "teacher": merged(teacher, fixed),
            "methods": {"task": {"weight": 1.0}, name: options},
            "data": {"path": "builtin:digits", "image_size": 32},
            "train": {"output_dir": "unused", "use_cpu": True},
        }
    )


class Step:
    """What the trainer does in a step, up to the gradients, on given images.

    Args:
        case: of `CASES`.
        precision: of the teacher.
    """

    def __init__(self, case: str, precision: torch.dtype = torch.float32) -> None:
        self.name = case.removesuffix(GATHER)
        self.recipe = recipe_of(case)
        self.parts: Assembly = assemble(self.recipe, samples=NoiseSource(IMAGES, 8, CLASSES))
        self.module: DistillModule = self.parts.module.train()
        self.teacher = Teacher(
            "teacher",
            self.recipe.all_teachers()["teacher"],
            self.parts.teachers["teacher"],
            self.parts.tapped_teachers["teacher"],
            torch.device("cpu"),
            TrainConfig(output_dir=".", bf16=precision == torch.bfloat16),
        )
        self.weights = weights_at(self.parts.choices, 0, 1, 1)

    @property
    def needs(self):
        """What the method declares for its pair."""
        return self.module.choices[self.name].needs

    def losses(self, rows: range, wrapped: nn.Module | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Named losses on the images of these numbers; `seed` is that of the method's draws."""
        numbers = torch.tensor(list(rows))
        target = Target(numbers % CLASSES, row=numbers)
        views = [Draws(torch.tensor([hash_key(view, row) for row in rows])) for view in ("pixels", "strong")]
        pixels, strong = (draws.normal("", (3, 32, 32)) for draws in views)
        strong = strong if self.needs.strong else None
        given = ({"teacher": self.taught(pixels, strong)}, target, self.draws(rows, seed))
        return (wrapped or self.module)(pixels, *given, strong=strong)

    def taught(self, pixels: Tensor, strong: Tensor | None) -> Outputs:
        """The teacher's outputs as leaves, so that a gradient that reached them would show."""
        self.seen = self.teacher(pixels)
        if strong is not None:
            self.seen = replace(self.seen, strong=self.teacher(strong))
        for tensor in self.seen.tensors():
            tensor.requires_grad_()
        return self.seen

    def draws(self, rows: range, seed: int = 0):
        """The method's random tensors for these images."""
        return self.module.draw(Draws(torch.tensor([hash_key(seed, row) for row in rows])), MOMENT)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return torch.stack([self.weights[name.partition("/")[0]] * value for name, value in losses.items()]).sum()

    def gradients(self, rows: range, wrapped: nn.Module | None = None) -> dict[str, Tensor]:
        """Gradients of the weighted sum by parameter, of a second step, in which wrapping would miss one."""
        for _ in range(2):
            self.module.zero_grad()
            self.total(self.losses(rows, wrapped)).backward()
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def kept_equal(self) -> dict[str, Tensor]:
        """The buffers that the method itself keeps the same on all processes."""
        method = self.module.methods[self.name]
        return {f"buffer/{name}": getattr(method, name) for name in method.kept_equal}

    @property
    def shared(self) -> bool:
        """Whether the loss couples the images of a process, so that others on another one would change it."""
        return self.needs.batch_coupled and not self.needs.gathered


def rows_of(step: Step, rank: int) -> range:
    """A process's images: its slice of the global batch, or the same as everyone's."""
    first = 0 if step.shared else rank * PER_RANK
    return range(first, first + PER_RANK)


def main(folder: Path) -> None:
    """Write the gradients of every case, and what its method keeps equal, as each of two processes has them."""
    torch.set_num_threads(1)
    for case in CASES:
        step = Step(case)
        accelerator = build_accelerator(step.recipe.train)
        optimizer = build_optimizer(step.module, step.recipe.train)
        wrapped, _ = prepare(accelerator, step.module, optimizer, step.parts.student.info, None)
        names = {f"methods.{step.name}.{name}" for name in step.module.methods[step.name].kept_equal}
        assert names <= wrapped.parameters_to_ignore, "what processes keep equal themselves is sent before every step"
        rank = accelerator.process_index
        gradients = step.gradients(rows_of(step, rank), wrapped)
        save_file({**gradients, **step.kept_equal()}, folder / f"{case}.{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
