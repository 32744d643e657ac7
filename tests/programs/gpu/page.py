"""What the checks found as a section of ``recipes/benchmarks.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kd_hf.text import markdown

Row = Mapping[str, Any]
HEAD = ("step", "batch", "images/s", "ms", "÷ bare pair", "bound", "plain loop ÷ it", "GB", "plain GB", "overlap")
KINDS = {
    "golden": "numbers of official code in float64, folders",
    "modes": "two steps of a method in a precision or with an option",
    "bits": "repeated, continued and killed runs, equal to the bit under full_determinism",
    "sync": "ten steps without waiting for the device, methods",
    "machines": "NCCL and FSDP2 with one rank, a sharded teacher, checkpoints from GPU to CPU and back",
}


def section(rows: Sequence[Row]) -> str:
    """The section: machine, steps, pieces, what was right and what was not."""
    setting = next(row for row in rows if row["check"] == "setting")
    lines = [
        f"## {setting['device']}",
        "",
        f"{setting['date']}; {setting['versions']}.",
        "`python -m tests.programs.gpu`",
    ]
    lines += ["", *markdown.table([HEAD, *steps(rows)]), "", *pieces(rows), "", *counts(rows)]
    notes = [row["text"] for row in rows if row["check"].startswith("note")]
    return "\n".join([*lines, *(line for note in notes for line in ("", note))])


def steps(rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    """Of each recipe its time, against the bare networks and against a plain loop."""
    for row in rows:
        kind, _, name = row["check"].partition("/")
        if kind != "speed" or "step_ms" not in row:
            continue
        ratio = row.get("step_over_bare")
        over = "**over**" if row["status"] != "ok" else "ok"
        yield (
            f"{name.partition('/')[2]}, {name.partition('/')[0]}",
            str(row["batch"]),
            f"{row['images_per_second']:.0f}",
            f"{row['step_ms']:.1f}",
            f"{ratio[0]:.3f} [{ratio[1]:.3f}–{ratio[2]:.3f}]" if ratio else "",
            f"≤ {row['bound']:.3f} {over}" if ratio else "",
            f"{row['plain_over_step']:.2f}",
            f"{row['gigabytes']:.1f}",
            f"{row['plain_gigabytes']:.1f}",
            f"{100 * row['overlap']:.0f} %" if "overlap" in row else "",
        )


def pieces(rows: Iterable[Row]) -> Iterator[str]:
    """Loaders and the generator."""
    for row in rows:
        if row["check"].startswith("loader/") and "images_per_second" in row:
            kind = row["check"].partition("/")[2]
            yield f"Loader ({kind}): {row['images_per_second']} images/s on {row['cores']} cores."
        if row["check"] == "generator":
            low, high = row["ours_over_dense"][1:]
            yield f"ViTKD's losses ÷ dense convolutions: {row['ours_over_dense'][0]:.3f} [{low:.3f}–{high:.3f}]."


def counts(rows: Iterable[Row]) -> Iterator[str]:
    """How many checks of each kind were right, and each that was not."""
    kinds = {kind: [row for row in rows if row["check"].partition("/")[0] == kind] for kind in KINDS}
    for kind, found in kinds.items():
        right = Counter(row["status"] == "ok" for row in found)[True]
        if found:
            yield f"- {KINDS[kind]}: {right} of {len(found)}"
        for row in found:
            if row["status"] != "ok":
                yield f"  - {row['check']}: {markdown.plain(row['status'])}"
