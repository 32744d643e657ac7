"""Run folders of tiny detectors: data, recipe and log written by hand, an artefact with weights of its own."""

from __future__ import annotations

import json

import torch

from kd_hf.hub.artefact import save_student
from kd_hf.layout import LOG, RESOLVED
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.run.record import RunRecord
from tests.detection.scenes import NAMES, scene, write_parquet
from tests.runs import RECIPE, merged

MODEL = "kd_hf/vidt_nano"
SIZES = {
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "num_queries": 6,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_n_points": 2,
    "dropout": 0.0,
}
AUGMENT = {"sizes": [64], "eval_size": 64, "max_size": 160, "crop": 0.0}
MEASURED = {"eval_ap": 41.5, "eval_ap50": 60.25, "eval_ap_small": 20.0, "eval_ar100": 55.0, "eval_samples": 8.0}


def detection_recipe(folder, *blocks) -> Recipe:
    """A recipe over the scenes of :func:`detector_run`."""
    path = folder / "scenes"
    data = {"path": str(path), "boxes": {"augment": AUGMENT}, "image_size": None, "augment": {}}
    kept = {key: value for key, value in RECIPE.items() if key in ("train", "eval")}
    own = {"student": {"model": MODEL, "kwargs": SIZES}, "data": data, "train": {"output_dir": str(folder)}}
    return Recipe.model_validate(merged(kept, own, {"eval": {"max_samples": None}}, *blocks))


def detector_run(folder, *blocks, seed=0, **measured) -> RunRecord:
    """A run that has ended, with what it `measured` at the end; its detector is sure of everything it says."""
    write_parquet(folder / "scenes" / "data" / "validation-0.parquet", [scene(i) for i in range(8)])
    made = detection_recipe(folder, *blocks)
    (folder / RESOLVED).write_text(dump_recipe(made))
    record = RunRecord.read(folder)
    torch.manual_seed(seed)
    handle = record.task.load(MODEL, kwargs=SIZES, num_classes=len(NAMES))
    with torch.no_grad():
        for name, parameter in handle.network.named_parameters():
            if "class" in name and name.endswith("bias"):
                parameter.add_(4.0)
    save_student(record.task.named(handle, NAMES), folder / "student")
    note = {"name": MODEL, "parameters": handle.info.parameters, "library": "transformers", "architecture": "vidt"}
    models = dict.fromkeys(("student", *made.all_teachers()), note)
    lines = [
        {"step": 0, "models": models, "global_batch": 8, "steps_per_epoch": 2},
        {"step": 2, "loss": 9.0, "task/bbox": 3.0, "eval_ap": 30.0},
        {"step": 4, "loss": 8.0, "task/bbox": 2.0, **MEASURED, **measured, "train_seconds": 3.0},
    ]
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunRecord.read(folder)
