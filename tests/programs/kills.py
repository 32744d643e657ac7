"""Interrupt runs as machines do, run the same command again, and compare with the run that nobody disturbed:

``python -m tests.programs.kills N [--seed 0] [--ranks 1 2] [--ways kill event …]``

Each trial interrupts a run one to three times and then lets it end. It has failed unless all tensors of the last
checkpoint, the exported student and every logged number, scores included, are equal to the bit, nothing is left of
what was being written, card and student are there, and no politely ended process showed a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_hf.files import is_passing
from kd_hf.layout import ENDING, LOCK
from kd_hf.run.log import read_log
from tests import runs
from tests.forked import Fork, free_port, ranks

STEPS = 12
# BatchNorm, an average, random numbers of every kind, worker processes, checkpoints that are pruned but for the best
OPTIONS: dict[str, Any] = {
    "student": {"model": "test_resnet", "drop_path": 0.2},
    "teacher": runs.TEACHER | {"model": "test_convnext"},
    "methods": {"mgd": {"weight": 0.01}, "kd": {"weight": 0.5}},
    "data": {"hold": False, "num_labels": 400, "augment": {"erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}},
    "train": {
        "max_steps": STEPS,
        "ema": {"decay": 0.9},
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 3,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_nll",
        "greater_is_better": False,
    },
    "eval": {"max_samples": 40},
}
POLITE = (128 + signal.SIGTERM, -signal.SIGTERM, 0)  # saved and stopped; not yet or no longer training; ended before
_TIMES = ("images_per_second", "train_seconds")


# ------------------------------------------------------------------------------------------- in the interrupted process


def die_at(count: int, folder: str, command: Sequence[str]) -> None:
    """Run ``python -m …`` and end it by SIGKILL before its file-system event number `count` in a folder.

    With `count` 0 it lives, and writes the number of events into ``<folder>.events``.
    """
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        named = any(isinstance(arg, (str, os.PathLike)) and os.fspath(arg).startswith(folder) for arg in args)
        if (event in _EVENTS and named) or (event == "ctypes.dlsym" and args[1:] == ("renameat2",)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = list(command)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        if count == 0:
            Path(f"{folder}.events").write_text(str(seen))


_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}


# --------------------------------------------------------------------------------------------------- processes together


class Run:
    """One command in one or two processes, as a launcher starts them but without one."""

    def __init__(self, recipe: Path, count: int, *before: str) -> None:
        command = ("kd_hf.train", str(recipe))
        world = ranks(count) if count > 1 else [{}]
        first = (*before, *command) if before else command
        self.processes = [Fork(*(command if rank else first), **variables) for rank, variables in enumerate(world)]

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [pid for one in self.processes if (pid := one.process.pid) is not None]

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within a time."""
        deadline = time.monotonic() + seconds
        for one in self.processes:
            one.process.join(max(0.0, deadline - time.monotonic()))
        return not any(one.process.is_alive() for one in self.processes)

    def end(self) -> list[Any]:
        """Wait for all; once one was killed, the others are too, as a launcher does it."""
        while not self.wait(0.05):
            if any(one.process.exitcode not in (None, 0, 128 + signal.SIGTERM) for one in self.processes):
                self.wait(5)
                self.send(signal.SIGKILL)
        return [one.end() for one in self.processes]

    def send(self, number: int, *, only: Sequence[int] | None = None, workers: bool = False) -> None:
        """Signal ranks, all by default, and the processes that work for them."""
        for pid in [self.pids[rank] for rank in (only if only is not None else range(len(self.pids)))]:
            for target in (pid, *(children(pid) if workers else ())):
                try:
                    os.kill(target, number)
                except ProcessLookupError:
                    continue


def children(pid: int) -> list[int]:
    """Processes that another one has started and that live."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


# ------------------------------------------------------------------------------------------------------------ a trial


@dataclass
class Bench:
    """Where trials run, and what they are compared with."""

    folder: Path
    seed: int = 0
    references: dict[int, Path] = field(default_factory=dict)
    """Run folder by number of ranks."""
    seconds: dict[int, float] = field(default_factory=dict)
    events: dict[int, int] = field(default_factory=dict)

    def recipe(self, name: str, count: int, **train: Any) -> Path:
        """A recipe file whose run folder is `name`."""
        block = {"train": {"per_device_train_batch_size": 8 // count, "dataloader_num_workers": 2, **train}}
        return runs.recipe_file(self.folder / f"{name}.yaml", self.folder / name, OPTIONS, block)

    def refer(self, count: int) -> Path:
        """The run that nobody disturbs, on so many ranks."""
        if count not in self.references:
            place = self.folder / f"whole-{count}"
            recipe = self.recipe(place.name, count)
            begun = time.monotonic()
            run = Run(recipe, count, "tests.programs.kills", "--die-at", "0", str(place))
            for done in run.end():
                assert done.returncode == 0, done
            self.seconds[count] = time.monotonic() - begun
            self.events[count] = int(Path(f"{place}.events").read_text())
            self.references[count] = place
        return self.references[count]


def kill(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGKILL to a rank, at a random moment."""
    run = Run(recipe, count)
    run.wait(draw.uniform(0, bench.seconds[count]))
    run.send(signal.SIGKILL, only=[draw.randrange(count)])
    run.end()


def event(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGKILL to the main rank, before a random change of its run folder."""
    number = draw.randint(1, bench.events[count])
    Run(recipe, count, "tests.programs.kills", "--die-at", str(number), str(recipe.with_suffix(""))).end()


def polite(bench: Bench, recipe: Path, count: int, draw: random.Random, **to: Any) -> None:
    """SIGTERM at a random moment; all ranks must have saved, or none."""
    run = Run(recipe, count)
    run.wait(draw.uniform(0, bench.seconds[count]))
    run.send(signal.SIGTERM, **to)
    done = run.end()
    assert all(one.returncode in POLITE for one in done), [(one.returncode, one.stderr) for one in done]
    if count == 1 or -signal.SIGTERM not in [one.returncode for one in done]:
        assert len({one.returncode for one in done}) == 1, [one.returncode for one in done]
        assert not any("Traceback" in one.stderr for one in done), done


def term(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGTERM to the main rank, as `kill` sends it."""
    polite(bench, recipe, count, draw, only=[0])


def group(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGTERM to all ranks and their worker processes, as `timeout`, Slurm and Kubernetes send it."""
    polite(bench, recipe, count, draw, workers=True)


def rank(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGTERM to the last rank only."""
    polite(bench, recipe, count, draw, only=[count - 1])


def launcher(bench: Bench, recipe: Path, count: int, draw: random.Random) -> None:
    """SIGKILL to the launcher: its ranks train on, the same command keeps out; then the main rank is asked to stop."""
    options = ("--nproc_per_node", str(count), "--master_port", str(free_port()))
    started = Fork("torch.distributed.run", *options, "-m", "kd_hf.train", str(recipe), CUDA_VISIBLE_DEVICES="")
    folder, pid = recipe.with_suffix(""), started.process.pid or 0
    while not (folder / LOCK).exists() and started.process.is_alive():
        time.sleep(0.05)
    ranks_there = children(pid)
    os.kill(pid, signal.SIGKILL)
    started.end()
    owner = owner_of(folder)
    if owner is not None:
        (refused,) = Run(recipe, 1).end() if count == 1 else [Run(recipe, count).end()[0]]
        assert refused.returncode == 0 or f"is in use by process {owner} " in refused.stderr, refused
        with_owner = [owner, *(other for other in ranks_there if other != owner)]
        for target in with_owner[:1]:
            os.kill(target, signal.SIGTERM)
    while any(Path(f"/proc/{other}/stat").exists() and state_of(other) != "Z" for other in ranks_there):
        time.sleep(0.05)


def owner_of(folder: Path) -> int | None:
    """The process that has the lock of a run folder, by its own word."""
    try:
        return int(json.loads((folder / LOCK).read_text())["pid"])
    except (FileNotFoundError, ValueError):
        return None


def state_of(pid: int) -> str:
    """The letter that the system gives a process; Z for one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


WAYS: dict[str, Callable[[Bench, Path, int, random.Random], None]] = {
    "kill": kill, "event": event, "term": term, "group": group, "rank": rank, "launcher": launcher,
}  # fmt: skip


def trial(bench: Bench, number: int, way: str, count: int) -> None:
    """Interrupt a run, mostly in one way, let it end, and compare it."""
    draw = random.Random(f"{bench.seed} {number} {way} {count}")
    whole = bench.refer(count)
    recipe = bench.recipe(f"trial-{number}", count)
    WAYS[way](bench, recipe, count, draw)
    for other in draw.sample(["kill", "event", "term", "group"], draw.randrange(3)):
        WAYS[other](bench, recipe, count, draw)
    for done in Run(recipe, count).end():
        assert done.returncode == 0, done
    check(recipe.with_suffix(""), whole)


def check(folder: Path, whole: Path) -> None:
    """Raise AssertionError unless a run is equal to another one."""
    runs.assert_same_tensors(runs.final_tensors(folder), runs.final_tensors(whole))
    left, right = ((place / "student" / "model.safetensors").read_bytes() for place in (folder, whole))
    assert left == right, "the exported student differs"
    assert numbers(folder) == numbers(whole), (numbers(folder), numbers(whole))
    assert names(folder) == names(whole), names(folder) ^ names(whole)


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Everything logged but times, step by step."""
    lines = [line for line in read_log(folder) if "epoch" in line]
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


def names(folder: Path) -> set[str]:
    """The files of a run, and whatever was left of them."""
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert ENDING in left and not any(is_passing(part) for name in left for part in name.split("/")), left
    return left


def main(argv: Sequence[str]) -> int:
    """Run trials, and say which have failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trials", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args(argv)
    pairs = [(way, count) for way in args.ways for count in args.ranks if count > 1 or way not in ("rank", "launcher")]
    passed: Counter[str] = Counter()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seed)
        for number in range(args.trials):
            way, count = pairs[number % len(pairs)]
            name = f"{way}, {count} rank(s)"
            try:
                trial(bench, number, way, count)
                passed[name] += 1
            except AssertionError as error:
                failed.append(f"trial {number} ({name}): {str(error)[:2000]}")
                print(failed[-1], flush=True)
            print(f"{number + 1}/{args.trials} {name}: {len(failed)} failed so far", flush=True)
    for name, count in sorted(passed.items()):
        print(f"{count:4d} equal to the bit: {name}")
    print(f"{sum(passed.values())} of {args.trials} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--die-at"]:
        die_at(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main(sys.argv[1:]))
