"""What importing costs, and what the commands need before they say something."""

import operator
import re
import subprocess
import sys

import pytest

import kd_hf
from kd_hf.__main__ import COMMANDS
from tests.runs import RECIPE, environment, recipe_file

HEAVY = ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "pyarrow", "sklearn", "matplotlib",
         "numpy")  # fmt: skip


def loaded_by(code):
    """Which heavy packages a fresh interpreter has imported after `code`."""
    script = f"import sys\n{code}\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_import_is_light():
    assert loaded_by("import kd_hf, kd_hf.errors; assert kd_hf.__version__") == set()


def test_a_recipe_block_is_light():
    assert loaded_by("from kd_hf import Recipe, UserError") == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_light(command):
    code = f"from kd_hf.{command}.__main__ import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
    assert loaded_by(code + "    assert not end.code") == set()


def test_a_mistake_in_the_recipe_needs_no_torch(tmp_path):
    path = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", {"train": {"lerning_rate": 1}})
    code = (
        "from kd_hf.train.__main__ import main\nfrom kd_hf.errors import UserError\n"
        f"try:\n    main([{str(path)!r}])\nexcept UserError as error:\n    assert 'learning_rate' in str(error)\n"
        "else:\n    raise SystemExit('accepted')"
    )
    assert loaded_by(code) == set()


def test_a_recipe_without_methods_is_checked_without_torch(tmp_path):
    path = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run")
    assert "methods" not in RECIPE
    assert loaded_by(f"from kd_hf import load_recipe\nload_recipe({str(path)!r})") == set()


def test_every_public_name_is_there():
    for name in kd_hf.__all__:
        assert getattr(kd_hf, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Distiller'"):
        operator.attrgetter("Distiller")(kd_hf)


def test_version_is_a_release_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", kd_hf.__version__)
