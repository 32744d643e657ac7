"""Several machines, sharded networks, compiled training: each against the plain run of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.sharding import check_sharding
from kd_hf.errors import UserError
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import TrainConfig
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.resolved import recipe_hash
from kd_hf.run.checkpoint import load_objects, load_tensors
from kd_hf.run.log import read_log
from kd_hf.train.trainer import DistillTrainer
from tests.forked import Fork, free_port, ranks
from tests.programs.sharded_teachers import NETWORKS, outputs_of
from tests.runs import ROOT, TEACHER, recipe, recipe_file
from tests.test_two_processes import OPTIONS

LOSSES = ("loss", "task/ce", "kd/soft", "mgd/generation")
HALF: dict[str, Any] = {"train": {"per_device_train_batch_size": 4}}
# what FSDP2 must do as DDP does: statistics of BatchNorm, gradients over several batches, bfloat16, recomputation
OTHER: dict[str, Any] = {
    "student": {"model": "test_resnet"},
    "train": {
        "optim": "adamw",
        "learning_rate": 1e-3,
        "bf16": True,
        "activation_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
}
# taps that are views of a larger tensor
TOKENS: dict[str, Any] = {
    "student": {"model": "test_vit", "kwargs": {"depth": 3}},
    "teacher": {"model": "test_vit", "kwargs": {"depth": 4}},
    "methods": {"mgd": None, "vitkd": {}},
}
CONFIGS = ROOT / "accelerate_configs"

Done = subprocess.CompletedProcess[str]


def together(commands: list[list[str]]) -> list[Done]:
    """Run commands side by side to their end, from forks (what a launcher starts has its own interpreter); no GPUs."""
    started = [Fork(*command, CUDA_VISIBLE_DEVICES="") for command in commands]
    try:
        done = [process.end(200) for process in started]
    finally:
        for process in started:
            process.process.kill()
    return [Done(one.args, one.returncode, one.stdout + one.stderr) for one in done]


def two_machines(*args: str) -> list[Done]:
    """``accelerate launch`` on each of two machines, which here share an address, with one process on each."""
    fixed = ["--config_file", str(CONFIGS / "2x8gpu.yaml"), "--num_processes", "2"]
    meet = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    own = [[*meet, "--machine_rank", str(rank)] for rank in range(2)]
    return together([["accelerate.commands.launch", *fixed, *rank, "-m", *args] for rank in own])


def two_machines_by_torchrun(*args: str) -> list[Done]:
    """``torchrun --nnodes 2`` on each of two machines."""
    fixed = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return together([["torch.distributed.run", *fixed, "--node_rank", str(rank), "-m", *args] for rank in range(2)])


def launch(config: Path, *args: str) -> Done:
    """``accelerate launch`` of two processes on this machine."""
    fixed = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", str(free_port())]
    return together([["accelerate.commands.launch", *fixed, *args]])[0]


def train_here(folder: Path, *blocks: dict[str, Any]) -> DistillTrainer:
    """A run of this one process; from a file, because that is where a recipe's identity comes from."""
    trainer = DistillTrainer(load_recipe(recipe_file(folder.with_suffix(".yaml"), folder, *blocks)))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Run folder of one process with 8 images a step; checkpoints after 2, 4 and 6 steps."""
    return train_here(tmp_path_factory.mktemp("alone") / "run", OPTIONS).run.path


def assert_same_training(
    folder: Path, alone: Path, steps: range = range(1, 7), losses: tuple[str, ...] = LOSSES
) -> None:
    """Losses of these steps, and all tensors of the last checkpoint."""
    runs = [{line["step"]: line for line in read_log(run) if "loss" in line} for run in (folder, alone)]
    assert list(runs[0]) == list(steps)
    for step in steps:
        for name in losses:
            assert runs[0][step][name] == pytest.approx(runs[1][step][name], rel=1e-5)
    last = [run / "checkpoints" / "checkpoint-6" for run in (folder, alone)]
    for name in ("module", "ema"):
        torch.testing.assert_close(load_tensors(last[0], name), load_tensors(last[1], name), rtol=1e-5, atol=1e-5)
    optimizers = [load_objects(run, "optimizer") for run in last]
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- machines


def test_two_machines_train_as_one_process(alone, tmp_path):
    path = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", OPTIONS, HALF)
    for done in two_machines("kd_hf.train", str(path)):
        assert done.returncode == 0, done.stdout
    assert_same_training(tmp_path / "run", alone)


def test_machines_that_do_not_share_the_run_folder_are_stopped(alone, tmp_path):
    folders = (tmp_path / "first", tmp_path / "second")
    for folder in folders:
        folder.mkdir()
    shutil.copytree(alone / "checkpoints", folders[0] / "run" / "checkpoints")
    path = recipe_file(tmp_path / "recipe.yaml", Path("run"), OPTIONS, HALF)  # a folder of each machine's own
    world = ranks(2, LOCAL_WORLD_SIZE="1", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    started = [
        Fork("kd_hf.train", str(path), folder=folder, **rank) for folder, rank in zip(folders, world, strict=True)
    ]
    first, second = (process.end() for process in started)
    assert first.returncode != 0 and second.returncode != 0
    said = [line for line in (first.stderr + second.stderr).splitlines() if "kd_hf: error:" in line]
    assert len(said) == 1
    assert "train.output_dir: the processes do not see the same checkpoints" in said[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert config.mixed_precision == "no"  # the recipe's to say


# --------------------------------------------------------------------------------------- what a launcher asks


def test_a_launcher_that_starts_one_process_of_two_is_stopped(tmp_path):
    config = yaml.safe_load((CONFIGS / "2cpu.yaml").read_text()) | {"distributed_type": "MULTI_CPU"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    path = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", OPTIONS)
    done = launch(tmp_path / "config.yaml", "-m", "kd_hf.train", str(path))
    assert done.returncode != 0
    assert "asks for several processes, but it started one. On a CPU use accelerate_configs/2cpu.yaml" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_other_engines_are_refused(tmp_path, monkeypatch, kind):
    found = SimpleNamespace(num_processes=1, distributed_type=kind)
    monkeypatch.setattr("kd_hf.process.Accelerator", lambda **_: found)
    with pytest.raises(UserError, match=f"asks for {kind.value}; kd_hf trains with DDP or FSDP2"):
        build_accelerator(TrainConfig(output_dir=str(tmp_path), use_cpu=True))


def test_fsdp_without_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="asks for FSDP, which needs GPUs"):
        build_accelerator(TrainConfig(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: false"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block", "without class names"),
    ],
)
def test_unproven_kinds_of_fsdp_are_refused(tmp_path, monkeypatch, key, value, expected):
    cfg = TrainConfig(output_dir=str(tmp_path), use_cpu=True)
    proven = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    for name, setting in proven.items():
        monkeypatch.setenv(name, setting)
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
    assert build_accelerator(cfg).is_fsdp2
    monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=expected):
        build_accelerator(cfg)


@pytest.mark.parametrize("option", ["fp16", "torch_compile", "channels_last", "sync_batchnorm"])
def test_options_that_exclude_fsdp_are_named(tmp_path, option):
    wanted = recipe(tmp_path, {"train": {option: True}})
    with pytest.raises(UserError, match=rf"train\.{option} cannot be used with FSDP"):
        check_sharding(wanted, (), SimpleNamespace(is_fsdp2=True))


def test_a_sharded_student_lends_no_parts(tmp_path):
    pair = {"student": {"model": "test_resnet", "num_classes": 10}, "teacher": TEACHER, "methods": {"sdd": {}}}
    parts = assemble(recipe(tmp_path, pair), 10, device="meta")
    check_sharding(parts.recipe, parts.choices, SimpleNamespace(is_fsdp2=False))
    with pytest.raises(UserError, match=r"methods\.sdd runs parts of the student .*cannot be used with FSDP"):
        check_sharding(parts.recipe, parts.choices, SimpleNamespace(is_fsdp2=True))


# -------------------------------------------------------------------------------------------------- sharding


@pytest.fixture(scope="module")
def with_sharded_teacher(tmp_path_factory) -> Path:
    """What two machines under torchrun say of sharded teachers; their run with one in `run`, and `other` without."""
    folder = tmp_path_factory.mktemp("sharded")
    path = recipe_file(folder / "recipe.yaml", folder / "run", OPTIONS, HALF, {"teacher": {"shard": True}})
    other = recipe_file(folder / "other.yaml", folder / "other", OPTIONS, HALF, OTHER)
    for done in two_machines_by_torchrun("tests.programs.sharded_teachers", str(folder), str(path), str(other)):
        assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sharded_teacher_says_what_the_whole_one_says(with_sharded_teacher, name):
    seen = [json.loads((with_sharded_teacher / f"teachers-{rank}.json").read_text())[name] for rank in range(2)]
    for found in seen:
        assert found["difference"] <= 1e-6
        assert found["plain"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)
    assert seen[0]["share"] + seen[1]["share"] == pytest.approx(1.0)


def test_two_machines_under_torchrun_with_a_sharded_teacher_train_as_one_process(with_sharded_teacher, alone):
    assert_same_training(with_sharded_teacher / "run", alone)


def test_one_process_keeps_a_teacher_whole():
    outputs, teacher = outputs_of("test_resnet", shard=True)
    assert not any(isinstance(parameter, DTensor) for parameter in teacher.model.parameters())
    assert outputs.logits.equal(outputs_of("test_resnet", shard=False)[0].logits)


def test_sharding_a_teacher_does_not_make_another_recipe(tmp_path):
    path = recipe_file(tmp_path / "recipe.yaml", tmp_path, OPTIONS)
    hashes = {recipe_hash(load_recipe(path, [f"teacher.shard={value}"])) for value in ("true", "false")}
    assert hashes == {recipe_hash(load_recipe(path))}
    assert recipe_hash(load_recipe(path, ["teacher.mode=train"])) not in hashes


def test_methods_that_run_parts_of_the_teacher_refuse_a_sharded_one(tmp_path):
    wanted = recipe(tmp_path, {"teacher": TEACHER | {"shard": True}, "methods": {"srrl": {}}})
    with pytest.raises(UserError, match=r"methods\.srrl runs parts of the teacher by itself \(head\)"):
        DistillTrainer(wanted)


def test_a_sharded_teacher_is_not_kept_channels_last(tmp_path):
    wanted = recipe(tmp_path, {"teacher": TEACHER | {"shard": True}, "train": {"channels_last": True}})
    with pytest.raises(UserError, match=r"teacher\.shard: a sharded network cannot be kept in train\.channels_last"):
        DistillTrainer(wanted)


# ----------------------------------------------------------------------------------------------------- FSDP2


@pytest.fixture(scope="module")
def fsdp(alone, tmp_path_factory) -> Path:
    """Two processes under FSDP2: `run` from the start, `resumed` from what one process had saved after 4 steps."""
    folder = tmp_path_factory.mktemp("fsdp")
    shutil.copytree(alone / "checkpoints" / "checkpoint-4", folder / "resumed" / "checkpoints" / "checkpoint-4")
    blocks = {"run": {}, "resumed": {}, "other": OTHER, "tokens": TOKENS}
    paths = [recipe_file(folder / f"{name}.yaml", folder / name, OPTIONS, HALF, blocks[name]) for name in blocks]
    done = launch(CONFIGS / "8gpu_fsdp2.yaml", "-m", "tests.programs.fsdp_on_cpu", *map(str, paths))
    assert done.returncode == 0, done.stdout
    assert "Warning" not in done.stdout
    return folder


def test_a_student_under_fsdp_trains_as_one_process(fsdp, alone):
    assert_same_training(fsdp / "run", alone)


def test_a_student_under_fsdp_trains_as_under_ddp(fsdp, with_sharded_teacher):
    assert_same_training(fsdp / "other", with_sharded_teacher / "other")


def test_a_tokens_student_under_fsdp_trains_as_one_process(fsdp, tmp_path):
    train_here(tmp_path / "run", OPTIONS, TOKENS)
    assert_same_training(fsdp / "tokens", tmp_path / "run", losses=("loss", "task/ce", "kd/soft", "vitkd/mimic"))


def test_every_process_holds_its_part(fsdp):
    for rank in range(2):
        shares = json.loads((fsdp / "run" / f"shares-{rank}.json").read_text())
        assert shares["plain"] == []
        for name in ("module", "average", "optimizer"):
            assert shares[name] == pytest.approx(0.5, abs=0.02)


def test_every_process_has_the_first_ones_buffers(fsdp):
    counters = [json.loads((fsdp / "other" / f"shares-{rank}.json").read_text())["counters"] for rank in range(2)]
    assert counters[0] == counters[1] != []


def test_fsdp_continues_what_one_process_began(fsdp, alone):
    assert_same_training(fsdp / "resumed", alone, range(5, 7))


def test_one_process_continues_what_fsdp_began(fsdp, alone, tmp_path):
    shutil.copytree(fsdp / "run" / "checkpoints" / "checkpoint-4", tmp_path / "run" / "checkpoints" / "checkpoint-4")
    train_here(tmp_path / "run", OPTIONS)
    assert_same_training(tmp_path / "run", alone, range(5, 7))


def test_the_student_of_an_fsdp_run_is_an_ordinary_model(fsdp, alone):
    import timm

    pixels = torch.randn(2, 3, 32, 32)
    logits = [
        timm.create_model(f"local-dir:{folder}/student", pretrained=True).eval()(pixels)
        for folder in (fsdp / "run", alone)
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- compile


def test_compiled_training_gives_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    tiny = {"model": "test_vit", "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 1, "mlp_ratio": 1}}
    options = {"student": tiny, "teacher": TEACHER | tiny, "methods": {"kd": {"weight": 1.0}}}
    short = {"train": {"max_steps": 2, "save_strategy": "no"}}
    runs = [train_here(tmp_path / str(on), options, short, {"train": {"torch_compile": on}}) for on in (False, True)]
    assert type(runs[1].trained.wrapped).__name__ == "OptimizedModule"
    losses = [[line["loss"] for line in read_log(run.run.path) if "loss" in line] for run in runs]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.compiler.reset()
