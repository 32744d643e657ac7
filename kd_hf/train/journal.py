"""Where a run's numbers go: ``log.jsonl``, the trackers, and the person watching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from kd_hf.distillation.assembly import Assembly
from kd_hf.distillation.cost import network_macs
from kd_hf.files import sync
from kd_hf.process import device_name, versions
from kd_hf.recipe.config import TrainConfig
from kd_hf.recipe.resolved import flat
from kd_hf.run.length import RunLength
from kd_hf.run.log import JsonLines, read_log
from kd_hf.text.terminal import Progress

_PROJECT = "kd_hf"  # in the trackers


class Journal:
    """Silent until :meth:`open`, except for :meth:`say`; writes on the main process only.

    Args:
        accelerator: gives the ranks and holds the trackers.
        cfg: the recipe's `train` block.
    """

    def __init__(self, accelerator: Accelerator, cfg: TrainConfig) -> None:
        self.accelerator, self.cfg = accelerator, cfg
        self.progress = Progress(0, 0, 0, enabled=False)
        self.file: JsonLines | None = None

    def open(self, folder: Path, start: int, tracked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Continue the log of a run folder from step `start`, and start the trackers with a configuration.

        Returns:
            The lines that are kept.
        """
        if self.cfg.report_to:
            name = self.cfg.run_name or folder.name
            options = {"wandb": {"name": name, "dir": str(folder)}, "trackio": {"name": name}}
            wanted = {tracker: options[tracker] for tracker in self.cfg.report_to if tracker in options}
            self.accelerator.init_trackers(_PROJECT, config=flat(tracked), init_kwargs=wanted)
        if not self.accelerator.is_main_process:
            return []
        self.file = JsonLines(folder, keep_until=start)
        return read_log(folder)

    def show_progress(self, total: int, start: int, images_per_step: int) -> None:
        """Start the progress bar."""
        enabled = self.accelerator.is_main_process and not self.cfg.disable_tqdm
        self.progress = Progress(total, start, images_per_step, enabled)

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line to ``log.jsonl``."""
        if self.file is not None:
            self.file.write(entry)

    def sync(self) -> None:
        """Have what was written on the disk before something says that it is there."""
        if self.file is not None:
            sync(self.file.path)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Copy numbers to the trackers."""
        if self.cfg.report_to:
            self.accelerator.log(dict(values), step=step)

    def say(self, *lines: str) -> None:
        """Lines for the person watching."""
        if self.accelerator.is_main_process:
            for line in lines:
                self.progress.say(line)

    def close(self) -> None:
        """End the trackers."""
        if self.cfg.report_to:
            self.accelerator.end_training()


def run_facts(
    parts: Assembly, sources: Mapping[str, Any], accelerator: Accelerator, length: RunLength
) -> dict[str, Any]:
    """What a reader of the log should know about a run before its numbers.

    Args:
        parts: as they were built: neither sharded nor compiled yet.
        sources: the images of each split, `train` and `eval`.
        accelerator: gives the processes; what takes time is found out on the main one only.
        length: of the run.
    """
    stored = {name: teacher.handle for name, teacher in parts.stored.items()}
    networks = {"student": parts.student, **parts.teachers, **stored}
    return {
        "models": {name: handle.note() for name, handle in networks.items()},
        "macs": network_macs(parts) if accelerator.is_main_process else {},
        "data": {split: source.describe() for split, source in sources.items()},
        "data_notes": {split: source.note for split, source in sources.items() if source.note},
        "data_revision": {split: getattr(source, "revision", None) for split, source in sources.items()},
        "processes": accelerator.num_processes,
        "device": device_name(accelerator.device),
        **asdict(length),
        "versions": versions(),
    }


def shown_metrics(metrics: Mapping[str, float], left_out: Sequence[str] = ("samples",)) -> str:
    """Metrics as one line of text."""
    return "  ".join(f"{key} {value:.2f}" for key, value in metrics.items() if not key.endswith(tuple(left_out)))
