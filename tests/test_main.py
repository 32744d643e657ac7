"""``python -m kd_hf``: all commands behind one name."""

import pkgutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.util import find_spec

import pytest

import kd_hf
from kd_hf.__main__ import COMMANDS, main
from kd_hf.errors import UserError
from kd_hf.version import __version__
from tests.runs import ROOT, environment


def test_every_package_that_runs_is_a_command():
    packages = [module.name for module in pkgutil.iter_modules(kd_hf.__path__) if module.ispkg]
    assert set(COMMANDS) == {name for name in packages if find_spec(f"kd_hf.{name}.__main__")}


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_commands_are_listed_in_a_line_each(capsys, arguments):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name, does in COMMANDS.items():
        assert f"{name:8} {does}\n" in shown


def test_a_command_runs_with_what_stands_behind_it(capsys):
    assert main(["plan", str(ROOT / "recipes" / "kd_resnet34_resnet18.yaml"), "--json"]) == 0
    assert '"kd"' in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown command 'trian'\. Did you mean 'train'"):
        main(["trian", "recipe.yaml"])


def test_a_mistake_ends_in_a_line_and_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "kd_hf", "train", "no.yaml"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no recipe 'no.yaml'" in done.stderr


def test_the_installed_command_is_this_one():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].split() == ["kd-hf", "=", "kd_hf.__main__:console"]
