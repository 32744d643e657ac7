"""All commands: ``python -m kd_hf``, installed ``kd-hf``, lists them and runs one (``kd-hf train RECIPE``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from kd_hf.errors import UserError, nearest, run_command
from kd_hf.version import __version__

# name, which is a package with a `__main__`, → what it does
COMMANDS = {
    "train": "distil a student as a recipe says, try the recipe (--smoke), or push a finished run (--push)",
    "plan": "explain a recipe without data and weights, or print the schema of recipe files",
    "eval": "measure models on a data set, alone or against a teacher",
    "compare": "compare runs: tables, JSON, a plot",
    "report": "draw the page of a run",
    "cache": "store what teachers say about every training image",
    "export": "write a student as one file that runs without kd_hf",
    "convert": "turn a checkpoint of other code into a model folder",
    "bench": "show where the time and memory of a training step go",
}


def main(argv: Sequence[str]) -> int:
    """Run the command that the first argument names with the others; without one, list all."""
    name, *rest = argv or ("--help",)
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command '{name}'.{nearest(name, COMMANDS)}")
    command: Callable[[Sequence[str]], int] = import_module(f"kd_hf.{name}.__main__").main
    return command(rest)


def _usage() -> str:
    lines = (f"  {name:8} {does}" for name, does in COMMANDS.items())
    return "\n".join(
        ("usage: kd-hf COMMAND …, or python -m kd_hf.COMMAND …", "", *lines, "", "kd-hf COMMAND --help says more.")
    )


def console() -> None:
    """The installed command ``kd-hf``."""
    run_command(main)


if __name__ == "__main__":
    console()
