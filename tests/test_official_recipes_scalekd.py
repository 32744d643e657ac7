"""ScaleKD's 17 official configurations, written out from the authors' files, against what the recipes resolve to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from timm.optim import create_optimizer_v2

from kd_hf.data.views import plan_views
from kd_hf.distillation.assembly import assemble
from kd_hf.methods import get_method
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.train.optim import LrSchedule
from tests.runs import chosen

ROOT = Path(__file__).parents[1]
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

SWIN_S = ("timm/swin_small_patch4_window7_224.ms_in1k", 0.3)
SWIN_B = ("timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k", 0.5)
SWIN_L = ("timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", 0.1)
EVA_224 = ("timm/eva_large_patch14_196.in22k_ft_in22k_in1k", 0.0)
EVA_336 = ("timm/eva_large_patch14_336.in22k_ft_in22k_in1k", 0.0)


class Strategy(NamedTuple):
    """How a student is trained; rates as the schedulers are given them, warm-up as (epochs, factor of the peak)."""

    optim: str
    decay_all: bool
    epochs: int
    schedule: str
    warmup: tuple[int, float]
    min_lr: float
    level: tuple[int, int] | None  # RandAugment's magnitude of how many
    interpolation: str


STEP = Strategy("momentum", True, 100, "multistep", (0, 0), 0.0, None, "bilinear")
COSINE = STEP._replace(schedule="cosine")
LAMB = Strategy("lamb", True, 300, "cosine", (5, 0.25), 0.0, (7, 8), "bicubic")
ADAMW = Strategy("adamw", False, 300, "cosine", (20, 1e-3), 1e-5, (9, 10), "bicubic")
MIXER = Strategy("adamw", True, 300, "cosine", (20, 1e-6), 0.0, (12, 15), "bicubic")


class Projector(NamedTuple):
    """Student channels → teacher channels, sides of the two grids, attention heads."""

    student: int
    teacher: int
    keys: int
    queries: int
    heads: int


class Row(NamedTuple):
    """One official configuration."""

    student: str
    teacher: tuple[str, float]
    strategy: Strategy
    lr: float
    weight_decay: float
    per_gpu: int
    gpus: int
    s3: Projector
    s4: Projector
    sigma: float = 5.0
    alpha: tuple[float, float] = (0.08, 0.06)
    alpha_s4: tuple[float, float] | None = None
    norm: str = "batch"
    kd: bool = True
    loss: tuple[str, float] = ("cross_entropy", 0.0)  # and its label smoothing
    erasing: float = 0.0
    clip: float | None = None
    ema: str | None = None  # "evaluated" or "kept"
    sync_bn: bool = False
    drop_path: float | None = None
    size: int = 224
    test_edge: int = 256


# where the authors read the student as s3 and s4, and what makes timm's network theirs
STUDENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet50": ("stage:3", "stage:4", {}),
    "resnet50d": ("stage:3", "stage:4", {}),
    "kd_hf/mobilenetv1_relu": ("stage:-2", "stage:-1", {}),
    "convnext_tiny": ("stage:3", "module:norm_pre", {"head_norm_first": True}),
    "swin_tiny_patch4_window7_224": ("stage:3", "tokens:patch", {}),
    "kd_hf/vit_small_patch16_gap": ("block:8", "tokens:patch", {}),
    "kd_hf/vit_base_patch16_gap": ("block:8", "tokens:patch", {}),
    "kd_hf/vit_base_patch14_gap": ("block:8", "tokens:patch", {}),
    "mixer_s16_224": ("block:5", "block:7", {}),
    "mixer_b16_224": ("block:9", "block:11", {}),
    "kd_hf/mixer_b14": ("block:9", "block:11", {}),
    "eva02_small_patch14_336": ("block:9", "block:11", {"scale_mlp": True, "attn_type": "rope"}),
}
P = Projector
LS, BCE = ("cross_entropy", 0.1), ("bce", 0.0)
RES50 = Row(
    "resnet50", SWIN_S, STEP, 0.1, 1e-4, 32, 8, P(1024, 384, 14, 14, 3), P(2048, 768, 7, 7, 6),
    alpha_s4=(0.08, 0.0), kd=False, sync_bn=True,
)  # fmt: skip
RES50_L = {"s3": P(1024, 768, 14, 14, 16), "s4": P(2048, 1536, 7, 7, 24)}
MOBILE = {"s3": P(512, 768, 14, 14, 16), "s4": P(1024, 1536, 7, 7, 24), "loss": LS}
GRID16 = {"s3": P(768, 1024, 16, 16, 8), "s4": P(768, 1024, 16, 16, 8), "alpha": (0.016, 0.008), "sigma": 1.0}
VIT = {"loss": LS, "erasing": 0.25, "ema": "evaluated"}
OFFICIAL = {
    "swin_res50": RES50,
    "swin_res50_advanced": RES50,
    "swin_b_res50": RES50._replace(
        teacher=SWIN_B, s3=P(1024, 512, 14, 14, 8), s4=P(2048, 1024, 7, 7, 16), alpha_s4=None, kd=True
    ),
    "swin_l_res50": RES50._replace(teacher=SWIN_L, **RES50_L, alpha_s4=None, kd=True),
    "swin_l_mobilenetv1": Row("kd_hf/mobilenetv1_relu", SWIN_L, COSINE, 0.1, 1e-4, 32, 8, **MOBILE),
    "swin_l_mobilenetv1_advanced": Row("kd_hf/mobilenetv1_relu", SWIN_L, LAMB, 2e-3, 0.004, 64, 32, **MOBILE),
    "swin_l_res50_advanced": Row(
        "resnet50d", SWIN_L, LAMB, 5e-3, 0.02, 64, 32, **RES50_L, loss=BCE, erasing=0.25, clip=5.0
    ),
    "swin_l_vit_b16": Row(
        "kd_hf/vit_base_patch16_gap", SWIN_L, ADAMW, 1e-3, 0.05, 16, 32,
        P(768, 768, 14, 14, 8), P(768, 1536, 14, 7, 8), clip=5.0, test_edge=224, **VIT,
    ),
    "swin_l_vit_s16": Row(
        "kd_hf/vit_small_patch16_gap", SWIN_L, ADAMW, 1e-3, 0.05, 32, 32,
        P(384, 768, 14, 14, 8), P(384, 1536, 14, 7, 8), clip=5.0, **VIT,
    ),
    "swin_l_convnext_t": Row(
        "convnext_tiny", SWIN_L, ADAMW, 1e-3, 0.05, 32, 32,
        P(384, 768, 14, 14, 8), P(768, 1536, 7, 7, 16), sigma=1.0, drop_path=0.1, **VIT,
    ),
    "swin_l_swin_t": Row(
        "swin_tiny_patch4_window7_224", SWIN_L, ADAMW, 1e-3, 0.05, 16, 32,
        P(384, 768, 14, 14, 24), P(768, 1536, 7, 7, 48), sigma=1.0, norm="layer", clip=5.0, drop_path=0.05, **VIT,
    ),
    "swin_l_mixer_s16": Row(
        "mixer_s16_224", SWIN_L, MIXER, 7e-4, 0.067, 24, 32,
        P(512, 768, 14, 14, 8), P(512, 1536, 14, 7, 8), erasing=0.25, clip=1.0, ema="kept",
    ),
    "swin_l_mixer_b16": Row(  # its synchronised BatchNorm has nothing to act on
        "mixer_b16_224", SWIN_L, MIXER, 7e-4, 0.067, 48, 32,
        P(768, 768, 14, 14, 8), P(768, 1536, 14, 7, 8), erasing=0.25, clip=1.0, drop_path=0.1,
    ),
    "eva_l_res50": Row(
        "resnet50d", EVA_224, LAMB, 5e-3, 0.02, 64, 32, P(1024, 1024, 14, 16, 8), P(2048, 1024, 7, 16, 8),
        sigma=0.2, alpha=(0.016, 0.008), loss=BCE, erasing=0.25, clip=5.0,
    ),
    "eva_l_vit_b14": Row(
        "kd_hf/vit_base_patch14_gap", EVA_224, ADAMW, 1e-3, 0.05, 32, 32, **GRID16, loss=LS, erasing=0.25, clip=5.0
    ),
    "eva_l_mixer_b14": Row(
        "kd_hf/mixer_b14", EVA_224, MIXER, 7e-4, 0.067, 24, 32, **GRID16, clip=1.0, drop_path=0.1, **VIT
    ),
    "eva_l_eva02_s14": Row(
        "eva02_small_patch14_336", EVA_336, ADAMW, 1e-3, 0.05, 16, 32,
        P(384, 1024, 24, 24, 8), P(384, 1024, 24, 24, 8), sigma=1.0, alpha=(0.008, 0.004), drop_path=0.1,
        size=336, test_edge=336, **VIT,
    ),
}  # fmt: skip


def path(name: str) -> Path:
    return ROOT / "recipes" / f"scalekd_{name}.yaml"


@pytest.fixture(scope="module", params=OFFICIAL)
def pair(request: pytest.FixtureRequest) -> tuple[str, Row, Recipe]:
    return request.param, OFFICIAL[request.param], load_recipe(path(request.param))


def test_every_official_configuration_has_its_recipe():
    assert len(OFFICIAL) == 17
    assert {file.stem for file in (ROOT / "recipes").glob("scalekd_*.yaml")} == {f"scalekd_{name}" for name in OFFICIAL}


def test_networks_and_what_they_are_shown(pair):
    _, row, recipe = pair
    student, teacher = recipe.student, recipe.teacher
    assert (student.model, student.pretrained, student.drop_path) == (row.student, False, row.drop_path)
    *taps, arguments = STUDENTS[row.student]
    assert student.kwargs == arguments
    assert recipe.methods["scalekd"].options["taps"] == dict(zip(("s3", "s4"), taps, strict=True))
    model, drop_path = row.teacher
    assert teacher.model == model
    # without stochastic depth, train mode is eval mode
    assert teacher.mode == ("train" if drop_path else "eval")
    assert teacher.kwargs.get("drop_path_rate", 0.0) == drop_path
    assert (recipe.data.image_size, teacher.image_size or row.size) == (row.size, row.size)
    for view in (student.preprocessing, teacher.preprocessing):
        assert view.interpolation == row.strategy.interpolation
        assert [255 * value for value in view.mean] == pytest.approx(MEAN)
        assert [255 * value for value in view.std] == pytest.approx(STD)
    assert round(row.size / student.preprocessing.crop_pct) == row.test_edge


def test_losses(pair):
    _, row, recipe = pair
    task, scalekd = recipe.methods["task"].options, recipe.methods["scalekd"]
    assert set(recipe.methods) == {"task", "scalekd"} | ({"kd"} if row.kd else set())
    weight = recipe.methods["task"].weight
    assert getattr(weight, "one_minus", weight) == ("kd" if row.kd else 1.0)
    if row.kd:
        assert recipe.methods["kd"].weight == 0.5 and chosen(recipe, "kd", ["temperature"]) == {"temperature": 1.0}
    assert (task["loss"], task["label_smoothing"]) == row.loss
    assert task["bce_reduction"] == "sum" or row.loss != BCE
    assert scalekd.weight in (None, 1.0) and get_method("scalekd").weight == 1.0
    options = get_method("scalekd").Config.model_validate(scalekd.options)
    assert options.projector == "cross_attention" and options.norm == row.norm
    assert options.alphas("s3") == row.alpha
    assert options.alphas("s4") == (row.alpha_s4 or row.alpha)
    assert options.scales("s3") == options.scales("s4") == (row.sigma, row.sigma)
    assert options.head_count("s3", row.s3.teacher) == row.s3.heads
    assert options.head_count("s4", row.s4.teacher) == row.s4.heads


def test_images(pair):
    _, row, recipe = pair
    augment = recipe.data.augment
    assert (augment.crop.kind, augment.crop.scale, augment.crop.ratio) == (
        "random_resized",
        (0.08, 1.0),
        (3 / 4, 4 / 3),
    )
    assert (augment.hflip, augment.color_jitter, augment.mixup, augment.cutmix) == (0.5, 0, 0, 0)
    assert (augment.erasing, augment.repeats) == (row.erasing, 1)
    if row.strategy.level is None:
        assert augment.auto_augment is None
        return
    kind, magnitude, deviation, increasing = augment.auto_augment.split("-")
    level, levels = row.strategy.level
    assert (kind, increasing) == ("rand", "inc1")
    assert abs(int(magnitude.removeprefix("m")) - 10 * level / levels) <= 0.25  # timm takes whole numbers only
    assert float(deviation.removeprefix("mstd")) == pytest.approx(0.5 * 10 / levels, abs=1e-3)


def test_optimisation(pair):
    name, row, recipe = pair
    train, strategy = recipe.train, row.strategy
    assert (train.optim, train.learning_rate, train.weight_decay) == (strategy.optim, row.lr, row.weight_decay)
    assert (train.decay_norm_and_bias, train.layer_decay, train.max_grad_norm) == (strategy.decay_all, None, row.clip)
    assert (train.num_train_epochs, train.max_steps) == (strategy.epochs, None)
    assert (train.bf16, train.fp16, train.sync_batchnorm) == (False, False, row.sync_bn)
    launcher = "8gpu" if row.gpus == 8 else "4x8gpu"
    processes = yaml.safe_load((ROOT / "accelerate_configs" / f"{launcher}.yaml").read_text())["num_processes"]
    assert f"accelerate_configs/{launcher}.yaml" in path(name).read_text(encoding="utf-8")
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (row.per_gpu, 1)
    assert f"({row.per_gpu * processes:,} a step)" in path(name).read_text(encoding="utf-8")
    assert ((train.ema.decay, train.ema.start) if train.ema else None) == ((0.9999, "first_step") if row.ema else None)
    assert train.ema is None or train.ema.export == (row.ema == "evaluated")


def test_optimisers_have_the_official_constants(pair):
    _, row, recipe = pair
    train = recipe.train
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": train.weight_decay}]
    optimizer = create_optimizer_v2(
        groups, opt=train.optim, lr=train.learning_rate, momentum=train.momentum, **train.optim_args
    )
    group: dict[str, Any] = optimizer.param_groups[0]
    constants = {
        "momentum": {"momentum": 0.9, "nesterov": False, "dampening": 0},
        "lamb": {"betas": (0.9, 0.999), "eps": 1e-6, "max_grad_norm": 1.0, "bias_correction": True},
        "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False},
    }[row.strategy.optim]
    assert {key: group[key] for key in constants} == constants


def official_rate(row: Row, step: int) -> float:
    """The authors' learning rate with ten steps an epoch: warm-up at every step, the rest at epoch ends."""
    strategy, whole = row.strategy, step // 10
    warm, factor = strategy.warmup
    if whole < warm:
        return row.lr * (factor + (1 - factor) * step / (10 * warm - 1))  # mmengine's last step has the full rate
    if strategy.schedule == "multistep":
        return row.lr * 0.1 ** sum(whole >= milestone for milestone in (30, 60, 90))
    done = (whole - warm) / (strategy.epochs - warm)
    return strategy.min_lr + (row.lr - strategy.min_lr) * (1 + math.cos(math.pi * done)) / 2


def test_the_rate_at_every_tenth_of_an_epoch(pair):
    _, row, recipe = pair
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=row.lr)
    schedule = LrSchedule(optimizer, recipe.train, 10 * row.strategy.epochs, 10)
    for step in range(10 * row.strategy.epochs):
        assert schedule.set(step) == pytest.approx(official_rate(row, step), rel=1e-9), step


# parameters of all projectors in millions, as counted in the authors' code; Swin-S less the view whose factor is 0
BUILT = {
    "swin_res50": 119.3 - 47.5,
    "swin_res50_advanced": 119.3 - 47.5,
    "swin_b_res50": 134.6,
    "swin_l_res50": 176.0,
    "swin_l_mobilenetv1": 97.0,
    "swin_l_mobilenetv1_advanced": 97.0,
    "swin_l_res50_advanced": 176.0,
    "swin_l_vit_b16": 94.2,
    "swin_l_vit_s16": 74.4,
    "swin_l_convnext_t": 84.6,
    "swin_l_swin_t": 84.6,
    "swin_l_mixer_s16": 79.8,
    "swin_l_mixer_b16": 94.2,
    "eva_l_res50": 154.3,
    "eva_l_vit_b14": 75.0,
    "eva_l_mixer_b14": 75.0,
    "eva_l_eva02_s14": 56.7,
}


@pytest.mark.parametrize("name", BUILT)
def test_projectors_have_the_official_shapes(name):
    row = OFFICIAL[name]
    parts = assemble(load_recipe(path(name)), device="meta")
    method = parts.module.methods["scalekd"]
    views = {"s3": ("spatial", "alternative"), "s4": ("spatial", "alternative")[: 2 if row.alpha_s4 is None else 1]}
    assert set(method.projectors) == {f"{stage}_{view}" for stage in views for view in views[stage]}
    for key, projector in method.projectors.items():
        expected = row.s3 if key.startswith("s3") else row.s4
        found = projector.conv.in_channels, projector.query.out_features, *projector.key_grid, *projector.grid
        assert found == (expected.student, expected.teacher, *[expected.keys] * 2, *[expected.queries] * 2)
        assert projector.heads == expected.heads
        assert projector.scale == pytest.approx(row.sigma * (expected.teacher / expected.heads) ** -0.5)
        assert (projector.table is not None) == key.startswith("s3")
    assert method.cost().parameters / 1e6 == pytest.approx(BUILT[name], abs=0.11)
    # one view: the teacher is given the student's own pixels
    shown = plan_views(parts.views(), training=True)
    assert len(shown.views) == 1
    assert (shown.models["student"].mean, shown.models["student"].std) == (
        shown.models["teacher"].mean,
        shown.models["teacher"].std,
    )


def test_eva02_is_the_authors_variant():
    parts = assemble(load_recipe(path("eva_l_eva02_s14")), device="meta")
    assert parts.student.info.parameters == 22_158_184


def test_four_machines_with_eight_gpus():
    launcher = yaml.safe_load((ROOT / "accelerate_configs" / "4x8gpu.yaml").read_text(encoding="utf-8"))
    assert launcher["num_processes"] == 32 and launcher["num_machines"] == 4  # the processes of all machines together
    assert (launcher["distributed_type"], launcher["mixed_precision"]) == ("MULTI_GPU", "no")
    assert {"machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"} <= set(launcher)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("plain_scalekd_*.yaml")), ids=lambda path: path.stem)
def test_plain_students_are_trained_like_their_distilled_twins(path):
    plain = load_recipe(path)
    twin = load_recipe(path.parent / path.read_text(encoding="utf-8").split("\nbase: ")[1].split("\n")[0])
    assert plain.teacher is None and list(plain.methods) == ["task"] and plain.methods["task"].weight == 1.0
    assert plain.methods["task"].options == twin.methods["task"].options
    assert (plain.student, plain.data) == (twin.student, twin.data)
    own = {"output_dir", "no_weight_decay"}
    assert plain.train.model_dump(exclude=own) == twin.train.model_dump(exclude=own)
