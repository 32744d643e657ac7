"""The pairs of networks that every paper compares on: their cells are recipes, and their methods fit their networks."""

import pytest

from kd_hf.distillation.assembly import assemble
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.variants import with_untrained_teachers
from tests.programs.recipe_index import FOLDER, cells_of

PAIRS = [path for folder in ("cifar100", "imagenet") for path in sorted((FOLDER / folder).glob("*.yaml"))]
PAIRS = [path for path in PAIRS if cells_of(path)]
# a cell that is built for each pair, so that every method is built once and meets networks that it finds hard
BUILT = {
    "resnet110_resnet20": "kd_ls",
    "resnet110_resnet32": "dkd_ls",
    "resnet32x4_resnet8x4": "sd_kd",
    "resnet32x4_shufflenetv1": "ofd",
    "resnet32x4_shufflenetv2": "sd_dkd",
    "resnet50_mobilenetv2": "sd_nkd",
    "resnet50_vgg8": "ofd",
    "resnet56_resnet20": "wttm+crd",
    "vgg13_mobilenetv2": "reviewkd",
    "vgg13_vgg8": "vid",
    "wrn_40_2_shufflenetv1": "fitnet",
    "wrn_40_2_wrn_16_2": "at",
    "wrn_40_2_wrn_40_1": "ctkd",
    "resnet34_resnet18": "ofa",
    "resnet50_mobilenetv1": "reviewkd",
}


def test_all_of_them_are_there():
    assert {path.stem for path in PAIRS} == BUILT.keys()
    assert {f"{path.stem}.yaml" for path in PAIRS if path.parent.name == "cifar100"} | {
        f"{name}.yaml" for name in ("resnet56", "resnet110", "resnet32x4", "resnet50", "wrn_40_2", "vgg13")
    } == {path.name for path in (FOLDER / "cifar100").glob("*.yaml")}


# reading YAML takes a while: pairs whose own values differ in kind stand for the others
READ = [path for path in PAIRS if path.stem in ("resnet56_resnet20", "resnet50_mobilenetv2", "resnet50_mobilenetv1")]


@pytest.mark.parametrize("path", READ, ids=lambda path: path.stem)
def test_every_cell_is_a_recipe(path):
    plain = load_recipe(path, ["cell=plain"])
    assert plain.teacher is None and plain.published.score == load_recipe(path, ["cell=kd"]).baseline
    for name in cells_of(path):
        recipe = load_recipe(path, [f"cell={name}"])
        assert recipe.train.output_dir == f"runs/{path.parent.name}/{path.stem}/{name}"
        assert bool(recipe.teacher) == (name != "plain")
        assert recipe.published is None or 55 < recipe.published.score < 85


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_cell_of_each_is_built(path):
    recipe = load_recipe(path, [f"cell={BUILT[path.stem]}"])
    parts = assemble(with_untrained_teachers(recipe), device="meta")
    assert parts.teachers.keys() == {"teacher"} and len(parts.choices) >= 2


def test_what_the_authors_changed_for_a_pair():
    def options(pair, cell, method):
        block = load_recipe(FOLDER / "cifar100" / f"{pair}.yaml", [f"cell={cell}"]).methods[method]
        return block.weight, block.options

    assert options("resnet56_resnet20", "dkd", "dkd")[1]["beta"] == 2
    assert options("wrn_40_2_wrn_16_2", "dkd", "dkd")[1]["beta"] == 6
    assert options("resnet32x4_resnet8x4", "dkd", "dkd")[1]["beta"] == 8
    weight, values = options("resnet56_resnet20", "dkd_ls", "dkd")
    assert weight.warmup[:2] == (0, 18) and (values["temperature"], values["beta"]) == (3, 2)
    assert options("resnet50_mobilenetv2", "kd_ls", "kd")[0] == 1
    assert options("resnet32x4_shufflenetv2", "reviewkd", "reviewkd")[0].warmup[1] == 8
    slow = load_recipe(FOLDER / "cifar100" / "resnet50_mobilenetv2.yaml", ["cell=kd"]).train
    fast = load_recipe(FOLDER / "cifar100" / "resnet50_vgg8.yaml", ["cell=kd"]).train
    assert (slow.learning_rate, fast.learning_rate) == (0.01, 0.05)
    assert load_recipe(FOLDER / "cifar100" / "vgg13_vgg8.yaml", ["cell=ofd"]).teacher.mode == "train"
