"""Run folders as a push sees them, and what it leaves in a repository of the small Hub."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from kd_hf.layout import LOG
from kd_hf.run.checkpoint import save_checkpoint
from kd_hf.run.identity import Identity
from kd_hf.run.state import CheckpointState
from tests import runs


def block(folder, **values):
    return runs.recipe(folder, {"hub": values}).hub


def write_student(folder, seed, weights="model.safetensors", picture="curve.png"):
    for name in ("report", ".eval_results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    save_file({"weight": torch.rand(2000, generator=generator)}, folder / weights)
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit", "seed": seed}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Digits\n")
    (folder / ".eval_results" / "digits.yaml").write_text("- value: 99\n")
    (folder / "report" / picture).write_bytes(bytes(range(256)))


def write_checkpoint(folder, step):
    path = folder / "checkpoints" / f"checkpoint-{step}"
    tensors = {"module": {"weight": torch.full((3000,), float(step))}}
    save_checkpoint(path, CheckpointState(step, Identity("0", 8)), tensors, {"optimizer": {"lr": step / 10}})
    return path


def local(folder):
    """Content of every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remote(hub, name="ann/digits", branch="main"):
    """The same of a repository."""
    commit = hub.store.resolve("models", name, branch)
    entries = hub.store.read("models", name, commit)["files"]
    return {path: hub.store.blob(entry["sha256"]).read_bytes() for path, entry in entries.items()}


def titles(hub, name="ann/digits", branch="main"):
    """The commits of a branch, oldest first; a repository begins with one of its own."""
    found, commit = [], hub.store.resolve("models", name, branch)
    while commit:
        read = hub.store.read("models", name, commit)
        found.insert(0, read["title"])
        commit = read["parent"]
    return found


def pushed(folder):
    """What a push of a run is to leave in its repository."""
    return local(folder / "student") | {LOG: (folder / LOG).read_bytes()}
