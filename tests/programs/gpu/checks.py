"""What must be right on a GPU: numbers, bits, precisions, options, streams, processes."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_hf.errors import UserError
from kd_hf.methods import method_names
from kd_hf.run.checkpoint import list_checkpoints
from kd_hf.run.log import read_log
from kd_hf.train.trainer import DistillTrainer
from tests.programs.gpu.schedule import Bench, Check
from tests.programs.two_rank_methods import PAIRS as METHOD_PAIRS
from tests.programs.two_rank_options import PAIRS, TRAINING, write_photos
from tests.runs import final_tensors, merged, recipe, recipe_file

if TYPE_CHECKING:
    from torch import Tensor

GOLDENS = Path(__file__).parents[2] / "goldens"
STEPS = 10
FIRST_SCALE = 2.0**16  # of torch's GradScaler


def correctness(bench: Bench) -> dict[str, Check]:
    """The checks, the most valuable first."""
    names = method_names()
    taps = [name for name in names if name not in LOGITS]
    on_gpu = bench.device == "cuda"
    checks = {
        "bits/resume": Check(resume_bits, 120),
        "bits/kill": Check(kill_bits, 150),
        "bits/methods": Check(repeat_bits, 180),
        **({f"sync/{name}": Check(no_sync, 60, (name,)) for name in ("task", *taps)} if on_gpu else {}),
        **{f"golden/{folder.name}": Check(golden, 120, (folder,)) for folder in golden_folders()},
        **{f"modes/{name}": Check(modes, 200, (name,)) for name in names},
        "machines/nccl": Check(one_rank, 90),
        "machines/fsdp": Check(one_rank_fsdp, 120),
        "machines/sharded_teacher": Check(sharded_teacher, 90),
        "machines/portable": Check(portable, 120),
    }
    return {name: checks[name] for name in TINY} if bench.tiny else checks


TINY = ("bits/methods", "golden/kd", "modes/kd", "machines/portable")
LOGITS = ("deit_hard", "deit_soft", "dkd", "kd", "nkd", "task", "uskd", "wsld")


def golden_folders() -> list[Path]:
    """Folders of recorded numbers."""
    return sorted({file.parent for file in GOLDENS.glob("*/*.safetensors")})


@contextmanager
def using(bench: Bench) -> Iterator[None]:
    """Use the device, but not while somebody times."""
    with bench.lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def place(bench: Bench) -> dict[str, Any]:
    """The block that says where a run computes."""
    return {"train": {"use_cpu": bench.device == "cpu"}}


def photos(folder: Path) -> Path:
    """Class folders of small photographs."""
    if not (folder / "data").is_dir():
        write_photos(folder / "data")
    return folder / "data"


def scratch(bench: Bench, name: str) -> Path:
    """An empty folder of a check."""
    folder = bench.out / ".scratch" / name.replace("/", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ------------------------------------------------------------------------------------------------- numbers


def golden(bench: Bench, folder: Path) -> None:
    """Recorded numbers of the official code, in float64 on the device."""
    from tests.goldens.check import LIMIT, check_file

    # ViDT's positions are float32, whose sines differ by a rounding from those of a CPU
    worst, limit = 0.0, 1e-7 if folder.name == "vidt" else LIMIT
    with using(bench), torch.device(bench.device):
        for file in sorted(folder.glob("*.safetensors"))[: 1 if bench.tiny else None]:
            row = check_file(file)
            if row.error is None or row.error > limit:
                raise AssertionError(f"{file.stem}: {row.status} {row.error}")
            worst = max(worst, row.error or 0.0)
    bench.report(f"golden/{folder.name}", "ok", worst=worst)


MODES: Mapping[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "channels_last": {"channels_last": True},
    "checkpointing": {"activation_checkpointing": True},
    "compile": {"torch_compile": True},
    "bf16_compile": {"bf16": True, "torch_compile": True},
}


def method_recipe(bench: Bench, name: str, folder: Path, *blocks: dict[str, Any]) -> Any:
    """Two steps of the task's loss and a method on its tiny pair."""
    student, teacher = METHOD_PAIRS[name]
    fixed = {"num_classes": 10, "pretrained": False}
    whole = {
        "student": merged(student, fixed),
        "teacher": merged(teacher, fixed, {"gate": {"enabled": False}}),
        "methods": {"task": {"weight": 1.0}, name: {}},
        "train": {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True},
    }
    return recipe(folder, whole, place(bench), *blocks)


def modes(bench: Bench, name: str) -> None:
    """Two steps of a method in every precision and with every option: finite, and near float32."""
    losses: dict[str, list[float]] = {}
    for mode, options in MODES.items():
        if (bench.device == "cpu" and options.get("fp16")) or (bench.tiny and "compile" in mode):
            continue
        folder = scratch(bench, f"modes-{name}-{mode}")
        with using(bench):
            torch.compiler.reset()
            try:
                trainer = DistillTrainer(method_recipe(bench, name, folder, {"train": options}))
                trainer.train()
            except UserError as error:
                if mode != "checkpointing":  # a network that has none says so
                    raise
                bench.report(f"modes/{name}/{mode}", "ok", refused=str(error)[:120])
                continue
        losses[mode] = [line["loss"] for line in read_log(folder) if "loss" in line]
        bound = 0.05 if "16" in mode else 5e-3
        scaler = trainer.accelerator.scaler
        skipped = scaler is not None and scaler.get_scale() < FIRST_SCALE  # a step that overflowed was not taken
        pairs = list(zip(losses[mode], losses["fp32"], strict=True))[: 1 if skipped else 2]
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        right = len(losses[mode]) == 2 and all(map(math.isfinite, losses[mode])) and off <= bound
        values = {"off": off, "losses": losses[mode], **({"skipped": True} if skipped else {})}
        bench.report(f"modes/{name}/{mode}", "ok" if right else "FAILED", **values)


# ---------------------------------------------------------------------------------------------------- bits


def deterministic(bench: Bench, pair: str, data: Path, **train: Any) -> tuple[dict[str, Any], ...]:
    """A run with everything that draws random numbers and everything that has state."""
    options = {"full_determinism": True, "dataloader_num_workers": 2, "bf16": bench.device == "cuda", **train}
    return TRAINING, PAIRS[pair], {"data": {"path": str(data)}}, place(bench), {"train": options}


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Keys whose tensors are not equal to the bit."""
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())[:3]
    return [key for key in left if not left[key].equal(right[key])]


def resume_bits(bench: Bench) -> None:
    """A continued run equals an uninterrupted one to the bit under full_determinism; and how far it is off without."""
    for pair in ("maps", "tokens"):
        for strict in (True, False):
            folder = scratch(bench, f"resume-{pair}-{strict}")
            data = photos(folder)
            blocks = deterministic(bench, pair, data, full_determinism=strict)
            with using(bench):
                if not strict:
                    torch.use_deterministic_algorithms(False)
                DistillTrainer(recipe(folder / "whole", *blocks)).train()
                first = list_checkpoints(folder / "whole" / "checkpoints")[0]
                shutil.copytree(first, folder / "again" / "checkpoints" / first.name)
                DistillTrainer(recipe(folder / "again", *blocks)).train()
            whole, again = final_tensors(folder / "whole"), final_tensors(folder / "again")
            off = differing(again, whole)
            far = max(((again[key].double() - whole[key].double()).abs().max().item() for key in off), default=0.0)
            status = "ok" if not off or not strict else f"FAILED {len(off)} tensors differ, {off[0]}"
            name = f"bits/resume/{pair}/{'deterministic' if strict else 'free'}"
            bench.report(name, status, tensors=len(whole), different=len(off), largest=far)


def kill_bits(bench: Bench) -> None:
    """A run that is killed and continued in new processes equals one that was not, to the bit."""
    from tests.forked import Fork

    folder = scratch(bench, "kill")
    blocks = deterministic(bench, "maps", photos(folder), max_steps=30, save_steps=3)
    files = {name: recipe_file(folder / f"{name}.yaml", folder / name, *blocks) for name in ("whole", "killed")}
    with using(bench):
        whole = Fork("kd_hf.train", str(files["whole"])).end()
        assert whole.returncode == 0, whole.stderr[-400:]
        kills = 0
        for target in (5, 14):
            fork = Fork("kd_hf.train", str(files["killed"]))
            while fork.process.is_alive() and _steps(folder / "killed") < target:
                time.sleep(0.02)
            if fork.process.is_alive():
                os.kill(fork.process.pid, signal.SIGKILL)
                kills += 1
            fork.end()
        last = Fork("kd_hf.train", str(files["killed"])).end()
        assert last.returncode == 0, last.stderr[-400:]
    assert kills == 2, "the runs were over before they could be killed"
    off = differing(final_tensors(folder / "killed"), final_tensors(folder / "whole"))
    bench.report("bits/kill", f"FAILED {off[:3]}" if off else "ok", kills=kills)


def _steps(folder: Path) -> int:
    return max((line.get("step", 0) for line in read_log(folder)), default=0) if folder.is_dir() else 0


def repeat_bits(bench: Bench) -> None:
    """Every method's run twice under full_determinism: equal to the bit, or refused with the operation's name."""
    for name in method_names()[: 1 if bench.tiny else None]:
        runs = []
        try:
            for turn in range(2):
                folder = scratch(bench, f"repeat-{name}-{turn}")
                options = {"full_determinism": True, "bf16": bench.device == "cuda", "max_steps": 4}
                options |= {"save_strategy": "steps", "save_steps": 4}
                with using(bench):
                    DistillTrainer(method_recipe(bench, name, folder, {"train": options})).train()
                runs.append(final_tensors(folder))
        except UserError as error:
            bench.report(f"bits/methods/{name}", f"REFUSED {error}")
            continue
        off = differing(*runs)
        bench.report(f"bits/methods/{name}", f"FAILED {off[:3]}" if off else "ok")


# ------------------------------------------------------------------------------------------------- streams


def no_sync(bench: Bench, name: str) -> None:
    """Ten steps in which nothing waits for the device."""
    folder = scratch(bench, f"sync-{name}")
    options = {"bf16": True, "max_steps": STEPS + 4, "ema": {"decay": 0.9}, "max_grad_norm": 5.0}
    options |= {"logging_steps": 1000}
    with using(bench):
        trainer = DistillTrainer(method_recipe(bench, name, folder, {"train": options}))
        feed = trainer.feed()
        for step in range(STEPS + 3):
            if step == 3:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            trainer.step(feed)
            trainer.state.global_step += 1
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    bench.report(f"sync/{name}", "ok", steps=STEPS)


# ------------------------------------------------------------------------------------------------ machines


@contextmanager
def alone_in_a_group(**variables: str) -> Iterator[None]:
    """The variables that a launcher sets for one process of one."""
    from tests.forked import ranks

    os.environ.update(ranks(1)[0] | variables)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder) if "loss" in line]


def _same_losses(bench: Bench, check: str, **variables: str) -> None:
    """A run in a group of one process against an ordinary run."""
    folder = scratch(bench, check)
    data = photos(folder)
    blocks = (*deterministic(bench, "maps", data, bf16=False, full_determinism=False),)
    with using(bench):
        DistillTrainer(recipe(folder / "plain", *blocks)).train()
        from accelerate import PartialState

        PartialState._reset_state()
        with alone_in_a_group(**variables):
            trainer = DistillTrainer(recipe(folder / "group", *blocks))
            kind = trainer.accelerator.distributed_type.value
            trainer.train()
    pairs = list(zip(_losses(folder / "group"), _losses(folder / "plain"), strict=True))
    off = max(abs(a - b) / abs(b) for a, b in pairs)
    bench.report(check, "ok" if off < 1e-3 else "FAILED", kind=kind, off=off)


def one_rank(bench: Bench) -> None:
    """DDP over NCCL with one rank."""
    _same_losses(bench, "machines/nccl")


def one_rank_fsdp(bench: Bench) -> None:
    """FSDP2 with one rank."""
    variables = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    _same_losses(bench, "machines/fsdp", **variables)


def sharded_teacher(bench: Bench) -> None:
    """A teacher sharded over a mesh of one says what the whole one says."""
    from torch.distributed.device_mesh import init_device_mesh

    from kd_hf.distillation.sharding import shard_network
    from kd_hf.models.load import load_model
    from kd_hf.models.taps import TappedModel

    with using(bench), alone_in_a_group():
        torch.distributed.init_process_group("nccl" if bench.device == "cuda" else "gloo")
        handle = load_model("test_vit", pretrained=False, num_classes=10, image_size=32)
        model = TappedModel(handle, handle.info, ("block:0", "pre_logits")).to(bench.device).eval()
        pixels = torch.randn(2, 3, 32, 32, device=bench.device)
        with torch.no_grad():
            whole = model(pixels).logits
            shard_network(model, handle.info, init_device_mesh(bench.device, (1,)))
            parts = model(pixels).logits
    off = ((whole - parts).abs().max() / whole.abs().max()).item()
    bench.report("machines/sharded_teacher", "ok" if off < 1e-5 else "FAILED", off=off)


def portable(bench: Bench) -> None:
    """A checkpoint of the device is continued on a CPU, and one of a CPU on the device."""
    folder = scratch(bench, "portable")
    data = photos(folder)
    places = {"device": place(bench), "cpu": {"train": {"use_cpu": True}}}
    blocks = deterministic(bench, "tokens", data, bf16=False, full_determinism=False)
    with using(bench):
        for name, where in places.items():
            DistillTrainer(recipe(folder / name, *blocks, where)).train()
        for name, other in (("device", "cpu"), ("cpu", "device")):
            first = list_checkpoints(folder / name / "checkpoints")[0]
            shutil.copytree(first, folder / f"from_{name}" / "checkpoints" / first.name)
            DistillTrainer(recipe(folder / f"from_{name}", *blocks, places[other])).train()
            pairs = list(zip(_losses(folder / f"from_{name}"), _losses(folder / name)[2:], strict=True))
            off = max(abs(a - b) / abs(b) for a, b in pairs)
            bench.report(f"machines/portable/from_{name}", "ok" if off < 5e-3 else "FAILED", off=off)
