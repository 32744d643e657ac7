"""What the README says is so: its recipes are valid, its table is current, its method works as printed."""

from __future__ import annotations

import re

import yaml

from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.testing import check_method
from tests.programs.readme_methods import README, with_table
from tests.runs import ROOT

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_table_of_methods_is_current():
    assert with_table(TEXT) == TEXT, "run python -m tests.programs.readme_methods"


def test_recipes_are_valid_and_short(tmp_path):
    texts = blocks("yaml")
    assert len(texts) == 2
    for text in texts:
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
        assert len(text.splitlines()) < 20
    student = load_recipe(tmp_path / "student.yaml")
    assert isinstance(student, Recipe)
    assert student.teacher is not None and student.teacher.recipe == str(tmp_path / "teacher.yaml")
    load_recipe(student.teacher.recipe)


def test_method_of_the_readme_passes_the_conformance_test():
    namespace: dict = {}
    exec(next(block for block in blocks("python") if "class PooledL1" in block), namespace)
    check_method(namespace["PooledL1"])


def test_files_that_are_named_exist():
    links, paths = r"\]\(([\w./]+)\)", r"(?:recipes|accelerate_configs)/\w+\.yaml"
    names = {*re.findall(links, TEXT), *re.findall(paths, TEXT)}
    assert {"recipes/quickstart.yaml", "recipes/quickstart.png"} <= names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_recipes_of_the_project_are_valid():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        load_recipe(file)
        header = file.read_text(encoding="utf-8").split("\nbase:")[0]
        assert f"-m kd_hf.train recipes/{file.name}" in header


def test_launcher_configurations_parse():
    from accelerate.commands.config.config_args import load_config_from_file

    for file in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        config = load_config_from_file(str(file))
        assert config.num_processes == yaml.safe_load(file.read_text())["num_processes"]


def test_the_python_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    code = next(block for block in blocks("python") if "DistillTrainer(" in block)
    shorter = code.replace('"num_train_epochs": 10', '"num_train_epochs": 3, "cpu_threads": 1')
    assert shorter != code
    monkeypatch.chdir(tmp_path)
    exec(compile(shorter, "README.md", "exec"), {})
    assert re.search(r"% right, .* % as the teacher says\n$", capsys.readouterr().out)
    assert (tmp_path / "runs/py_student/report/index.html").is_file()
