"""The table of recipes is current, and the command that plans them all tells good from bad."""

from __future__ import annotations

from tests.programs import plan_recipes, recipe_index
from tests.programs.recipe_index import FOLDER, README, index
from tests.runs import recipe_file


def test_the_index_is_current():
    assert README.read_text(encoding="utf-8") == index(), "run python -m tests.programs.recipe_index"


def test_a_row_of_the_index():
    assert recipe_index.row(FOLDER / "nkd_deit3_small_deit_tiny.yaml") == (
        "[nkd_deit3_small_deit_tiny](nkd_deit3_small_deit_tiny.yaml)", "deit_tiny_patch16_224",
        "deit3_small_patch16_224.fb_in22k_ft_in1k", "nkd", "76.68", "74.42", "4 × 256", "300 epochs",
    )  # fmt: skip


def test_the_command_prints_a_row_for_each_recipe(tmp_path, capsys):
    good = recipe_file(tmp_path / "good.yaml", tmp_path / "run")
    bad = recipe_file(tmp_path / "bad.yaml", tmp_path / "run", {"student": {"model": "resnet1"}})
    assert plan_recipes.main([str(good)]) == 0
    assert plan_recipes.main([str(good), str(bad)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["good", "good", "bad"]
    assert "trains 0." in lines[0] and "FAILED" in lines[2] and "resnet1" in lines[2]
