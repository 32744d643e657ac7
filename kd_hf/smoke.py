"""A recipe's whole path in seconds: true networks with random weights, noise for images, two steps, export, reload."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch

from kd_hf.assemble import with_untrained_teachers
from kd_hf.config import HubConfig, Recipe
from kd_hf.data.draws import generator
from kd_hf.data.source import Source
from kd_hf.errors import UserError
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from kd_hf.trainer import DistillTrainer

STEPS = 2


class NoiseSource(Source):
    """Random images with labels in turn, as encoded bytes.

    Args:
        rows: number of images.
        size: pixels per side.
        num_classes: K.
    """

    def __init__(self, rows: int, size: int, num_classes: int) -> None:
        self.size = size
        self.class_names = tuple(str(index) for index in range(num_classes))
        self.group_sizes = (rows,)

    def read(self, row: int) -> tuple[bytes, int]:
        """A PNG of the row's own noise."""
        from PIL import Image

        pixels = generator("noise", row).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            return file.getvalue(), row % self.num_classes

    def labels(self) -> np.ndarray:
        """Labels in turn."""
        return np.arange(len(self)) % self.num_classes

    def describe(self) -> str:
        """What it is."""
        return f"noise ({len(self)} images, {self.num_classes} classes)"


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe made small: random weights, two steps of the smallest batch it allows, on this machine.

    Everything that decides what is computed stays: networks, image sizes, methods, optimiser, precision.
    """
    described = with_untrained_teachers(recipe)
    untrained = {"pretrained": False}
    # the loss on mixed images pairs neighbours, repeated augmentation divides the batch
    batch = math.lcm(2, recipe.data.augment.repeats)
    gate = {name: cfg.gate.model_copy(update={"enabled": False}) for name, cfg in described.all_teachers().items()}
    teachers = {
        name: cfg.model_copy(update={**untrained, "gate": gate[name]}) for name, cfg in described.all_teachers().items()
    }
    gpu = torch.cuda.is_available()
    train = recipe.train.model_copy(
        update={
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": batch,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "report_to": [],
            "torch_compile": False,
            "sync_batchnorm": recipe.train.sync_batchnorm and gpu,
            "fp16": recipe.train.fp16 and gpu,
            "disable_tqdm": True,
        }
    )
    return described.model_copy(
        update={
            "student": described.student.model_copy(update=untrained),
            "teacher": teachers["teacher"] if described.teacher else None,
            "teachers": {} if described.teacher else teachers,
            "baseline": None,
            "eval": recipe.eval.model_copy(update={"report": False}),
            "hub": HubConfig(),
            "data": recipe.data.model_copy(update={"num_labels": None, "unlabelled": "keep"}),
            "train": train,
        }
    )


def smoke(recipe: Recipe, folder: Path) -> str:
    """Run a recipe's smoke version in `folder` and return one line.

    Raises:
        UserError: it does not survive.
    """
    small = smoke_recipe(recipe, folder)
    classes = _num_classes(small)
    batch = small.train.per_device_train_batch_size
    size = max(cfg.image_size or 0 for cfg in (small.student, *small.all_teachers().values()))
    images = NoiseSource(STEPS * batch, max(size, small.data.image_size or 224), classes)
    trainer = DistillTrainer(small, train_dataset=images, eval_dataset=images)
    output = trainer.train()
    if not math.isfinite(output.training_loss):
        raise UserError(f"the loss is {output.training_loss} after {STEPS} steps")
    view = trainer.parts.student.info.preprocessing.image_size
    pixels = torch.randn(1, 3, view, view)
    again = load_model(str(folder), pretrained=True)
    expected = trainer.evaluator.students["student"](pixels.to(trainer.device)).cpu()
    found = TappedModel(again, again.info, ()).eval()
    with torch.no_grad():
        difference = (found(pixels).logits - expected).abs().max().item()
    # in half precision the evaluation itself rounds
    if difference > (0.05 if small.train.bf16 or small.train.fp16 else 1e-4) * max(1.0, expected.abs().max().item()):
        raise UserError(f"the reloaded student differs from the trained one by {difference:.2g}")
    names = ", ".join(choice.name for choice in trainer.parts.choices)
    return f"survived: {names}; loss {output.training_loss:.4g} after {STEPS} steps, exported and reloaded"


def _num_classes(recipe: Recipe) -> int:
    """Classes without data: as the recipe says, else the first teacher's, else the student's own."""
    named = [recipe.student.num_classes, *(cfg.num_classes for cfg in recipe.all_teachers().values())]
    given = next((number for number in named if number), None)
    if given is not None:
        return given
    first = next(iter(recipe.all_teachers().values()), recipe.student)
    return load_model(
        str(first.model), kwargs=first.kwargs, image_size=first.image_size or recipe.data.image_size, device="meta"
    ).info.num_classes
