"""What was measured, as tables and files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd_hf.eval.benchmarks import EvalSet
    from kd_hf.eval.networks import Result

Columns = Sequence[tuple[str, str, str]]
"""Key of the values, head of the column, format."""
COLUMNS: Columns = (
    ("top1", "top-1 %", ".2f"),
    ("top5", "top-5 %", ".2f"),
    ("nll", "nll", ".4f"),
    ("ece", "ece %", ".2f"),
    ("brier", "brier", ".4f"),
    ("agreement", "agreement %", ".2f"),
    ("kl", "kl", ".4f"),
    ("cka", "cka", ".4f"),
    ("images_per_second", "images/s", ".0f"),
)
_SHOWN_CLASSES = 20  # of each end of a long list by class


def report(
    opened: Mapping[str, EvalSet],
    results: Mapping[str, Mapping[str, Result]],
    args: argparse.Namespace,
    device: str,
    columns: Columns = COLUMNS,
    notes: Sequence[str] = (),
) -> str:
    """Everything that is printed."""
    lines = _lines(_summary(results, columns), args.markdown)
    notes = [*notes, *(f"{path}: {data.protocol}" for path, data in opened.items() if data.protocol)]
    if any("images_per_second" in result.values for found in results.values() for result in found.values()):
        notes.append(f"images/s: the network alone, {device}, batches of {args.batch_size}; indicative")
    lines += ["", *(f"- {note}" if args.markdown else note for note in notes)] if notes else []
    for path, data in opened.items() if args.per_class == "" else ():
        head, *rows = _by_class(data, results[path], args.teacher)
        if len(rows) > 2 * _SHOWN_CLASSES:
            rows = [*rows[:_SHOWN_CLASSES], ["…", *[""] * (len(head) - 1)], *rows[-_SHOWN_CLASSES:]]
        lines += ["", f"{path}, top-1 % by class", "", *_lines([head, *rows], args.markdown)]
    return "\n".join(lines)


def _summary(results: Mapping[str, Mapping[str, Result]], known: Columns) -> list[list[str]]:
    """One row per data set and network; of the known columns, those that nobody has are left out."""
    every = [result.values for found in results.values() for result in found.values()]
    columns = [column for column in known if any(column[0] in values for values in every)]
    rows = [["data", "model", "images", *(head for _, head, _ in columns)]]
    for data, found in results.items():
        for name, result in found.items():
            cells = [f"{result.values[key]:{form}}" if key in result.values else "" for key, _, form in columns]
            rows.append([data, name, str(int(result.values["samples"])), *cells])
    return rows


def _by_class(data: EvalSet, results: Mapping[str, Result], teacher: str | None) -> list[list[str]]:
    """Top-1 in percent by class, the largest gain of the first other network over the reference first."""
    reference = teacher or next(iter(results))
    others = [name for name in results if name != reference]
    shares = {
        name: [100.0 * right / count if count else 0.0 for right, count in result.classes]
        for name, result in results.items()
    }
    counts = [count for _, count in results[reference].classes]
    first = shares[reference]
    gains = [new - old for new, old in zip(shares[others[0]], first, strict=True)] if others else first
    names = [reference, *others]
    rows = [["class", "images", *names, *(["gain"] if others else [])]]
    for index in sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-gains[i], i)):
        cells = [f"{shares[name][index]:.2f}" for name in names]
        gain = [f"{gains[index]:+.2f}"] if others else []
        rows.append([data.source.class_names[index], str(counts[index]), *cells, *gain])
    return rows


def _lines(rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Rows of text as aligned columns, or as a Markdown table."""
    if not markdown:
        from kd_hf.text.terminal import table

        return table(rows)
    from kd_hf.text import markdown as md

    return md.table([[md.plain(cell) for cell in row] for row in rows], left=2)


def write_files(
    opened: Mapping[str, EvalSet], results: Mapping[str, Mapping[str, Result]], args: argparse.Namespace
) -> None:
    """Write the files that the command\'s options name."""
    from kd_hf.files import write_text

    if args.json:
        values = {data: {name: result.values for name, result in found.items()} for data, found in results.items()}
        write_text(args.json, json.dumps(values, indent=1) + "\n")
    if args.per_class:
        import csv
        import io

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for index, (path, data) in enumerate(opened.items()):
            head, *rows = _by_class(data, results[path], args.teacher)
            writer.writerows([["data", *head]] if index == 0 else [])
            writer.writerows([path, *row] for row in rows)
        write_text(Path(args.per_class), text.getvalue())
