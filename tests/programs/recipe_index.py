"""The table of recipes in ``recipes/README.md``, which ``python -m tests.programs.recipe_index`` writes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from tests.runs import ROOT

FOLDER = ROOT / "recipes"
README = FOLDER / "README.md"
INTRODUCTION = """\
# Recipes

One file for every published row, and one for each student without a teacher. The first lines of a file say where its
values come from, what was published, what differs from the authors' run, and the command. `python -m kd_hf.plan FILE`
explains one, and any value can be changed on the command line. The quick starts need nothing but this package; the
others are for ImageNet-1k, or CIFAR-100 where the name says so; detectors (ViDT, YOLOS, RT-DETR) are for COCO.
Published numbers are top-1 in percent, average precision for detectors; a dash stands where nothing was published for
these values. None has been measured with this code.
"""
PAIRS = """
# Pairs of networks with any method

Here a recipe is a pair of networks, and each method a *cell* of it: `python -m kd_hf.train
recipes/cifar100/resnet56_resnet20.yaml cell=dkd` trains one, `python -m kd_hf.plan` explains it with what was published
for it, and the closing table shows both numbers. Cells are combined by `+` (`cell=wttm+crd`); their values are in
`_base/cifar100_methods.yaml` and `_base/imagenet_methods.yaml`, and can be changed as any other. A dot stands where
nothing was published for the cell, a dash where the pair has no such cell.
"""
COLUMNS = ("recipe", "student", "teacher", "losses", "published", "without", "images a step", "length")


def header(path: Path) -> list[str]:
    """The comment lines above a recipe, without their marks; what is indented goes on from the line before."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\nbase:")[0].splitlines():
        if line.startswith("#   ") and lines and "-m kd_hf" not in line and "accelerate launch" not in line:
            lines[-1] += " " + line[1:].strip()
        else:
            lines.append(line[1:].strip())
    return lines


def processes(path: Path) -> int:
    """How many processes the command in a recipe's header starts."""
    text = path.read_text(encoding="utf-8")
    config, said = re.search(r"--config_file (\S+)", text), re.search(r"--num_processes (\d+)", text)
    if said:
        return int(said[1])
    return yaml.safe_load((ROOT / config[1]).read_text())["num_processes"] if config else 1


def published(path: Path) -> tuple[str, str]:
    """Top-1 with and without distillation, as the header gives them; a dash where it does not."""
    expected = next((line for line in header(path) if line.startswith("Expected:")), "")
    with_, without = re.match(r"Expected: ([\d.]+) (?:top-1|AP)", expected), re.search(r"([\d.]+) without", expected)
    return (with_[1] if with_ else "–"), (without[1] if without else "–")


def row(path: Path) -> tuple[str, ...]:
    """The cells of a recipe, in the order of :data:`COLUMNS`."""
    recipe = load_recipe(path)
    train = recipe.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.num_train_epochs:g} epochs"
    gpus = processes(path)
    images = f"{batch:,}" if gpus == 1 else f"{gpus} × {batch}"
    return (
        f"[{path.stem}]({path.name})",
        recipe.student.model,
        ", ".join(_teacher(recipe)) or "–",
        ", ".join(name for name, block in recipe.methods.items() if name != "task" and block.weight != 0) or "–",
        *published(path),
        images,
        length,
    )


def pair_tables() -> str:
    """What was published for the cells of every pair: a table of methods and pairs for each data set."""
    text = PAIRS
    for folder in ("cifar100", "imagenet"):
        pairs = [path for path in sorted((FOLDER / folder).glob("*.yaml")) if cells_of(path)]
        scores = {path: {name: (cell.get("published") or {}).get("score", "·") for name, cell in cells_of(path).items()}
                  for path in pairs}  # fmt: skip
        names = dict.fromkeys(name for path in pairs for name in scores[path])
        head = ("cell", *(f"[{path.stem}]({folder}/{path.name})" for path in pairs))
        rows = [head, ("---",) * len(head)]
        rows += [(f"`{name}`", *(str(scores[path].get(name, "–")) for path in pairs)) for name in names]
        text += "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return text


def cells_of(path: Path) -> dict[str, dict]:
    """The cells of a recipe, those of its fragments included; none where it is not a table of runs."""
    cells: dict[str, dict] = {}
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = values.get("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        cells |= cells_of(path.parent / base)
    for name, cell in values.get("cells", {}).items():
        cells[name] = {**(cells.get(name) or {}), **cell} if cell else cell
    return {name: cell for name, cell in cells.items() if cell is not False}


def _teacher(recipe: Recipe) -> list[str]:
    return [(cfg.model or Path(cfg.recipe or "").name).removeprefix("timm/") for cfg in recipe.all_teachers().values()]


def index() -> str:
    """The text of ``recipes/README.md``."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(path) for path in sorted(FOLDER.glob("*.yaml")))]
    return INTRODUCTION + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + pair_tables()


if __name__ == "__main__":
    README.write_text(index(), encoding="utf-8")
    print(f"{README.relative_to(ROOT)}: {len(index().splitlines())} lines")
