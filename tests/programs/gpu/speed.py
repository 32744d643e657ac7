"""How fast a GPU trains: recipes at their real size against the bare networks and a plain loop; loaders; generators."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_hf.bench.clock import Mark, Slot, Stopwatch, ignore, ratio, take_turns, totals
from kd_hf.bench.photos import Photos
from kd_hf.bench.work import BarePair, TrainerStep
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.cost import step_cost
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.tasks import open_task
from kd_hf.train.feed import Lesson
from kd_hf.train.optim import build_optimizer
from kd_hf.train.smoke import num_classes, smoke_recipe
from tests.programs.gpu.checks import scratch, using
from tests.programs.gpu.schedule import Bench, Check
from tests.runs import ROOT

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s by the makers' sheets
ROUNDS, REPEATS = 4, 6


@dataclass(frozen=True)
class Case:
    """A recipe at the images a step that one GPU is given, and what its step may take of the bare pair's time."""

    recipe: str
    batch: int
    overrides: Sequence[str] = ()
    bound: float | None = None  # where nothing is said, the share of the FLOPs


CASES: Mapping[str, Case] = {
    "nkd": Case("nkd_resnet34_resnet18", 256, bound=1.02),
    "vitkd_nkd": Case("vitkd_nkd_deit3_small_deit_tiny", 256),
    "scalekd": Case("scalekd_swin_res50", 64, ("teacher.mode=eval",)),
    "mgd": Case("mgd_resnet34_resnet18", 256),
    "vkd": Case("vkd_regnety_160_conv_stem_deit_tiny", 256, ("train.fp16=false",)),
    "cls_kd": Case("cls_kd_deit_base_deit_tiny", 126),  # images are repeated three times and mixed in pairs
    "detection": Case("vkd_vidt_nano", 2),
}
TINY = Case("quickstart_vit", 8)


def speed(bench: Bench) -> list[dict[str, Check]]:
    """The measurements, in groups that do not disturb each other: eager steps, compiled ones, loaders."""
    cases = {"tiny": TINY} if bench.tiny else CASES
    eager = {f"speed/eager/{name}": Check(step_speed, 200, (name, case, False)) for name, case in cases.items()}
    compiled = {
        f"speed/compiled/{name}": Check(step_speed, 280, (name, case, True))
        for name, case in cases.items()
        if name != "detection" and bench.device == "cuda"  # images of many sizes would be compiled many times
    }
    loaders = {"loader/crop": Check(loader, 60, ("crop", "nkd_resnet34_resnet18"))}
    if not bench.tiny:
        eager["generator"] = Check(generator, 120)
        loaders["loader/randaugment"] = Check(loader, 60, ("randaugment", "vitkd_nkd_deit3_small_deit_tiny"))
    return [eager, compiled, loaders]


@contextmanager
def alone(bench: Bench) -> Iterator[None]:
    """Wait until nobody uses the device, and keep it."""
    with bench.lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --------------------------------------------------------------------------------------------------- steps


def fitted(case: Case, bench: Bench, folder: Path, *overrides: str) -> Recipe:
    """The recipe with random weights at the case's batch, in bfloat16 where the device has that."""
    half = [] if bench.device == "cpu" else ["train.bf16=true"]
    whole = load_recipe(ROOT / "recipes" / f"{case.recipe}.yaml", [*half, *case.overrides, *overrides])
    small = smoke_recipe(whole, folder)
    train = {
        "per_device_train_batch_size": case.batch,
        "max_steps": whole.train.max_steps,
        "torch_compile": whole.train.torch_compile,
        "sync_batchnorm": False,
        "use_cpu": bench.device == "cpu",
        "logging_steps": 10**6,
    }
    recipe = small.model_copy(update={"train": small.train.model_copy(update=train)})
    if whole.data.boxes is not None:  # the sizes that it trains at
        recipe = recipe.model_copy(update={"data": whole.data})
    heads = {
        name: cfg.model_copy(update={"num_classes": cfg.num_classes or num_classes(small)})
        for name, cfg in recipe.all_teachers().items()
    }
    return recipe.model_copy(update={"teacher": heads["teacher"]} if recipe.teacher else {"teachers": heads})


def step_speed(bench: Bench, name: str, case: Case, compiled: bool) -> None:
    """Step ÷ bare pair, both eager or both compiled; images a second, share of the peak, memory; a plain loop."""
    check = f"speed/{'compiled' if compiled else 'eager'}/{name}"
    recipe = fitted(case, bench, scratch(bench, check), f"train.torch_compile={str(compiled).lower()}")
    classes = num_classes(recipe)
    detection = recipe.data.boxes is not None
    source = open_task(recipe).noise(4 * case.batch, 1000, classes) if detection else Photos(case.batch, classes)
    device = torch.device(bench.device)
    with using(bench):
        step = TrainerStep(recipe, source)
        works: dict[str, Callable[[Mark], None]] = {"step": step.whole, "parts": step.in_parts}
        if detection:
            step.whole(ignore)
        else:
            images, target = step.feed.stage(step.batch)
            shown = {key: images[key] for key in ("student", *step.teachers)}
            works["bare"] = BarePair(recipe, shown, target.hard, classes, step.trainer.accelerator)
        for work in works.values():
            for _ in range(3):
                work(ignore)
        step_memory = _peak_memory(device, step.whole)
        lesson = next(step.one_queue)
        plain = PlainLoop(recipe, classes, lesson, step.trainer.weights(step.position), device)
        works["plain"] = plain
        plain(ignore)
        plain_memory = _peak_memory(device, plain)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    with alone(bench):
        watch, repeats = Stopwatch(device), 1 if bench.tiny else REPEATS
        slots = {key: Slot(work, watch, repeats) for key, work in works.items()}
        rounds = take_turns(slots, 2 if bench.tiny else ROUNDS)
        trace = _trace(step.whole) if device.type == "cuda" and not compiled else None
    overlap = _overlap(bench, check, trace) if trace is not None else None
    times = {key: totals(turns) for key, turns in rounds.items()}
    seconds = {key: statistics.median(values) for key, values in times.items()}
    values: dict[str, Any] = {
        "batch": case.batch,
        "images_per_second": round(case.batch / seconds["step"], 1),
        "step_ms": round(1e3 * seconds["step"], 2),
        "plain_over_step": round(ratio(times["plain"], times["step"])["median"], 3),
        "gigabytes": round(step_memory / 1e9, 2),
        "plain_gigabytes": round(plain_memory / 1e9, 2),
        **({"overlap": round(overlap, 3)} if overlap is not None else {}),
    }
    status = "ok"
    if "bare" in times:
        # the optimiser is no part of the bare pair
        without = [whole - parts["optimiser"] for whole, parts in zip(times["step"], rounds["parts"], strict=True)]
        found = ratio(without, times["bare"])
        flops, total = _flops(recipe, classes, step)
        bound = case.bound or flops
        values |= {"step_over_bare": [round(found[key], 3) for key in ("median", "low", "high")]}
        values |= {"with_optimiser": round(ratio(times["step"], times["bare"])["median"], 3)}
        values |= {"by_flops": round(flops, 3), "bound": round(bound, 3)}
        peak = _peak_rate(device)
        values |= {"share_of_peak": round(total / seconds["step"] / peak, 4)} if peak else {}
        status = (
            "ok" if found["median"] <= bound or bench.device == "cpu" else f"OVER {found['median']:.3f} > {bound:.3f}"
        )
    bench.report(check, status, **values)


def _peak_rate(device: torch.device) -> float | None:
    """FLOP/s in bfloat16 by the maker's sheet."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((rate for name, rate in PEAKS.items() if name in card), None)


def _flops(recipe: Recipe, classes: int, step: TrainerStep) -> tuple[float, float]:
    """The FLOPs of a step over those of the bare pair, and the FLOPs of a step."""
    cost = step_cost(assemble(recipe, classes, device="meta"))
    batch = recipe.train.per_device_train_batch_size
    bare = 3 * cost.flops["student"] + sum(cost.flops[name] for name in step.teachers)
    methods = 3 * sum(cost.method_flops[name] for name in step.active)
    return (bare + methods) / bare, batch * (bare + methods)


def _peak_memory(device: torch.device, work: Callable[[Mark], None]) -> int:
    """Most bytes that tensors took during one call, everything that lies there included."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work(ignore)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _trace(work: Callable[[Mark], None]) -> Any:
    """What the device does in three calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            work(ignore)
        torch.cuda.synchronize()
    return profile


def _overlap(bench: Bench, check: str, profile: Any) -> float:
    """Share of the device's busy time in which kernels of two streams run; one trace stays in ``DIR``."""
    file = bench.out / ".scratch" / f"trace-{check.replace('/', '-')}.json"
    profile.export_chrome_trace(str(file))
    kernels = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("cat") == "kernel"]
    if check.endswith("/nkd"):
        with gzip.open(bench.out / f"{file.name}.gz", "wt") as packed:
            json.dump(kernels, packed)
    file.unlink()
    borders = sorted((t, d, e["args"]["stream"]) for e in kernels for t, d in ((e["ts"], 1), (e["ts"] + e["dur"], -1)))
    running: dict[int, int] = {}
    busy = both = 0.0
    last = 0.0
    for moment, change, stream in borders:
        streams = sum(count > 0 for count in running.values())
        busy += (moment - last) * (streams >= 1)
        both += (moment - last) * (streams >= 2)
        running[stream] = running.get(stream, 0) + change
        last = moment
    return both / max(busy, 1e-9)


class PlainLoop:
    """A step as research code takes it: float16 autocast with a scaler, attention not fused, teacher then student in
    one stream, nothing compiled, every number fetched at every step.

    Args:
        recipe: of the run.
        classes: K.
        lesson: images, labels and draws, which stay the same.
        weights: factor of every loss.
        device: where it runs.
    """

    def __init__(
        self, recipe: Recipe, classes: int, lesson: Lesson, weights: Mapping[str, float], device: torch.device
    ) -> None:
        from timm.layers import set_fused_attn

        set_fused_attn(False)
        train = recipe.train.model_copy(update={"bf16": False, "torch_compile": False, "channels_last": False})
        self.recipe = recipe.model_copy(update={"train": train})
        parts = assemble(self.recipe, classes)
        self.module = parts.module.to(device).train()
        self.teachers: dict[str, nn.Module] = {
            name: tapped.to(device).eval().requires_grad_(False) for name, tapped in parts.tapped_teachers.items()
        }
        set_fused_attn(True)
        self.lesson, self.weights, self.device = lesson, weights, device
        self.optimizer = build_optimizer(self.module, train)
        for group in self.optimizer.param_groups:
            group.update({key: False for key in ("foreach", "fused") if key in group})
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def __call__(self, mark: Mark) -> None:
        """One step."""
        lesson, half = self.lesson, torch.float16 if self.device.type == "cuda" else torch.bfloat16
        with torch.autocast(self.device.type, half, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                pixels = lesson.pixels
                outputs = {name: teacher(pixels) for name, teacher in self.teachers.items() if name in lesson.teachers}
            losses = self.module(pixels, outputs, lesson.target, lesson.draws, lesson.active)
            total = torch.stack([self.weights[name.partition("/")[0]] * value for name, value in losses.items()]).sum()
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.recipe.train.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.train.max_grad_norm, foreach=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for value in losses.values():
            value.item()
        mark("plain")


# ------------------------------------------------------------------------------------------ pieces, loaders


def generator(bench: Bench) -> None:
    """ViTKD's generator, which computes what enters the loss, against dense convolutions; bfloat16, batch 256."""
    from kd_hf.info import Shapes
    from kd_hf.methods.vitkd import HIGH, ViTKD
    from kd_hf.outputs import Outputs, Target
    from tests.methods.straightforward import vitkd as dense

    device, batch, tokens, narrow, wide = torch.device(bench.device), 2 if bench.tiny else 256, 196, 192, 384
    taps = ("low:0", "low:1", HIGH)
    narrow_shapes, wide_shapes = (Shapes(10, dict.fromkeys(taps, (tokens, width))) for width in (narrow, wide))
    method = ViTKD(ViTKD.Config(), narrow_shapes, wide_shapes, {}).to(device)
    student, teacher = (
        {role: torch.randn(batch, tokens, width, device=device, requires_grad=width == narrow) for role in taps}
        for width in (narrow, wide)
    )
    noise = torch.rand(batch, tokens, device=device)
    target, logits = Target(torch.zeros(batch, dtype=torch.long, device=device)), torch.zeros(batch, 10, device=device)
    first, first_bias, second, second_bias = method.generation.parameters()

    def convolutions(maps: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(torch.nn.functional.conv2d(maps, first, first_bias, padding=1))
        return torch.nn.functional.conv2d(hidden, second, second_bias, padding=1)

    def backward(total: torch.Tensor) -> None:
        total.backward()
        method.zero_grad()

    def ours(mark: Mark) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = method(Outputs(logits, None, student), Outputs(logits, None, teacher), target, {"noise": noise})
        backward(torch.stack(list(losses.values())).sum())
        mark("ours")

    def straightforward(mark: Mark) -> None:
        low = ["low:0", "low:1"]
        with torch.autocast(device.type, torch.bfloat16):
            total = dense(
                [student[r] for r in low],
                [teacher[r] for r in low],
                student[HIGH],
                teacher[HIGH],
                list(method.align_low),
                method.align_high,
                method.mask_token,
                convolutions,
                noise,
            )
        backward(total if isinstance(total, torch.Tensor) else sum(total.values()))
        mark("dense")

    works: dict[str, Callable[[Mark], None]] = {"ours": ours, "dense": straightforward}
    with using(bench):
        for work in works.values():
            work(ignore)
    with alone(bench):
        watch = Stopwatch(device)
        times = take_turns({key: Slot(work, watch, REPEATS) for key, work in works.items()}, ROUNDS)
    found = ratio(totals(times["ours"]), totals(times["dense"]))
    bench.report("generator", "ok", ours_over_dense=[round(found[key], 3) for key in ("median", "low", "high")])


def loader(bench: Bench, name: str, recipe_name: str) -> None:
    """Images a second that this machine's cores read, decode and augment, as the trainer does it."""
    cores = os.cpu_count() or 1
    case = Case(recipe_name, 16 if bench.tiny else 256, (f"train.dataloader_num_workers={cores}",))
    recipe = fitted(case, bench, scratch(bench, f"loader-{name}"))
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"dataloader_num_workers": cores, "max_steps": 10**6})}
    )
    source = Photos(4096, num_classes(recipe))
    from kd_hf.train.trainer import DistillTrainer

    with using(bench):
        batches = DistillTrainer(recipe, train_dataset=source, eval_dataset=source).feed().batches
        count, iterator = (2, iter(batches)) if bench.tiny else (24, iter(batches))
    with alone(bench):
        for _ in range(cores if not bench.tiny else 1):  # what the workers had prepared
            next(iterator)
        start = time.perf_counter()
        for _ in range(count):
            next(iterator)
        rate = count * case.batch / (time.perf_counter() - start)
    bench.report(f"loader/{name}", "ok", images_per_second=round(rate), cores=cores)
