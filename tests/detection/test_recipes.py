"""The recipes of detectors say what their papers' authors did."""

import pytest

from kd_hf.distillation.assembly import assemble
from kd_hf.recipe.read import load_recipe
from tests.programs.recipe_index import processes, published
from tests.runs import ROOT

FOLDER = ROOT / "recipes"
# published: AP with and without distillation, millions of parameters of student and teacher (ViDT's with unused ones)
ROWS = {
    "vkd_vidt_nano": (("43.0", "40.4"), 15.73, 99.96),
    "vkd_vidt_tiny": (("46.9", "44.9"), 37.96, 99.96),
    "vidt_tokens_nano": (("41.8", "40.4"), 15.73, 99.96),
    "vidt_tokens_tiny": (("46.6", "44.9"), 37.96, 99.96),
    "vidt_tokens_small": (("49.2", "47.4"), 60.47, 99.96),
    "rtdetrv2_r101_r18": (("–", "–"), 20.0, 76.0),
    "yolos_base_tiny": (("–", "–"), 6.5, 127.0),
}


@pytest.mark.parametrize("name", ROWS)
def test_networks_and_published_numbers(name):
    numbers, student, teacher = ROWS[name]
    path = FOLDER / f"{name}.yaml"
    assert published(path) == numbers
    parts = assemble(load_recipe(path), 91, "meta")
    assert parts.student.info.parameters / 1e6 == pytest.approx(student, rel=0.02)
    assert parts.teachers["teacher"].info.parameters / 1e6 == pytest.approx(teacher, rel=0.02)


@pytest.mark.parametrize("name", ["vkd_vidt_nano", "vkd_vidt_tiny"])
def test_vkd_trains_as_its_authors_did(name):
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    train = recipe.train
    assert processes(FOLDER / f"{name}.yaml") * train.per_device_train_batch_size == 12
    assert (train.num_train_epochs, train.learning_rate, train.min_lr) == (50, 1e-4, 1e-7)
    assert (train.optim, train.weight_decay, train.max_grad_norm) == ("adamw", 1e-4, 0.1)
    assert (train.lr_scheduler_type, train.lr_schedule_on) == ("cosine", "epoch")
    assert recipe.methods["vkd_tokens"].weight == 4.0
    augment = recipe.data.boxes.augment
    assert (augment.sizes[0], augment.sizes[-1], augment.max_size, augment.crop_range) == (480, 800, 1333, (384, 600))
