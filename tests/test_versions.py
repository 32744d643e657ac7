"""The versions that setup.cfg asks for are those that were tested."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LINTERS = {"ruff", "mypy", "types-pyyaml", "types-tqdm", "import-linter"}


def requirements():
    """By name, those of the package and of its extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    blocks = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [Requirement(line) for block in blocks for line in block.split("\n") if line]
    return {canonicalize_name(line.name): line.specifier for line in lines}


def pins(name):
    lines = [Requirement(line) for line in (ROOT / "tests" / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(line.name): Version(str(line.specifier).removeprefix("==")) for line in lines}


def lower_bounds():
    bounds = {name: [part for part in specifier if part.operator == ">="] for name, specifier in requirements().items()}
    return {name: Version(parts[0].version) for name, parts in bounds.items() if parts and name not in LINTERS}


def test_lower_bounds_are_the_oldest_versions_tested():
    assert lower_bounds() == pins("oldest.txt")


def test_the_newest_versions_tested_are_of_all_requirements():
    newest, asked_for = pins("newest.txt"), requirements()
    assert newest.keys() == asked_for.keys()
    assert all(specifier.contains(newest[name]) for name, specifier in asked_for.items())


def test_compatibility_ends_above_the_lower_bounds():
    """Each function of compat.py names the version that it can go with; once that is required, it is to be deleted."""
    text, bounds = (ROOT / "kd_hf" / "compat.py").read_text(), lower_bounds()
    functions = re.findall(r'^def [a-z]\w+\(.*?""".*?"""', text, re.MULTILINE | re.DOTALL)
    for function in functions:
        (library, version), *_ = re.findall(r"(timm|transformers|torch|huggingface_hub) (\d+(?:\.\d+)+)", function)
        assert Version(version) > bounds[canonicalize_name(library)]
    assert functions
