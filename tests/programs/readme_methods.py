"""The README's table of methods, from the methods; ``python -m tests.programs.readme_methods`` rewrites it."""

from __future__ import annotations

from pathlib import Path

from kd_hf.errors import UserError
from kd_hf.methods import get_method, method_names
from kd_hf.plan.describe import plan_recipe
from kd_hf.recipe.config import Recipe

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- methods: written by python -m tests.programs.readme_methods -->\n", "<!-- end of methods -->"
# the pair of a method is the first of these that it accepts; they are pairs of the papers
PAIRS = (
    ("resnet34", "resnet18"),
    ("swin_small_patch4_window7_224", "resnet50"),
    ("deit3_small_patch16_224", "deit_tiny_patch16_224"),
    ("deit_base_patch16_224", "deit_tiny_patch16_224"),
    ("regnety_160", "deit_tiny_distilled_patch16_224"),
)
PREFERRED = {"scalekd": 1, "vitkd": 2, "cls_kd": 3, "manifold": 3, "vkd": 4, "deit_soft": 4, "deit_hard": 4}


def row(name: str) -> str:
    """One line of the table."""
    method = get_method(name)
    pairs = PAIRS[PREFERRED.get(name, 0) :]
    for teacher, student in pairs:
        try:
            facts = plan_recipe(_recipe(name, teacher, student))["methods"][name]
            break
        except UserError:
            continue
    else:
        raise AssertionError(f"no pair for {name}")
    reads = _taps(facts)
    learns = f"{facts['parameters'] / 1e6:.2f} M ({student} ← {teacher})" if facts["parameters"] else "–"
    options = ", ".join(f"`{key}`" for key in method.Config.model_fields) or "–"
    code = f"[code]({method.paper.code})" if method.paper.code else "–"
    return f"| `{name}` | [{method.paper.title}]({method.paper.url}) | {reads} | {learns} | {options} | {code} |"


def _recipe(name: str, teacher: str, student: str) -> Recipe:
    return Recipe.model_validate(
        {
            "student": {"model": student},
            "teacher": {"model": teacher},
            "methods": {name: {"weight": 1.0}},
            "data": {"path": "none"},
            "train": {"output_dir": "none"},
        }
    )


def _taps(facts: dict) -> str:
    parts = []
    for who in ("student", "teacher"):
        taps = list(dict.fromkeys(facts[f"{who}_taps"].values()))
        shown = taps if len(taps) <= 4 else [taps[0], "…", taps[-1]]
        if taps:
            parts.append(f"{who} " + ", ".join(tap if tap == "…" else f"`{tap}`" for tap in shown))
    return "; ".join(parts) or "logits"


def table() -> str:
    """The whole table in Markdown."""
    head = "| key | paper | reads (beside logits) | learns, parameters | options | official |\n"
    head += "|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(name)}\n" for name in method_names())


def with_table(text: str) -> str:
    """The README with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
