"""A recipe that is a table of runs: a cell is laid over it, under what the command line says."""

import pytest

from kd_hf.errors import UserError
from kd_hf.plan.describe import describe, plan_recipe
from kd_hf.recipe.read import load_recipe, make_recipe
from kd_hf.recipe.resolved import dump_recipe, recipe_hash, recipe_schema
from kd_hf.recipe.variants import plain_twin

METHODS = """\
cells:
  plain: {teacher: null}
  kd: {methods: {task: {weight: 0.1}, kd: {weight: 0.9, temperature: 4.0}}}
  dkd: {methods: {dkd: {beta: 8.0}}}
  kd+dkd: {}
  ofd: {methods: {ofd: {}}}
"""
PAIR = """\
base: methods.yaml
student: {model: test_resnet, num_classes: 10}
teacher: {model: test_resnet, pretrained: false, num_classes: 10}
baseline: 60.0
data: {path: builtin:digits}
train: {output_dir: runs/pair, learning_rate: 0.5}
cells:
  kd: {published: {score: 70.66, source: them}}
  dkd: {published: {score: 71.97, source: others}, methods: {dkd: {beta: 2.0}}, train: {learning_rate: 0.1}}
  kd+dkd: {published: {score: 75, source: both}}
  ofd: false
"""


@pytest.fixture
def pair(tmp_path):
    """A pair of networks over a fragment with methods."""
    (tmp_path / "methods.yaml").write_text(METHODS)
    (tmp_path / "pair.yaml").write_text(PAIR)
    return tmp_path / "pair.yaml"


def test_a_cell_lies_over_the_pair_and_under_the_command_line(pair):
    recipe = load_recipe(pair, ["cell=dkd"])
    assert (recipe.cell, recipe.published.score, recipe.published.source) == ("dkd", 71.97, "others")
    assert recipe.methods["dkd"].options["beta"] == 2.0 and list(recipe.methods) == ["dkd"]
    assert (recipe.train.learning_rate, recipe.train.output_dir) == (0.1, "runs/pair/dkd")
    changed = load_recipe(pair, ["train.learning_rate=3", "methods.dkd.beta=5", "cell=dkd", "train.output_dir=here"])
    assert (changed.train.learning_rate, changed.train.output_dir) == (3, "here")
    assert changed.methods["dkd"].options["beta"] == 5
    other = load_recipe(pair, ["cell=dkd", "cells.dkd.methods.dkd.beta=6"])
    assert other.methods["dkd"].options["beta"] == 6


def test_cells_do_not_leak_into_each_other(pair):
    kd, plain = load_recipe(pair, ["cell=kd"]), load_recipe(pair, ["cell=plain"])
    assert set(kd.methods) == {"task", "kd"} and kd.train.learning_rate == 0.5
    assert plain.methods == {} and plain.teacher is None and plain.published is None


def test_cells_are_combined(pair):
    both = load_recipe(pair, ["cell=kd+dkd"])
    assert set(both.methods) == {"task", "kd", "dkd"} and both.published.score == 75
    assert both.train.output_dir == "runs/pair/kd+dkd"
    odd = load_recipe(pair, ["cell=dkd+plain"])  # published for neither
    assert odd.published is None and odd.teacher is None and set(odd.methods) == {"dkd"}


def test_the_resolved_recipe_is_the_cell(pair, tmp_path):
    recipe = load_recipe(pair, ["cell=dkd"])
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    same = recipe.model_copy(update={"cell": None, "published": None})
    assert recipe_hash(same) == recipe_hash(recipe)  # what was published decides nothing
    assert plain_twin(recipe).published is None


def test_the_plan_says_what_was_published(pair):
    plan = plan_recipe(load_recipe(pair, ["cell=dkd"]))
    assert plan["published"] == {"score": 71.97, "source": "others"} and plan["published_plain"] == 60.0
    lines = describe(plan).splitlines()
    assert lines[0].endswith(", cell dkd")
    assert lines[1:3] == ["published  71.97 by others", "published  60 for the student without a teacher"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            r"pair\.yaml:7: this recipe is a table of runs; choose one, cell=NAME: plain, kd \(70\.66\), dkd \(71",
        ),
        (["cell=dkk"], r"override 'cell=dkk': cell: there is no cell 'dkk'\. Did you mean 'dkd'\?"),
        (["cell=kd+ofd"], r"there is no cell 'ofd'"),
        (["cell=dkd", "cells=3"], r"override 'cells=3': `cells` is a block of blocks"),
        (["cell=dkd", "cells.dkd.train.learning_rat=3"], r"unknown key 'train\.learning_rat'"),
    ],
)
def test_mistakes_end_in_a_line_that_names_the_place(pair, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(pair, overrides)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_in_a_cell_is_shown_where_it_is_written(pair):
    pair.write_text(PAIR.replace("beta: 2.0", "beta: much"))
    with pytest.raises(UserError, match=r"pair\.yaml:9: methods\.dkd\.beta: .*much"):
        load_recipe(pair, ["cell=dkd"])
    assert load_recipe(pair, ["cell=kd"]).cell == "kd"  # another one is not in its way


def test_recipes_named_in_a_cell_lie_beside_it(pair):
    pair.write_text(PAIR.replace("train: {learning_rate: 0.1}", "teacher: {model: null, recipe: big.yaml}"))
    assert load_recipe(pair, ["cell=dkd"]).teacher.recipe == str(pair.parent / "big.yaml")


def test_a_table_made_in_python_is_one_too():
    values = {
        "student": {"model": "test_resnet"},
        "data": {"path": "builtin:digits"},
        "train": {"output_dir": "x"},
        "cell": "a",
        "cells": {"a": {"train": {"max_steps": 3}}},
    }
    recipe = make_recipe(values, "made here")
    assert (recipe.train.max_steps, recipe.train.output_dir) == (3, "x/a")
    assert values["cells"] == {"a": {"train": {"max_steps": 3}}} and values["train"] == {"output_dir": "x"}


def test_editors_know_cells():
    properties = recipe_schema()["properties"]
    assert {"train", "methods", "published"} <= properties["cells"]["additionalProperties"]["properties"].keys()
    assert "cell" in properties
