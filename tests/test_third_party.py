"""A method of another package: installed by pip, found by its entry point, checked, and trained by a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_hf.errors import UserError
from kd_hf.methods import get_method, method_names
from kd_hf.run.log import read_log
from tests.forked import Fork
from tests.runs import ROOT, TEACHER, environment, recipe_file, run

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "yourpackage"
version = "0.1"

[project.entry-points."kd_hf.methods"]
pooled_l1 = "yourpackage:PooledL1"
not_a_method = "yourpackage:SETTINGS"
moved_away = "yourpackage:Gone"

[tool.setuptools]
py-modules = ["yourpackage"]
"""
MODULE = '''\
"""The example of kd_hf's README."""

{example}

SETTINGS = {{"tap": "pre_logits"}}
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as pip installs it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = next(block for block in readme.split("```python\n")[1:] if "class PooledL1" in block).partition("```")[0]
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "yourpackage.py").write_text(MODULE.format(example=example.strip()))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    done = run("pip", "install", *offline, "--target", str(target), str(source))
    assert done.returncode == 0, done.stderr
    return target


def paths(package: Path) -> str:
    """What Python searches: this checkout and the package."""
    return os.pathsep.join((str(ROOT), str(package)))


def train(package: Path, folder: Path, methods: dict) -> subprocess.CompletedProcess[str]:
    """Two steps with these methods."""
    blocks = {"teacher": TEACHER, "methods": methods, "train": {"max_steps": 2}}
    file = recipe_file(folder / "recipe.yaml", folder / "run", blocks)
    return Fork("kd_hf.train", str(file), PYTHONPATH=paths(package)).end()


def test_it_is_listed_and_keeps_the_contract(installed):
    code = "; ".join(
        (
            "from kd_hf.methods import get_method, method_names",
            "from kd_hf.testing import check_method",
            "check_method(get_method('pooled_l1'))",
            "print(*method_names())",
        )
    )
    seen = environment() | {"PYTHONPATH": paths(installed)}
    done = subprocess.run([sys.executable, "-c", code], env=seen, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names == sorted(names)
    assert {"pooled_l1", "kd", "task"} <= set(names)


def test_a_recipe_trains_with_it(installed, tmp_path):
    done = train(installed, tmp_path, {"pooled_l1": {"weight": 2.0, "tap": "pre_logits"}})
    assert done.returncode == 0, done.stderr
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["loss"] == pytest.approx(line["task/ce"] + 2.0 * line["pooled_l1/l1"], rel=1e-5)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"not_a_method": {}}, "the entry point 'not_a_method' of group kd_hf.methods is not a Method class"),
        ({"moved_away": {}}, "'moved_away' of group kd_hf.methods (yourpackage:Gone) does not load: module"),
        ({"pooled_l1": {"tapp": "pre_logits"}}, "Did you mean 'tap'?"),
        ({"pooled_l2": {}}, "Did you mean 'pooled_l1'?"),
    ],
)
def test_mistakes_end_in_one_line(installed, tmp_path, methods, message):
    done = train(installed, tmp_path, methods)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("kd_hf: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def register(site: Path, package: str, *lines: str) -> None:
    """What pip leaves of a package with these entry points, without its modules."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(("[kd_hf.methods]", *lines)) + "\n")


@pytest.fixture
def others(tmp_path, monkeypatch):
    """Two packages: one takes names of kd_hf, and both have the same one."""
    register(tmp_path, "greedy", "kd = greedy:KD", "detr_kd = greedy:Boxes", "twice = greedy:Once")
    register(tmp_path, "other", "twice = other:Again")
    monkeypatch.syspath_prepend(str(tmp_path))
    for known in (method_names, get_method):
        known.cache_clear()
    yield
    for known in (method_names, get_method):
        known.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kd", r"the method 'kd' is kd_hf's own, but the package 'greedy' registers another one \(greedy:KD\)"),
        ("detr_kd", r"'detr_kd' is kd_hf's own, but the package 'greedy' registers another one \(greedy:Boxes\)"),
        ("twice", r"two packages register a method 'twice': 'greedy' \(greedy:Once\) and 'other' \(other:Again\)"),
    ],
)
def test_a_name_that_is_taken_is_refused_with_its_package(others, name, message):
    with pytest.raises(UserError, match=rf"{message}.*; rename [^;]*, or uninstall") as caught:
        get_method(name)
    assert "\n" not in str(caught.value)
    assert get_method("mgd").__module__ == "kd_hf.methods.mgd"  # names that nobody else takes are as they were
