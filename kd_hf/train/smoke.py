"""A recipe's whole path in seconds: true networks with random weights, noise for images, two steps, export, reload."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from kd_hf.errors import UserError
from kd_hf.methods import get_method
from kd_hf.metrics.measure import runner
from kd_hf.recipe.config import HubConfig, Recipe
from kd_hf.recipe.variants import with_untrained_teachers
from kd_hf.tasks import open_task
from kd_hf.train.trainer import DistillTrainer

STEPS = 2


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe made small: random weights, two steps of the smallest batch it allows, on this machine.

    Everything that decides what is computed stays: networks, image sizes, methods, optimiser, precision.
    """
    described = with_untrained_teachers(recipe)
    untrained = {"pretrained": False}
    # the loss on mixed images pairs neighbours, repeated augmentation divides the batch
    unit = math.lcm(2, recipe.data.augment.repeats)
    least = max((get_method(recipe.method_of(name), recipe.task).least_images for name in recipe.methods), default=1)
    batch = unit * -(-least // unit)
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
    small = described.model_copy(
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
    return open_task(recipe).small(small)


def smoke(recipe: Recipe, folder: Path) -> str:
    """Run a recipe's smoke version in `folder` and return one line.

    Raises:
        UserError: it does not survive.
    """
    small = smoke_recipe(recipe, folder)
    classes = num_classes(small)
    batch = small.train.per_device_train_batch_size
    size = max(cfg.image_size or 0 for cfg in (small.student, *small.all_teachers().values()))
    task = open_task(small)
    images = task.noise(STEPS * batch, max(size, small.data.image_size or 224), classes)
    trainer = DistillTrainer(small, train_dataset=images, eval_dataset=images)
    output = trainer.train()
    if not math.isfinite(output.training_loss):
        raise UserError(f"the loss is {output.training_loss} after {STEPS} steps")
    example = task.example(trainer.parts.student.info.preprocessing, trainer.device)
    again = task.load(str(folder), pretrained=True)
    run = runner(task.tapped(again, again.info, ()).to(trainer.device), trainer.accelerator)
    expected = runner(trainer.trained.students()["student"], trainer.accelerator)(example).logits
    difference = (run(example).logits - expected).abs().max().item()
    # in half precision the evaluation itself rounds
    if difference > (0.05 if small.train.bf16 or small.train.fp16 else 1e-4) * max(1.0, expected.abs().max().item()):
        raise UserError(f"the reloaded student differs from the trained one by {difference:.2g}")
    names = ", ".join(choice.name for choice in trainer.parts.choices)
    return f"survived: {names}; loss {output.training_loss:.4g} after {STEPS} steps, exported and reloaded"


def num_classes(recipe: Recipe) -> int:
    """Classes without data: as the recipe says, else the first teacher's, else the student's own."""
    named = [recipe.student.num_classes, *(cfg.num_classes for cfg in recipe.all_teachers().values())]
    given = next((number for number in named if number), None)
    if given is not None:
        return given
    first = next(iter(recipe.all_teachers().values()), recipe.student)
    size = first.image_size or recipe.data.image_size
    loaded = open_task(recipe).load(str(first.model), kwargs=first.kwargs, image_size=size, device="meta")
    return loaded.info.num_classes
