"""What distillation costs here.

``python -m tests.programs.benchmark_table [--rounds N] [--images FOLDER] [--only NAME …]``.

Writes the section about a CPU in ``recipes/benchmarks.md``; that about a GPU, by `tests.programs.gpu`, stays. With
`--only` the rows of the named cases are renewed, which should be done on the machine and with the versions that the
section names; of its other tables nothing is. Every process has one thread. Neither weights nor a network connection
are needed; what loaders cost and stores save is measured on `--images` only, a folder of Parquet or JPEG files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_hf.bench.show import extra_bytes, spread
from kd_hf.files import write_text
from kd_hf.text import markdown
from tests.runs import ROOT, command, environment
from tests.test_two_processes import accelerate_launch

FILE = ROOT / "recipes" / "benchmarks.md"
INTRODUCTION = """\
# Benchmarks

Ratios between things that took turns on one machine. `python -m tests.programs.benchmark_table` writes the section
about a CPU, `python -m tests.programs.gpu` that about a GPU; `python -m kd_hf.bench RECIPE` measures any recipe.

The *tax* is a training step without its optimiser over the bare pair: the teacher's network alone in inference mode,
then forward, cross-entropy and backward of the student's network alone, on the same tensors at random weights. It is
a median over rounds, with quartiles in brackets; *by FLOPs* is what the methods' own modules cost by counting. Teachers
are in eval mode. The parts are shares of the whole step, its optimiser (with the clipping of gradients) included.
*Extra GB* is peak memory of three steps over that of the bare pair, in processes of their own, without what the
optimiser keeps.

Where a CPU misses a bound, this is why. The generators of ViTKD and MGD add the FLOPs that the column says, in products
that run at the rate of the networks' own, so that share is their floor. AVX-512 BF16 multiplies twice as fast as
float32 at best, and attention and norms gain less, so a transformer as teacher stays near one half. Of the loader with
RandAugment nearly half the time is timm's policy on Pillow's images, which both sides run to the same pixels.
"""


@dataclass(frozen=True)
class Case:
    """A recipe whose step is measured; bounds of the tax, of GB over the bare pair, of a bfloat16 teacher's time."""

    recipe: str
    overrides: Sequence[str] = ()
    batch: int = 8
    bound: float | None = None
    memory: float | None = None
    bf16: float | None = None


def logit_cases() -> dict[str, Case]:
    """Methods that compare logits, between two transformers and between two convolutional networks."""
    unmixed = {"dkd", "wsld"}  # defined for index labels only
    found = {}
    for pair, recipe, bf16 in (("vit", "nkd_deit3_small_deit_tiny", 0.45), ("cnn", "nkd_resnet34_resnet18", 0.65)):
        found[f"nkd_{pair}"] = Case(recipe, bound=1.02, bf16=bf16)
        for method in ("kd", "dkd", "wsld", "deit_soft", "deit_hard"):
            options = ["methods.nkd=false", f"methods.{method}={{weight: 1.0}}"]
            options += ["data.augment.mixup=0", "data.augment.cutmix=0"] if method in unmixed else []
            found[f"{method}_{pair}"] = Case(recipe, options, bound=1.02)
    return found | {"uskd_vit": Case("uskd_deit_tiny", bound=1.02), "uskd_cnn": Case("uskd_resnet18", bound=1.02)}


CASES = {
    **logit_cases(),
    "vitkd_nkd": Case("vitkd_nkd_deit3_small_deit_tiny", bound=1.10),
    "mgd": Case("mgd_resnet34_resnet18", bound=1.06),
    "srrl": Case("srrl_resnet34_resnet18"),
    "cls_kd": Case("cls_kd_deit_base_deit_tiny", ("data.augment.repeats=1",), batch=4, bound=1.045),
    "vkd": Case("vkd_regnety_160_conv_stem_deit_tiny", batch=4, bound=1.04),
    # three projectors, as the authors' weights say; and with the fourth, whose weight is 0 there
    "scalekd": Case("scalekd_swin_res50", batch=4, bound=2.1, memory=1.2),
    "scalekd_four": Case(
        "scalekd_swin_res50", ("methods.scalekd.alpha={s3: [0.08, 0.06], s4: [0.08, 0.06]}",), batch=4, memory=1.2
    ),
}


# --- steps --------------------------------------------------------------------------------------------------------


def bench(case: Case, rounds: int) -> dict[str, Any]:
    """The numbers of a case, measured on the CPU in a process of its own."""
    teacher = () if case.recipe.startswith("uskd") else ("teacher.mode=eval",)
    options = ["--rounds", str(rounds), "--memory", "--batch", str(case.batch)]
    options += ["--bf16-teacher"] if case.bf16 else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        overrides = [*case.overrides, *teacher, "train.cpu_threads=1", "train.use_cpu=true"]
        bench_command = command("kd_hf.bench", f"recipes/{case.recipe}.yaml", *overrides, *options, "--json", str(file))
        done = subprocess.run(bench_command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{shlex.join(bench_command[1:])}: {done.stderr}")
        return json.loads(file.read_text())


def verdict(value: float, bound: float | None) -> str:
    """A bound and whether it is kept."""
    return "" if bound is None else f"≤ {bound:g} {'ok' if value <= bound else '**over**'}"


PARTS = ("hand-over", "teacher", "student", "losses", "backward", "optimiser")
HEAD = ("case", "networks", "batch", "tax", "bound", "by FLOPs", *(f"{part} %" for part in PARTS), "extra GB", "bound")


def step_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a case."""
    case = CASES[name]
    extra = extra_bytes(found["memory"]) / 1e9
    teachers = ", ".join(found["teachers"].values()) or "no teacher"
    shares = (found["parts"].get(part, 0.0) / sum(found["parts"].values()) for part in PARTS)
    return (
        name,
        f"{teachers} → {found['student']}".replace("timm/", ""),
        str(found["batch"]),
        spread(found["tax"]),
        verdict(found["tax"]["median"], case.bound),
        f"{found['flops']['tax']:.3f}",
        *(f"{100 * share:.1f}" for share in shares),
        f"{extra:.2f}",
        verdict(extra, case.memory),
    )


def step_lines(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table of all cases, and that of the teachers in bfloat16."""
    yield from markdown.table([HEAD, *(step_row(name, found) for name, found in measured.items())], left=2)
    halves = {name: found["bf16_teacher"] for name, found in measured.items() if "bf16_teacher" in found}
    if halves:
        rows = [
            (measured[name]["teachers"]["teacher"], spread(half), verdict(half["median"], CASES[name].bf16))
            for name, half in halves.items()
        ]
        yield from ("", *markdown.table([("teacher", "bfloat16 ÷ float32", "bound"), *rows]))


# --- the rest -----------------------------------------------------------------------------------------------------


def exchange_lines() -> Iterator[str]:
    """Bytes of gradients that a process of two sends in a step, over those of student and methods."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        recipe = "recipes/vitkd_nkd_deit3_small_deit_tiny.yaml"
        done = accelerate_launch("kd_hf.bench", recipe, "--batch", "2", "--rounds", "1", "--json", str(file))
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(file.read_text())["exchange"]
    ratio = found["sent_over_gradients"]
    yield f"Two processes, ViTKD + NKD: {found['sent_bytes'] / 1e6:.1f} MB of gradients sent by each in a step, "
    yield f"{ratio:.4f} of the gradients of student and methods ({verdict(ratio, 1.02)})."


START = {
    "`import kd_hf`": (["-c", "import kd_hf"], 0.12),
    "`kd_hf.train --help`": (["-m", "kd_hf.train", "--help"], 0.3),
    "a wrong key in a recipe": (["-m", "kd_hf.train", "recipes/quickstart.yaml", "train.learning_rte=1"], 0.3),
}


def start_lines(rounds: int) -> Iterator[str]:
    """Processor time of short commands over that of a process that imports torch, files in the page cache."""
    commands = {"torch": ["-c", "import torch"], **{name: arguments for name, (arguments, _) in START.items()}}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            seconds = process_seconds(commands[name])
            times[name] += [seconds] if turn else []  # the first turn fills the page cache
    rows = []
    for name, (_, bound) in START.items():
        ratio = statistics.median(own / torch for own, torch in zip(times[name], times["torch"], strict=True))
        rows.append((name, f"{ratio:.3f}", verdict(ratio, bound)))
    yield from markdown.table([("command", "÷ `import torch`", "bound"), *rows])


def process_seconds(arguments: Sequence[str]) -> float:
    """Processor time of a Python process."""

    def now() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = now()
    subprocess.run([sys.executable, *arguments], env=environment(), cwd=ROOT, capture_output=True, check=False)
    return now() - start


def printed(*arguments: str) -> Iterator[str]:
    """What another measuring program prints, as a code block."""
    done = subprocess.run(command(*arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    yield from markdown.fenced(done.stdout, "text")


# --- the page -----------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """The sections of a page by kind of machine."""
    return dict(re.findall(r"<!-- (cpu|gpu) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def page(section: str, kind: str, before: str) -> str:
    """The whole page: `section` about machines of `kind`, and of `before` the section about the other kind."""
    found = sections(before) | {kind: section}
    marked = (f"<!-- {name} -->\n{found[name]}\n<!-- end -->\n" for name in ("cpu", "gpu") if name in found)
    return "\n".join([INTRODUCTION, *marked])


def renewed(lines: Iterable[str], kind: str, before: str) -> str:
    """The page with new rows of tables in the place of those with the same first cell, in the section about `kind`."""
    section = sections(before).get(kind, "")
    rows = {line.split(" | ")[0]: line for line in lines if line and not line.startswith("| -")}
    for first, line in rows.items():
        section = re.sub(rf"^{re.escape(first)} \|.*$", lambda _, line=line: line, section, flags=re.MULTILINE)
    return page(section, kind, before) if section else before


def heading(found: Mapping[str, Any], images: bool) -> list[str]:
    """Machine, date, versions and command of a section."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device = found["processor"] if found["device"] == "cpu" else found["device"]
    return [
        f"## {device}",
        "",
        f"{datetime.date.today()}, one thread, {found['counted']}, {found['rounds']} rounds; {versions}.",
        f"`python -m tests.programs.benchmark_table --rounds {found['rounds']}{' --images FOLDER' if images else ''}`",
        "",
    ]


def main(argv: Sequence[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.benchmark_table", description=__doc__)
    others = ["exchange", "start", "losses", "data", "stores"]
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs, for loaders and stores")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *others], metavar="NAME", default=[*CASES, *others])
    args = parser.parse_args(argv)

    measured: dict[str, Any] = {}
    lines: list[str] = []
    for name in CASES:
        if name in args.only:
            measured[name] = bench(CASES[name], args.rounds)
            print(" | ".join(step_row(name, measured[name])), flush=True)
    lines += [*step_lines(measured)] if measured else []
    print("\n".join(lines), flush=True)
    parts = {
        "exchange": exchange_lines(),
        "start": start_lines(args.rounds),
        "losses": printed("tests.programs.loss_times"),
        "data": printed("tests.programs.data_times", str(args.images)) if args.images else iter(()),
        "stores": printed("tests.programs.store_times", str(args.images)) if args.images else iter(()),
    }
    for name in parts:
        if name in args.only:
            found = [*parts[name]]
            print("\n".join(found), flush=True)
            lines += ["", *found] if found else []
    before = FILE.read_text(encoding="utf-8") if FILE.is_file() else ""
    if set(args.only) == {*CASES, *others}:
        write_text(FILE, page("\n".join([*heading(measured["nkd_vit"], bool(args.images)), *lines]), "cpu", before))
    elif measured:
        write_text(FILE, renewed(step_lines(measured), "cpu", before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
