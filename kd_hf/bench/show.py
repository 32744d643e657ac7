"""A bench as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_hf.errors import UserError, nearest

PARTS = {
    "hand-over": "normalise, erase, mix, draw",
    "teacher": "forward",
    "student": "forward",
    "losses": "forward, task and methods",
    "backward": "student and methods",
    "optimiser": "clipping, step, moving average",
}
FLOPS = ("student", "teacher", "methods")


def describe(found: Mapping[str, Any]) -> str:
    """A bench as text for a person."""
    lines = [*_setting(found), "", *_table(_rows(found)), "", *_ratios(found), *_sizes(found)]
    return "\n".join(lines)


def _setting(found: Mapping[str, Any]) -> list[str]:
    teachers = ", ".join(found["teachers"].values()) or "no teacher"
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    where = found["processor"] if found["device"] == "cpu" else found["device"]
    precision = "float32" if found["precision"] == "no" else found["precision"]
    return [
        f"networks  {teachers} → {found['student']}, random weights",
        f"losses    {', '.join(found['losses'])}, as at step {found['at_step']:,}",
        f"machine   {where}, {found['processes']} process(es), {threads}, torch {found['versions']['torch']}",
        f"batch     {found['batch']} images a process, {precision}",
        f"data      {found['images']}",
        f"times     {found['counted']}, medians of {found['rounds']} rounds",
    ]


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    step, bare = found["step_seconds"], found["bare"]
    rows: list[tuple[str, ...]] = [("part", "", "ms", "% of step", "bare, ms")]
    for part, meaning in PARTS.items():
        if part in found["parts"]:
            seconds = found["parts"][part]
            beside = _ms(bare[part]) if part in bare else ""
            rows.append((part, meaning, _ms(seconds), f"{100 * seconds / step:.1f}", beside))
    rows.append(("step", "as the trainer runs it", _ms(step), "", _ms(found["bare_seconds"])))
    rows.append(("data", "read, decode, augment; beside the step", _ms(found["data_seconds"]), "", ""))
    if found["exchange"]["seconds_alone"] is not None:
        rows.append(("exchange", "of gradients, alone", _ms(found["exchange"]["seconds_alone"]), "", ""))
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    from kd_hf.text.terminal import table

    return table(rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio with its quartiles."""
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}–{ratio['high']:.3f}]"


def _ratios(found: Mapping[str, Any]) -> list[str]:
    meanings = {
        "tax": "step without optimiser ÷ bare pair",
        "tax_with_optimiser": "step ÷ bare pair",
        "over_plain": "step ÷ step of plain training",
        "bf16_teacher": "teacher in bfloat16 ÷ in float32",
    }
    return [f"{text:36} {spread(found[key])}" for key, text in meanings.items() if key in found]


def _sizes(found: Mapping[str, Any]) -> list[str]:
    flops, exchange, memory = found["flops"], found["exchange"], found["memory"]
    total, share = sum(flops[part] for part in FLOPS), flops["share_of_matrix_product"]
    gradients = sum(exchange["gradient_bytes"].values())
    lines = [
        f"images    {found['images_per_second']:.1f} a second",
        f"FLOPs     {total / 1e9:.1f} G a step ({', '.join(_shares(flops))}), {flops['tax']:.3f} of the bare pair's",
        f"speed     {flops['per_second'] / 1e9:.1f} GFLOP/s, {share:.0%} of what a large matrix product reaches here",
        f"gradients {gradients / 1e6:.1f} MB, {_sent(exchange)}",
    ]
    if memory is not None:
        peak, kept, extra = (value / 1e9 for value in (memory["step"], memory["optimiser"], extra_bytes(memory)))
        lines.append(f"memory    {peak:.2f} GB at most; {kept:.2f} for the optimiser, {extra:.2f} over the bare pair")
    return lines


def extra_bytes(memory: Mapping[str, int]) -> int:
    """What the step needs beyond the bare pair and what the optimiser keeps."""
    return memory["step"] - memory["optimiser"] - memory["bare"]


def _shares(flops: Mapping[str, float]) -> list[str]:
    return [f"{part} {flops[part] / 1e9:.1f}" for part in FLOPS if flops[part]]


def _sent(exchange: Mapping[str, Any]) -> str:
    sent = exchange["sent_bytes"]
    if sent is None:
        return "sent in shards"
    return f"{sent / 1e6:.1f} MB sent a step ({exchange['sent_over_gradients']:.3f} of them)" if sent else "none sent"


def check_picture(path: Path) -> None:
    """Raise :class:`UserError` when the name ends in no format that matplotlib knows."""
    from matplotlib.backend_bases import FigureCanvasBase

    ending, kinds = path.suffix.lstrip(".").lower(), FigureCanvasBase.get_supported_filetypes()
    if ending not in kinds:
        raise UserError(f"--plot: '{path}' does not end as a picture does.{nearest(ending, kinds)}")


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Plot the parts of the step beside those of the bare pair, as stacked bars.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    from kd_hf.files import writing

    figure = Figure(figsize=(8, 3), layout="constrained")
    axis = figure.subplots()
    bars = {"bare pair": found["bare"], "step": found["parts"]}
    ends = dict.fromkeys(bars, 0.0)
    for part in PARTS:
        widths = [1e3 * parts.get(part, 0.0) for parts in bars.values()]
        axis.barh(list(bars), widths, left=list(ends.values()), label=part)
        ends = {name: end + width for (name, end), width in zip(ends.items(), widths, strict=True)}
    teachers = ", ".join(found["teachers"].values()) or "no teacher"
    axis.set(xlabel="ms")
    figure.suptitle(f"{teachers} → {found['student']}\n{', '.join(found['losses'])}", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, dpi=150)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
