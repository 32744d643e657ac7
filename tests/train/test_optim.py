import math
from types import SimpleNamespace

import pytest
import torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from torch import nn

from kd_hf.distillation.assembly import assemble
from kd_hf.errors import UserError
from kd_hf.recipe.config import TrainConfig
from kd_hf.train.optim import LrSchedule, build_optimizer
from tests.runs import TEACHER, recipe

STEPS, EPOCH = 100, 10


def config(**values):
    return TrainConfig.model_validate({"output_dir": "x", "learning_rate": 0.1, **values})


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A student and a method with parameters of its own."""
    blocks = {"teacher": {**TEACHER, "model": "test_vit"}, "methods": {"mgd": {}}}
    return assemble(recipe(tmp_path_factory.mktemp("run"), blocks, {"data": {"image_size": 32}}), 10).module


# --- parameter groups


def by_parameter(optimizer):
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("options", [{}, {"decay_norm_and_bias": True}, {"layer_decay": 0.5}])
def test_every_parameter_is_trained_once(module, options):
    optimizer = build_optimizer(module, config(weight_decay=0.05, **options))
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in module.parameters()}


def test_norms_biases_and_what_the_network_exempts_are_not_decayed(module):
    groups = by_parameter(build_optimizer(module, config(weight_decay=0.05)))
    exempt = set(module.student.network.no_weight_decay())
    assert {"pos_embed", "cls_token"} <= exempt
    names = [(name.removeprefix("student.network."), p) for name, p in module.named_parameters()]
    for name, p in names:
        assert groups[id(p)]["weight_decay"] == (0 if p.ndim <= 1 or name in exempt else 0.05), name
    assert any(name.startswith("methods.mgd") and p.ndim > 1 for name, p in names)


def test_everything_is_decayed_when_asked(module):
    optimizer = build_optimizer(module, config(weight_decay=0.05, decay_norm_and_bias=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}


def test_layer_decay_is_timms_and_spares_the_methods(module):
    groups = by_parameter(build_optimizer(module, config(weight_decay=0.05, layer_decay=0.5)))
    network = module.student.network
    theirs = by_parameter(create_optimizer_v2(network, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5))
    for name, p in network.named_parameters():
        ours, reference = groups[id(p)], theirs[id(p)]
        assert (ours["lr_scale"], ours["weight_decay"]) == (reference["lr_scale"], reference["weight_decay"]), name
    assert len({group.get("lr_scale", 1.0) for group in groups.values()}) > 2
    assert all(groups[id(p)].get("lr_scale", 1.0) == 1.0 for p in module.methods.parameters())


def test_frozen_parameters_are_left_out(module):
    frozen = next(module.student.network.parameters())
    frozen.requires_grad_(False)
    try:
        for options in ({}, {"decay_norm_and_bias": True}):
            assert id(frozen) not in by_parameter(build_optimizer(module, config(**options)))
    finally:
        frozen.requires_grad_(True)


# --- the optimiser


@pytest.mark.parametrize(
    ("name", "kind", "nesterov"),
    [("adamw", torch.optim.AdamW, None), ("AdamW", torch.optim.AdamW, None), ("sgd", torch.optim.SGD, True),
     ("momentum", torch.optim.SGD, False), ("lamb", None, None), ("lion", None, None)],
)  # fmt: skip
def test_names_of_timm(module, name, kind, nesterov):
    optimizer = build_optimizer(module, config(optim=name, momentum=0.8))
    assert type(optimizer).__name__.lower() == (kind.__name__.lower() if kind else name)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    if nesterov is not None:
        assert optimizer.defaults["nesterov"] is nesterov
        assert optimizer.defaults["momentum"] == 0.8


def test_further_arguments_reach_the_optimiser(module):
    optimizer = build_optimizer(module, config(optim_args={"betas": [0.8, 0.9], "eps": 1e-6}))
    assert tuple(optimizer.defaults["betas"]) == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6


def test_unknown_optimiser(module):
    with pytest.raises(UserError, match=r"train\.optim: unknown optimiser 'adamx'\. Did you mean 'adam"):
        build_optimizer(module, config(optim="adamx"))


@pytest.mark.parametrize("wrong", [{"betaz": 1}, {"betas": [0.9, 2.0]}, {"betas": [0.9]}, {"eps": "x"}, {"lr": 1}])
def test_arguments_that_do_not_fit(module, wrong):
    with pytest.raises(UserError, match=r"train\.optim_args: adamw does not take these"):
        build_optimizer(module, config(optim_args=wrong))


def test_layer_decay_needs_a_network_that_knows_its_layers():
    module = SimpleNamespace(student=SimpleNamespace(network=nn.Linear(2, 2)), methods=nn.ModuleDict())
    with pytest.raises(UserError, match=r"train\.layer_decay needs a timm student"):
        build_optimizer(module, config(layer_decay=0.5))


# --- the schedule


def rates(cfg, lr=0.1, steps=STEPS, epoch=EPOCH):
    schedule = LrSchedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr), cfg, steps, epoch)
    return [schedule.set(step) for step in range(steps)]


def torchs(make, lr=0.1, count=STEPS):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


schedulers = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"lr_scheduler_type": "cosine"}, lambda o: schedulers.CosineAnnealingLR(o, STEPS)),
        ({"lr_scheduler_type": "cosine", "min_lr": 0.01}, lambda o: schedulers.CosineAnnealingLR(o, STEPS, 0.01)),
        ({"lr_scheduler_type": "linear"}, lambda o: schedulers.LinearLR(o, 1.0, 0.0, STEPS)),
        ({"lr_scheduler_type": "constant"}, lambda o: schedulers.ConstantLR(o, 1.0)),
        ({"lr_scheduler_type": "step", "lr_decay_at": ["3 epochs"]}, lambda o: schedulers.StepLR(o, 30)),
        (
            {"lr_scheduler_type": "multistep", "lr_decay_at": ["3 epochs", 0.6, "90 steps"], "lr_decay_rate": 0.2},
            lambda o: schedulers.MultiStepLR(o, [30, 60, 90], 0.2),
        ),
        ({"lr_scheduler_type": "multistep", "lr_decay_at": [60, 30]}, lambda o: schedulers.MultiStepLR(o, [30, 60])),
    ],
)
def test_agrees_with_torch(options, make):
    assert rates(config(**options)) == pytest.approx(torchs(make), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"lr_scheduler_type": "cosine"}, lambda o: schedulers.CosineAnnealingLR(o, STEPS // EPOCH)),
        (
            {"lr_scheduler_type": "multistep", "lr_decay_at": ["3 epochs", "6 epochs"]},
            lambda o: schedulers.MultiStepLR(o, [3, 6]),
        ),
        ({"lr_scheduler_type": "step", "lr_decay_at": ["4 epochs"]}, lambda o: schedulers.StepLR(o, 4)),
    ],
)
def test_moving_at_epoch_ends_agrees_with_torch(options, make):
    by_epoch = torchs(make, count=STEPS // EPOCH)
    wanted = [rate for rate in by_epoch for _ in range(EPOCH)]
    assert rates(config(lr_schedule_on="epoch", **options)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_then_the_curve_goes_on(kind):
    warm = rates(config(lr_scheduler_type=kind, warmup_steps="2 epochs", warmup_lr=0.02))
    cold = rates(config(lr_scheduler_type=kind))
    assert warm[:20] == pytest.approx([0.02 + 0.08 * step / 20 for step in range(20)])
    assert warm[20:] == pytest.approx(cold[20:])


def test_warmup_by_epoch_rises_in_steps():
    warm = rates(config(lr_scheduler_type="constant", lr_schedule_on="epoch", warmup_steps="4 epochs"))
    assert warm[::10][:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert len(set(warm[:10])) == 1


def test_the_rate_is_a_function_of_the_step_alone():
    cfg = config(warmup_steps=10, min_lr=1e-3)
    forward = rates(cfg)
    schedule = LrSchedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), cfg, STEPS, EPOCH)
    assert [schedule.set(step) for step in reversed(range(STEPS))] == forward[::-1]


def test_layers_keep_their_share_of_the_rate_and_the_whole_is_reported():
    group = {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25}
    optimizer = torch.optim.SGD([group], lr=0.1)
    schedule = LrSchedule(optimizer, config(), STEPS, EPOCH)
    for step, whole in enumerate(rates(config())):
        assert schedule.set(step) == pytest.approx(whole)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * whole)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_run_of_one_step(kind, caplog):
    assert rates(config(lr_scheduler_type=kind), steps=1) == [0.1]
    assert not caplog.records


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [14, 24, 26])
def test_a_part_of_an_epoch_at_the_end_is_still_trained(kind, steps):
    values = rates(config(lr_scheduler_type=kind, lr_schedule_on="epoch"), steps=steps)
    assert min(values) > 0
    assert values == sorted(values, reverse=True)


def test_the_rate_a_network_is_trained_with():
    network = create_model("test_resnet", num_classes=3)
    module = SimpleNamespace(student=SimpleNamespace(network=network), methods=nn.ModuleDict())
    cfg = config(optim="momentum", momentum=0.0, warmup_steps=2)
    optimizer = build_optimizer(module, cfg)
    schedule = LrSchedule(optimizer, cfg, STEPS, EPOCH)
    weight = next(network.parameters())
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
    for step in range(3):
        schedule.set(step)
        optimizer.step()
    moved = (before - weight.detach()).mean().item()
    assert moved == pytest.approx(0.0 + 0.05 + 0.05 * (1 + math.cos(math.pi * 2 / STEPS)), rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_curve_that_begins_where_the_warm_up_ends(kind):
    """mmengine's way: warm-up at every step, then the curve over the epochs that are left."""
    cfg = config(
        lr_scheduler_type=kind,
        lr_schedule_on="epoch_after_warmup",
        warmup_steps="2 epochs",
        warmup_lr=0.01,
        min_lr=0.02,
    )
    values = rates(cfg, steps=100, epoch=10)
    assert values[:20] == pytest.approx([0.01 + 0.09 * step / 19 for step in range(20)])
    shapes = {"cosine": lambda x: (1 + math.cos(math.pi * x)) / 2, "linear": lambda x: 1 - x}
    expected = [0.02 + 0.08 * shapes[kind]((step - 20) // 10 / 8) for step in range(20, 100)]
    assert values[20:] == pytest.approx(expected)


@pytest.mark.parametrize("warmup", ["0 steps", "1 steps", "2 steps"])
def test_a_short_warm_up_before_a_curve(warmup):
    cfg = config(lr_schedule_on="epoch_after_warmup", lr_scheduler_type="constant", warmup_steps=warmup, warmup_lr=0.01)
    assert rates(cfg)[:3] == pytest.approx([0.01 if warmup == "2 steps" else 0.1, 0.1, 0.1])


@pytest.mark.parametrize("mode", ["step", "epoch", "epoch_after_warmup"])
@pytest.mark.parametrize(("lag", "steps"), [("1 steps", 1), ("1 epochs", EPOCH)])
def test_a_schedule_that_is_behind(mode, lag, steps):
    """The authors of DeiT and VkD set the rate after an epoch or a step: the first two have the first rate."""
    options = {"lr_schedule_on": mode, "warmup_steps": "2 epochs", "warmup_lr": 0.01, "min_lr": 0.001}
    prompt, late = rates(config(**options)), rates(config(**options, lr_schedule_lag=lag))
    assert late == [prompt[0]] * steps + prompt[:-steps]


def test_milestones_after_a_warm_up_of_steps():
    cfg = config(
        lr_scheduler_type="multistep", lr_schedule_on="epoch_after_warmup", warmup_steps="1 epochs",
        lr_decay_at=["3 epochs", "5 epochs"], lr_decay_rate=0.1,
    )  # fmt: skip
    values = rates(cfg, steps=70, epoch=10)
    assert values[10:30] == pytest.approx([0.1] * 20)
    assert values[30:50] == pytest.approx([0.01] * 20)
    assert values[50:] == pytest.approx([0.001] * 20)


@pytest.mark.parametrize("decay_all", [True, False])
def test_parameters_are_exempted_by_pattern(tmp_path, decay_all):
    patterns = ["student.network.patch_embed.*weight", "methods.mgd.generation.0.*"]
    train = {"weight_decay": 0.1, "decay_norm_and_bias": decay_all, "no_weight_decay": patterns}
    blocks = {"teacher": TEACHER, "student": {"model": "test_resnet"}, "methods": {"mgd": {}}}
    patterns[0] = "student.network.conv1.*weight"
    run = recipe(tmp_path, blocks, {"train": train})
    module = assemble(run, num_classes=10).module
    groups = build_optimizer(module, run.train).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        exempt = name.startswith(("student.network.conv1.", "methods.mgd.generation.0.")) and (
            name.endswith("weight") or name.startswith("methods")
        )
        assert (id(parameter) in decayed) == ((decay_all or parameter.ndim > 1) and not exempt), name


def test_a_pattern_for_nothing_is_refused(tmp_path):
    run = recipe(tmp_path, {"train": {"no_weight_decay": ["student.network.clss_token"]}})
    with pytest.raises(UserError, match=r"train\.no_weight_decay: .*Did you mean 'student.network.cls_token'"):
        build_optimizer(assemble(run, num_classes=10).module, run.train)
