"""The recipes of cls_KD, [CLS]-KD, manifold distillation, VkD and DeiT say what the authors' code does.

The values stand here as they were read there, once more and apart from the recipes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.data.auto_augment import rand_augment_transform
from torch import nn

from kd_hf.distillation.assembly import assemble
from kd_hf.recipe.config import AugmentConfig, MethodBlock
from kd_hf.recipe.read import load_recipe
from kd_hf.train.optim import LrSchedule, build_optimizer
from tests.programs.plan_recipes import plan_file
from tests.programs.recipe_index import FOLDER, header, processes, published
from tests.runs import chosen, merged

Values = dict[str, Any]
OTHERS = ("quickstart", "scalekd_", "plain_scalekd_", "vidt_", "vkd_vidt_", "rtdetr", "yolos")  # tested elsewhere
STEPS = 10  # an epoch of this many steps, where a rate is asked for

# --- trainings: what the optimiser does, what images go through, how a student sees them ----------------------------

TRAIN: Values = {
    "gradient_accumulation_steps": 1, "max_steps": None, "momentum": 0.9, "optim_args": {}, "layer_decay": None,
    "decay_norm_and_bias": False, "lr_schedule_on": "step", "lr_schedule_lag": "0 steps", "warmup_steps": "0 steps",
    "warmup_lr": 0.0, "min_lr": 0.0, "lr_decay_at": [], "lr_decay_rate": 0.1, "max_grad_norm": None, "ema": None,
    "bf16": False, "fp16": False, "sync_batchnorm": False, "load_best_model_at_end": False, "no_weight_decay": [],
}  # fmt: skip
AUGMENT: Values = {
    "crop": {"kind": "random_resized", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "padding": 4}, "hflip": 0.5,
    "auto_augment": None, "color_jitter": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "mix_prob": 1.0,
    "switch_prob": 0.5, "mix_group": None, "repeats": 1,
}  # fmt: skip
MIXED: Values = {"mixup": 0.8, "cutmix": 1.0}
STRONG: Values = {**MIXED, "auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25}


def training(train: Values, augment: Values, interpolation: str, smoothing: float) -> Values:
    return {
        "student": {
            "preprocessing": {"mean": None, "std": None, "interpolation": interpolation, "crop_pct": 0.875},
            "pretrained": False, "num_classes": None, "image_size": None, "kwargs": {}, "drop_path": None,
        },
        "data": {"path": "ILSVRC/imagenet-1k", "image_size": 224, "augment": {**AUGMENT, **augment}},
        "train": {**TRAIN, **train},
        "smoothing": smoothing,
    }  # fmt: skip


MMCLS_SGD = training(
    {
        "optim": "momentum", "learning_rate": 0.1, "weight_decay": 1e-4, "decay_norm_and_bias": True,
        "num_train_epochs": 100.0, "lr_scheduler_type": "multistep", "lr_schedule_on": "epoch",
        "lr_decay_at": ["30 epochs", "60 epochs", "90 epochs"], "lr_decay_rate": 0.1,
    },
    {}, "bilinear", 0.0,
)  # fmt: skip
MMCLS_MOBILENETV2 = training(
    {
        "optim": "momentum", "learning_rate": 0.045, "weight_decay": 4e-5, "decay_norm_and_bias": True,
        "num_train_epochs": 300.0, "lr_scheduler_type": "step", "lr_schedule_on": "epoch",
        "lr_decay_at": ["1 epochs"], "lr_decay_rate": 0.98,
    },
    {}, "bilinear", 0.0,
)  # fmt: skip
MMCLS_REGNETX = training(
    {
        "optim": "sgd", "learning_rate": 0.8, "weight_decay": 5e-5, "decay_norm_and_bias": True,
        "num_train_epochs": 100.0, "lr_scheduler_type": "cosine", "warmup_steps": "5 epochs", "warmup_lr": 0.08,
    },
    {}, "bilinear", 0.0,
)  # fmt: skip
MMCLS_TRANSFORMER = training(
    {
        "optim": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "num_train_epochs": 300.0,
        "lr_scheduler_type": "cosine", "warmup_steps": "20 epochs", "warmup_lr": 1e-6, "min_lr": 1e-5,
        "max_grad_norm": 5.0,
    },
    STRONG, "bicubic", 0.1,
)  # fmt: skip
DEIT = training(
    {
        "optim": "adamw", "weight_decay": 0.05, "num_train_epochs": 300.0, "lr_scheduler_type": "cosine",
        "lr_schedule_on": "epoch", "lr_schedule_lag": "1 epochs", "warmup_steps": "5 epochs",
        "warmup_lr": 1e-6, "min_lr": 1e-5,
        "ema": {"decay": 0.99996, "start": "initial_weights", "warmup": False, "buffers": "average", "export": False},
    },
    {**STRONG, "repeats": 3}, "bicubic", 0.1,
)  # fmt: skip
VKD = training(
    {
        "optim": "adamw", "learning_rate": 5e-4, "weight_decay": 0.05, "num_train_epochs": 300.0,
        "lr_scheduler_type": "cosine", "lr_schedule_lag": "1 steps", "min_lr": 5e-6, "fp16": True,
    },
    {**MIXED, "auto_augment": "3a", "color_jitter": 0.3}, "bicubic", 0.1,
)  # fmt: skip

MMCLS_SHUFFLENETV2 = training(
    {
        "optim": "momentum", "learning_rate": 0.5, "weight_decay": 4e-5, "num_train_epochs": 300.0,
        "lr_scheduler_type": "linear", "warmup_steps": "5000 steps", "warmup_lr": 0.05,
    },
    {}, "bilinear", 0.0,
)  # fmt: skip
MMCLS_CIFAR = merged(
    MMCLS_SGD,
    {
        "student": {
            "preprocessing": {
                "mean": [0.50707, 0.48655, 0.44092], "std": [0.26733, 0.25644, 0.27615], "interpolation": None,
                "crop_pct": 1.0,
            },
        },
        "data": {
            "path": "uoft-cs/cifar100", "image_column": "img", "label_column": "fine_label", "eval_split": "test",
            "image_size": 32, "augment": {"crop": {"kind": "pad", "padding": 4}},
        },
        "train": {
            "num_train_epochs": 200.0, "weight_decay": 5e-4, "lr_decay_rate": 0.2,
            "lr_decay_at": ["60 epochs", "120 epochs", "160 epochs"],
        },
    },
)  # fmt: skip


def per_gpu(batch: int) -> Values:
    """Mixing in the batch of each GPU, as all of these codes do."""
    return {"data": {"augment": {"mix_group": batch}}}


AVERAGED = {"train": {"ema": {**DEIT["train"]["ema"], "export": True}}}
LARGE, SMALL = {"train": {"learning_rate": 1e-3, "fp16": True}}, {"train": {"learning_rate": 5e-4}}
DROP = {"student": {"drop_path": 0.1}}

# --- students: model, images per GPU, GPUs, training, and top-1 without distillation --------------------------------

MMCLS: dict[str, tuple[str, int, int, Values, float]] = {
    "resnet18": ("resnet18", 32, 8, MMCLS_SGD, 69.90),
    "resnet50": ("resnet50", 32, 8, MMCLS_SGD, 76.55),
    "resnet101": ("resnet101", 32, 8, MMCLS_SGD, 77.97),
    "mobilenetv1": ("kd_hf/mobilenetv1_relu", 32, 8, MMCLS_SGD, 69.21),
    "mobilenetv2": ("mobilenetv2_100", 32, 8, MMCLS_MOBILENETV2, 71.86),
    "shufflenetv2_x1": ("kd_hf/shufflenetv2_x1", 64, 16, MMCLS_SHUFFLENETV2, 69.55),
    "regnetx_016": ("regnetx_016", 128, 8, MMCLS_REGNETX, 76.84),
    "swin_tiny": (
        "swin_tiny_patch4_window7_224", 64, 16,
        merged(MMCLS_TRANSFORMER, per_gpu(64), {"student": {"drop_path": 0.2}}), 81.18,
    ),
    "deit_tiny": ("deit_tiny_patch16_224", 256, 4, merged(MMCLS_TRANSFORMER, per_gpu(256)), 74.42),
    "deit_small": ("deit_small_patch16_224", 256, 4, merged(MMCLS_TRANSFORMER, per_gpu(256)), 80.55),
    "deit_base": (
        "deit_base_patch16_224", 64, 16, merged(MMCLS_TRANSFORMER, per_gpu(64), DROP, AVERAGED), 81.76,
    ),
}  # fmt: skip
TEACHERS: dict[str, tuple[str, str]] = {
    "resnet34": ("timm/resnet34.tv_in1k", "batch_stats"),
    "resnet50": ("timm/resnet50.tv_in1k", "batch_stats"),
    "deit3_small": ("timm/deit3_small_patch16_224.fb_in22k_ft_in1k", "eval"),
    "deit3_base": ("timm/deit3_base_patch16_224.fb_in22k_ft_in1k", "eval"),
    "deit3_large": ("timm/deit3_large_patch16_224.fb_in22k_ft_in1k", "eval"),
    "deit_small": ("timm/deit_small_patch16_224.fb_in1k", "eval"),
    "deit_base": ("timm/deit_base_patch16_224.fb_in1k", "eval"),
    "cait_s24": ("timm/cait_s24_224.fb_dist_in1k", "eval"),
    "regnety_160": ("timm/regnety_160.deit_in1k", "eval"),
}

# --- losses: weight and options -------------------------------------------------------------------------------------

FULL = {"task": {"weight": 1.0}}
KD_HALF = {"task": {"weight": {"one_minus": "kd"}}, "kd": {"weight": 0.5, "temperature": 1.0}}
DKD = {**FULL, "dkd": {"weight": 1.0, "temperature": 1.0, "alpha": 1.0, "beta": 0.5}}
WSLD = {**FULL, "wsld": {"weight": 2.5, "temperature": 2.0}}
MGD = {**FULL, "mgd": {"weight": 7e-5, "mask_ratio": 0.15, "student_tap": "stage:-1", "teacher_tap": "stage:-1"}}
SRRL = {
    **FULL,
    "srrl": {
        "weight": 1.0, "alpha": 1.0, "beta": 1.0, "wiring": "per_sample", "student_tap": "stage:-1",
        "teacher_tap": "pre_logits",
    },
}  # fmt: skip
NKD_CNN = {**FULL, "nkd": {"weight": 1.0, "temperature": 1.0, "gamma": 1.5}}
NKD_VIT = {**FULL, "nkd": {"weight": 1.0, "temperature": 1.0, "gamma": 1.0}}
VITKD = {**FULL, "vitkd": {"weight": 1.0, "alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5, "low_blocks": [0, 1]}}
USKD = {**FULL, "uskd": {"weight": 1.0, "alpha": 1.0, "beta": 0.1, "mu": 0.005, "rank": "softmax", "tap": None}}
DEIT_HARD = {"task": {"weight": 0.5}, "deit_hard": {"weight": 0.5}}
SOFT_ONLY = {
    "task": {"weight": 0.0},
    "deit_soft": {"weight": 1.0, "temperature": 1.0, "reduction": "batchmean"},
}
ENDS = [0, 1, 2, 3, 8, 9, 10, 11]
RELATIONS = {"student_blocks": ENDS, "K": 192, "w_sample": 0.1, "w_patch": 4.0, "w_rand": 0.2}
CLS_KD = {
    **SOFT_ONLY,
    "cls_kd": {
        **RELATIONS, "weight": 1.0, "teacher_blocks": ENDS, "dim_match": "projector", "use_projector": None,
        "w_cls": 1.0, "w_atn": 2.0, "last_w": 4.0, "detach_weights": False, "manifold": True, "beta": 1.0,
        "norm_distill": False, "w_norm": 1.0,
    },
}  # fmt: skip
MANIFOLD = {
    **SOFT_ONLY,
    "manifold": {
        **RELATIONS, "weight": 1.0, "teacher_blocks": [0, 1, 2, 3, 20, 21, 22, 23], "max_patch_num": 0,
    },
}  # fmt: skip
VKD_LOSS = {
    "task": {},
    "vkd": {
        "weight": 1.0, "alpha": 1.0, "gamma": 1.0, "student_tap": None, "teacher_tap": None, "map": "auto",
        "normalise": "layer_norm", "normalise_side": "teacher", "distance": "smooth_l1", "shrinkage": 1e-3,
        "truncated_signs": False,
    },
}  # fmt: skip

# --- every configuration: training, student, images per GPU, GPUs, losses, teacher, top-1 with and without ----------


def row(
    values: Values, model: str, batch: int, gpus: int, losses: Values, teacher: str | None = None,
    with_: float | None = None, without: float | None = None,
) -> Values:  # fmt: skip
    smoothing = values["smoothing"]
    task = {"loss": "cross_entropy", "label_smoothing": smoothing, "bce_reduction": "mean"}
    own = {
        "student": {"model": model},
        "train": {"per_device_train_batch_size": batch},
        "teacher": None,
        "methods": {**losses, "task": {**losses.get("task", {}), **task}} if losses or smoothing else {},
    }
    if teacher:
        network, mode = TEACHERS[teacher]
        own["teacher"] = {
            "model": network, "mode": mode, "pretrained": True, "image_size": None, "num_classes": None, "kwargs": {},
            "dtype": "auto",
        }  # fmt: skip
    found = merged({key: value for key, value in values.items() if key != "smoothing"}, own)
    return {"values": found, "gpus": gpus, "with": with_, "without": without}


def mmcls(
    student: str, losses: Values, with_: float | None, teacher: str | None = None, change: Values | None = None
) -> Values:
    model, batch, gpus, values, without = MMCLS[student]
    return row(merged(values, change or {}), model, batch, gpus, losses, teacher, with_, without)


OFFICIAL: dict[str, Values] = {
    "nkd_resnet34_resnet18": mmcls("resnet18", NKD_CNN, 71.96, "resnet34"),
    "nkd_deit3_small_deit_tiny": mmcls("deit_tiny", NKD_VIT, 76.68, "deit3_small"),
    "nkd_deit3_large_deit_base": mmcls("deit_base", NKD_VIT, 84.96, "deit3_large"),
    "vitkd_deit3_small_deit_tiny": mmcls("deit_tiny", VITKD, 76.06, "deit3_small"),
    "vitkd_deit3_base_deit_small": mmcls("deit_small", VITKD, 81.95, "deit3_base"),
    "vitkd_deit3_large_deit_base": mmcls("deit_base", VITKD, 83.46, "deit3_large"),
    "vitkd_nkd_deit3_small_deit_tiny": mmcls("deit_tiny", {**VITKD, **NKD_VIT}, 77.78, "deit3_small"),
    "vitkd_nkd_deit3_base_deit_small": mmcls("deit_small", {**VITKD, **NKD_VIT}, 83.59, "deit3_base"),
    "vitkd_nkd_deit3_large_deit_base": mmcls("deit_base", {**VITKD, **NKD_VIT}, 85.41, "deit3_large"),
    "vitkd_nkd_deit_small_deit_tiny": mmcls("deit_tiny", {**VITKD, **NKD_VIT}, None, "deit_small"),
    "uskd_mobilenetv1": mmcls("mobilenetv1", USKD, 70.38),
    "uskd_mobilenetv2": mmcls("mobilenetv2", merged(USKD, {"uskd": {"tap": "stage:-1"}}), 72.41),
    "uskd_shufflenetv2_x1": mmcls("shufflenetv2_x1", merged(USKD, {"uskd": {"tap": "stage:-1"}}), 70.30),
    "uskd_resnet18": mmcls("resnet18", USKD, 70.79),
    "uskd_resnet50": mmcls("resnet50", USKD, 77.07),
    "uskd_resnet101": mmcls("resnet101", USKD, 78.54),
    "uskd_regnetx_016": mmcls("regnetx_016", USKD, 77.30),
    "uskd_swin_tiny": mmcls("swin_tiny", USKD, 81.49),
    "uskd_deit_tiny": mmcls("deit_tiny", USKD, 74.97),
}
CLIPPED = {"train": {"max_grad_norm": 5.0}}
for _method, _losses in {"kd": KD_HALF, "dkd": DKD, "wsld": WSLD, "mgd": MGD, "srrl": SRRL}.items():
    OFFICIAL[f"{_method}_resnet34_resnet18"] = mmcls("resnet18", _losses, None, "resnet34")
    OFFICIAL[f"{_method}_resnet50_mobilenetv1"] = mmcls("mobilenetv1", _losses, None, "resnet50", CLIPPED)
OFFICIAL["nkd_resnet50_mobilenetv1"] = mmcls("mobilenetv1", NKD_CNN, 72.58, "resnet50", CLIPPED)
for _student, (_model, _batch, _gpus, _values, _top1) in MMCLS.items():
    _name = f"plain_{_student}_mmcls" if _student.startswith("deit") else f"plain_{_student}"
    OFFICIAL[_name] = row(_values, _model, _batch, _gpus, {}, with_=_top1)
for _size, _batch, _gpus, _plain, _top1 in (
    ("tiny", 256, 4, 72.2, 74.5), ("small", 256, 4, 79.9, 81.2), ("base", 64, 16, 81.8, 83.4),
):  # fmt: skip
    _values = merged(DEIT, per_gpu(_batch), LARGE, DROP)
    OFFICIAL[f"plain_deit_{_size}"] = row(_values, f"deit_{_size}_patch16_224", _batch, _gpus, {}, with_=_plain)
    OFFICIAL[f"deit_hard_regnety_160_deit_{_size}_distilled"] = row(
        _values, f"deit_{_size}_distilled_patch16_224", _batch, _gpus, DEIT_HARD, "regnety_160", _top1, _plain
    )
for _size, _plain, _top1 in (("tiny", 72.2, 75.1), ("small", 79.9, 81.49)):
    OFFICIAL[f"cls_kd_deit_base_deit_{_size}"] = row(
        merged(DEIT, per_gpu(128), SMALL), f"deit_{_size}_patch16_224", 128, 4, CLS_KD, "deit_base", _top1, _plain
    )
OFFICIAL["manifold_cait_s24_deit_tiny"] = row(
    merged(DEIT, per_gpu(64), SMALL, {"train": {"fp16": True}}), "deit_tiny_patch16_224", 64, 8, MANIFOLD, "cait_s24",
    76.4, 72.2,
)  # fmt: skip
for _size, _top1 in (("tiny", 79.2), ("small", 82.9)):
    _model = f"kd_hf/conv_stem_deit_{_size}"
    OFFICIAL[f"vkd_regnety_160_conv_stem_deit_{_size}"] = row(VKD, _model, 512, 1, VKD_LOSS, "regnety_160", _top1)
    OFFICIAL[f"plain_conv_stem_deit_{_size}"] = row(VKD, _model, 512, 1, {})
CIFAR_LOSSES = merged(USKD, {"uskd": {"alpha": 0.1, "beta": 0.1, "mu": 0.1}})
CIFAR_NKD = merged(NKD_CNN, {"nkd": {"temperature": 3.0, "gamma": 3.5}})
OFFICIAL["plain_resnet18_cifar"] = row(MMCLS_CIFAR, "kd_hf/resnet18_cifar", 16, 8, {})
OFFICIAL["plain_resnet34_cifar"] = row(MMCLS_CIFAR, "kd_hf/resnet34_cifar", 16, 8, {})
OFFICIAL["uskd_resnet18_cifar"] = row(MMCLS_CIFAR, "kd_hf/resnet18_cifar", 16, 8, CIFAR_LOSSES, with_=79.90)
OFFICIAL["nkd_resnet34_resnet18_cifar"] = row(MMCLS_CIFAR, "kd_hf/resnet18_cifar", 16, 8, CIFAR_NKD)
OFFICIAL["nkd_resnet34_resnet18_cifar"]["values"]["teacher"] = {
    "model": None, "recipe": str(FOLDER / "plain_resnet34_cifar.yaml"), "mode": "batch_stats",
}  # fmt: skip


def within(found: Any, wanted: Any) -> Any:
    """What `found` says about the keys of `wanted`."""
    if not (isinstance(wanted, dict) and isinstance(found, dict)):
        return found
    return {key: within(found.get(key, "missing"), value) for key, value in wanted.items()}


def stated(values: Any) -> Any:
    """The same without what is None."""
    if not isinstance(values, dict):
        return values
    return {key: stated(value) for key, value in values.items() if value is not None}


def test_every_configuration_has_a_recipe():
    names = {path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith(OTHERS)}
    assert names == set(OFFICIAL)


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_values_are_the_official_ones(name):
    path, official = FOLDER / f"{name}.yaml", OFFICIAL[name]
    recipe, wanted = load_recipe(path), official["values"]
    found = recipe.model_dump(mode="json")
    for method, block in found["methods"].items():
        own = MethodBlock.model_fields.keys() & block.keys()
        block = {key: block[key] for key in own}  # a block's own keys, and what is not the method's default
        found["methods"][method] = {**block, **chosen(recipe, method, wanted["methods"].get(method, {}))}
    assert within(found, wanted) == wanted
    assert stated(found["methods"]) == stated(wanted["methods"])
    augment, usual = found["data"]["augment"], AugmentConfig().model_dump(mode="json")
    official_augment = wanted["data"]["augment"]
    assert {k: v for k, v in augment.items() if k in official_augment or v != usual[k]} == official_augment
    assert processes(path) == official["gpus"]
    assert found["train"]["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_headers_say_what_was_published(name):
    path, official = FOLDER / f"{name}.yaml", OFFICIAL[name]
    numbers = tuple(None if text == "–" else float(text) for text in published(path))
    assert numbers == (official["with"], official["without"])
    assert load_recipe(path).baseline == official["without"]
    lines = header(path)
    for kind in ("Source of the values: ", "Expected: "):
        assert sum(line.startswith(kind) for line in lines) == 1
    assert any("not timed" in line for line in lines)
    assert any(line.startswith("Teacher: ") for line in lines) == (official["values"]["teacher"] is not None)


# --- what these values come to -------------------------------------------------------------------------------------


def rates(name: str, *epochs: float) -> list[float]:
    """Learning rates of a recipe at the start of epochs (of ten steps)."""
    cfg = load_recipe(FOLDER / f"{name}.yaml").train
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
    schedule = LrSchedule(optimizer, cfg, round(cfg.num_train_epochs * STEPS), STEPS)
    return [schedule.set(round(epoch * STEPS)) for epoch in epochs]


def test_deit_rates_are_those_of_the_authors():
    # measured with the authors' scheduler, by epoch counted from 0
    official = {
        2: 1.008e-4, 5: 4.002e-4, 6: 4.99664e-4, 50: 4.68447e-4, 100: 3.79715e-4, 150: 2.57566e-4, 200: 1.34729e-4,
        250: 4.41182e-5, 299: 1.00537e-5,
    }  # fmt: skip
    found = rates("cls_kd_deit_base_deit_tiny", *official)
    assert found == pytest.approx(list(official.values()), rel=1e-5)
    assert rates("cls_kd_deit_base_deit_tiny", 7.9) == rates("cls_kd_deit_base_deit_tiny", 7)


def test_rates_of_mmcls_are_its_formulas():
    def cosine(peak: float, low: float, part: float) -> float:
        return low + (peak - low) * (1 + math.cos(math.pi * part)) / 2

    found = rates("nkd_deit3_small_deit_tiny", 0, 10, 20, 20.5, 150)
    after = [cosine(1e-3, 1e-5, epoch / 300) for epoch in (20, 20.5, 150)]
    assert found == pytest.approx([1e-6, (1e-6 + 1e-3) / 2, *after])
    steps = [(0, 1), (29, 1), (30, 0.1), (59, 0.1), (60, 0.01), (89, 0.01), (90, 1e-3), (99, 1e-3)]
    assert rates("nkd_resnet34_resnet18", *(e for e, _ in steps)) == pytest.approx([0.1 * f for _, f in steps])
    assert rates("uskd_mobilenetv2", 0, 0.9, 1, 299) == pytest.approx([0.045, 0.045, 0.045 * 0.98, 0.045 * 0.98**299])
    assert rates("uskd_regnetx_016", 0, 5, 50) == pytest.approx([0.08, cosine(0.8, 0, 0.05), 0.4])


def test_rates_of_vkd_are_a_cosine_a_step_late():
    middle = (5e-4 + 5e-6) / 2
    assert rates("vkd_regnety_160_conv_stem_deit_tiny", 0, 0.1, 150.1) == pytest.approx([5e-4, 5e-4, middle])
    assert rates("vkd_regnety_160_conv_stem_deit_tiny", 299.9)[0] == pytest.approx(5e-6, rel=1e-3)


def decayed(name: str) -> tuple[dict[str, bool], Values]:
    """Whether each learned parameter is decayed, by name, and the defaults of the optimiser."""
    run = load_recipe(FOLDER / f"{name}.yaml")
    parts = assemble(run, 1000, device="meta")
    optimizer = build_optimizer(parts.module, run.train)
    decays = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    return {key: decays[id(p)] for key, p in parts.module.named_parameters()}, optimizer.defaults


def test_transformers_are_decayed_as_by_mmcls():
    found, defaults = decayed("vitkd_nkd_deit3_small_deit_tiny")
    # counted in the authors' optimiser
    assert sorted(found.values()).count(False) == 107 and sorted(found.values()).count(True) == 56
    assert found["methods.vitkd.mask_token"] and not found["student.network.cls_token"]
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.999), 1e-8)
    tables = {key: decay for key, decay in decayed("uskd_swin_tiny")[0].items() if "relative_position_bias" in key}
    assert len(tables) == 12 and not any(tables.values())


def test_the_projector_is_decayed_and_the_tokens_are_not():
    found, _ = decayed("cls_kd_deit_base_deit_tiny")
    projector = {key: decay for key, decay in found.items() if ".projector." in key}
    assert len(projector) == 4
    assert all(decay == key.endswith("weight") for key, decay in projector.items())
    distilled, _ = decayed("deit_hard_regnety_160_deit_tiny_distilled")
    assert not any(distilled[f"student.network.{name}"] for name in ("cls_token", "dist_token", "pos_embed"))


@pytest.mark.parametrize(("name", "nesterov"), [("nkd_resnet34_resnet18", False), ("uskd_regnetx_016", True)])
def test_cnns_are_decayed_whole(name, nesterov):
    found, defaults = decayed(name)
    assert all(found.values())
    assert (defaults["momentum"], defaults["nesterov"]) == (0.9, nesterov)


def test_the_policy_is_two_operations_of_magnitude_9():
    transform = rand_augment_transform(STRONG["auto_augment"], {})
    assert transform.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in transform.ops} == {(9, 0.5, 0.5)}


# --- plans ----------------------------------------------------------------------------------------------------------

# parameters that a method learns, counted in the authors' code or from the widths it states
LEARNED: dict[str, tuple[str, int]] = {
    "cls_kd_deit_base_deit_tiny": ("cls_kd", 462_048),
    "cls_kd_deit_base_deit_small": ("cls_kd", 664_896),
    "manifold_cait_s24_deit_tiny": ("manifold", 0),
    "deit_hard_regnety_160_deit_tiny_distilled": ("deit_hard", 0),
    "kd_resnet34_resnet18": ("kd", 0),
    "mgd_resnet34_resnet18": ("mgd", 2 * (9 * 512 * 512 + 512)),
    "mgd_resnet50_mobilenetv1": ("mgd", 2 * (9 * 2048 * 2048 + 2048) + 1024 * 2048 + 2048),
    "srrl_resnet50_mobilenetv1": ("srrl", 1024 * 2048 + 2 * 2048),
    "uskd_resnet18": ("uskd", 256 * 1000 + 1000),
    "uskd_resnet101": ("uskd", 1024 * 1000 + 1000),
    "uskd_mobilenetv1": ("uskd", 512 * 1000 + 1000),
    "uskd_mobilenetv2": ("uskd", 320 * 1000 + 1000),
    "uskd_shufflenetv2_x1": ("uskd", 464 * 1000 + 1000),
    "uskd_resnet18_cifar": ("uskd", 256 * 100 + 100),
    "uskd_regnetx_016": ("uskd", 408 * 1000 + 1000),
    "uskd_swin_tiny": ("uskd", 384 * 1000 + 1000 + 2 * 384),
    "uskd_deit_tiny": ("uskd", 192 * 1000 + 1000),
    "vitkd_nkd_deit3_small_deit_tiny": ("vitkd", 3 * (192 * 384 + 384) + 2 * (9 * 384 * 384 + 384) + 384),
    "vitkd_deit3_large_deit_base": ("vitkd", 3 * (768 * 1024 + 1024) + 2 * (9 * 1024 * 1024 + 1024) + 1024),
    "vkd_regnety_160_conv_stem_deit_tiny": ("vkd", 192 * 3024),
}
STUDENTS = {
    "cls_kd_deit_base_deit_tiny": 5_717_416,
    "cls_kd_deit_base_deit_small": 22_050_664,
    "vkd_regnety_160_conv_stem_deit_tiny": 6_633_104,
    "plain_conv_stem_deit_small": 23_797_520,
    "plain_resnet18_cifar": 11_220_132,
    "plain_shufflenetv2_x1": 2_278_604,
}


@pytest.mark.parametrize("name", sorted({*LEARNED, *STUDENTS}))
def test_plans_have_the_sizes_of_the_authors(name):
    plan = plan_file(FOLDER / f"{name}.yaml")
    assert plan["global_batch"] == OFFICIAL[name]["values"]["train"]["per_device_train_batch_size"] * plan["processes"]
    assert {net["image_size"] for net in plan["networks"].values()} == {OFFICIAL[name]["values"]["data"]["image_size"]}
    if name in LEARNED:
        method, parameters = LEARNED[name]
        assert plan["methods"][method]["parameters"] == parameters
    if name in STUDENTS:
        assert plan["networks"]["student"]["parameters"] == STUDENTS[name]


# one recipe with each teacher
TAUGHT = {
    official["values"]["teacher"]["model"]: name
    for name, official in OFFICIAL.items()
    if (official["values"]["teacher"] or {}).get("model")
}


@pytest.mark.parametrize("name", sorted(TAUGHT.values()))
def test_student_and_teacher_see_the_same_pixels(name):
    parts = assemble(load_recipe(FOLDER / f"{name}.yaml"), 1000, device="meta")
    views = {(view.image_size, view.interpolation, view.mean, view.std) for view in parts.views().values()}
    assert len(parts.views()) == 2 and len(views) == 1
