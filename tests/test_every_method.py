"""Every method inside the trainer: gradients on two processes, what is learned, bfloat16, draws, and that it trains."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from kd_hf.methods import method_names
from kd_hf.recipe.read import load_recipe
from kd_hf.run.log import read_log
from kd_hf.train.chain import train_recipe
from kd_hf.train.optim import build_optimizer
from tests.forked import launch
from tests.programs.two_rank_methods import CASES, MOMENT, PAIRS, PER_RANK, RANKS, Step
from tests.runs import ROOT

ALL = method_names()
BATCH = range(PER_RANK * RANKS)


def test_every_method_has_a_pair():
    assert set(PAIRS) == set(ALL)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = launch("tests.programs.two_rank_methods", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(two_processes, case):
    step = Step(case)
    # a coupled loss is given the same images on both, and must then be what one process makes of them
    whole = step.gradients(range(PER_RANK) if step.shared else BATCH) | step.kept_equal()
    ranks = [load_file(two_processes / f"{case}.{rank}.safetensors") for rank in range(RANKS)]
    for tensors in ranks:
        assert tensors.keys() == whole.keys()
        for key, value in whole.items():
            assert (tensors[key] - value).float().norm() <= 1e-5 * value.float().norm(), key
    for key in step.kept_equal():
        assert torch.equal(ranks[0][key], ranks[1][key]), key


@pytest.mark.parametrize("name", ALL)
def test_coupling_is_declared(name):
    step = Step(name)
    method = step.module.methods[name]
    batch_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in method.modules())
    whole = step.losses(BATCH)
    halves = [step.losses(rows) for rows in (BATCH[:PER_RANK], BATCH[PER_RANK:])]
    own = [key for key in whole if key.startswith(f"{name}/")]
    separate = all(torch.isclose((halves[0][key] + halves[1][key]) / 2, whole[key], rtol=1e-5, atol=0) for key in own)
    assert step.needs.batch_coupled == (not separate)
    assert step.needs.batch_coupled >= batch_norm


@pytest.mark.parametrize("name", ALL)
def test_all_that_is_learned_has_a_gradient_and_the_teacher_has_none(name):
    step = Step(name)
    gradients = step.gradients(BATCH)
    learned = dict(step.module.named_parameters())
    assert [key for key in learned if key not in gradients] == []
    assert [key for key, value in gradients.items() if not value.isfinite().all() or not value.any()] == []

    frozen = {tensor.data_ptr() for tensor in step.teacher.model.state_dict().values()}
    assert all(parameter.grad is None for parameter in step.teacher.model.parameters())
    assert all(tensor.grad is None for tensor in step.seen.tensors())
    assert not frozen & {tensor.data_ptr() for tensor in step.module.state_dict().values()}
    optimised = [p for group in build_optimizer(step.module, step.recipe.train).param_groups for p in group["params"]]
    assert {id(parameter) for parameter in optimised} == {id(parameter) for parameter in learned.values()}


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_close(name):
    exact = Step(name).losses(BATCH)
    for precision in (torch.float32, torch.bfloat16):
        step = Step(name, precision)
        with torch.autocast("cpu", torch.bfloat16):
            rough = step.losses(BATCH)
        step.total(rough).backward()
        assert all(parameter.grad.isfinite().all() for parameter in step.module.parameters())
        for part, value in rough.items():
            # maps that agree to seven digits differ by the rounding of the networks alone
            assert value.item() == pytest.approx(exact[part].item(), rel=0.02, abs=1e-7), (part, precision)


@pytest.mark.parametrize("name", ALL)
def test_draws_are_the_only_chance(name):
    steps, seeds = [Step(name) for _ in range(3)], (0, 0, 1)  # a step each: one may keep what it saw
    first, again, other = (step.total(step.losses(BATCH, seed=seed)) for step, seed in zip(steps, seeds, strict=True))
    assert first == again
    step = steps[0]
    random = step.draws(BATCH)[name].keys() - step.module.methods[name].scheduled(MOMENT).keys()
    assert (first != other) == bool(random)


SHORT = (
    "train.warmup_steps=10",
    "train.logging_steps=10",
    "train.eval_strategy=no",
    "train.save_strategy=no",
    "train.cpu_threads=1",
    "train.use_cpu=true",
    "eval.report=false",
    "eval.max_samples=256",
)
TEACHERS = {
    "quickstart": ("train.max_steps=120", "train.per_device_train_batch_size=32"),
    "quickstart_vit": ("train.max_steps=120",),
}
STUDENT = ("train.max_steps=80", "train.per_device_train_batch_size=32", "baseline=null")
# methods on tokens; transformers learn to read late, so `kd` stays beside them and digits are not shifted
RECIPES = dict.fromkeys(("cls_kd", "manifold", "scalekd", "vitkd"), "quickstart_vit")
# methods that need a student whose stages end in ReLUs, or whose classifier receives the last map's mean
STUDENTS = dict.fromkeys(("ofd", "sdd"), "test_resnet")
# digits have 8 pixels a side: what is read at 32 is read at 16 as well, and in as many patches
SMALL = {
    "quickstart": ("data.image_size=16", "data.augment.crop.padding=1"),
    "quickstart_vit": ("data.image_size=16", "data.augment.crop.padding=0", "student.kwargs.patch_size=4"),
}


@pytest.fixture(scope="module")
def trained_teacher(tmp_path_factory):
    """Trains the teacher of a quick start when it is first asked for; gives its run folder."""

    @cache
    def train(recipe):
        folder = tmp_path_factory.mktemp(recipe)
        overrides = [*SHORT, *TEACHERS[recipe], *SMALL[recipe], f"train.output_dir={folder}"]
        train_recipe(load_recipe(ROOT / "recipes" / f"{recipe}_teacher.yaml", overrides))
        return folder

    return train


@pytest.mark.parametrize("name", ALL)
def test_it_trains_in_the_quick_start(tmp_path, trained_teacher, name):
    recipe = RECIPES.get(name, "quickstart")
    file = ROOT / "recipes" / f"{recipe}.yaml"
    kept = {"task", name} | ({"kd"} if name in RECIPES else set())
    methods = [f"methods.{other}=false" for other in load_recipe(file).methods if other not in kept]
    methods += [f"methods.{name}={{}}", "teacher.recipe=null", f"teacher.model={trained_teacher(recipe)}"]
    network = [f"student.model={STUDENTS[name]}"] if name in STUDENTS else []
    overrides = [*SHORT, *STUDENT, *SMALL[recipe], *methods, *network, f"train.output_dir={tmp_path}"]
    output = train_recipe(load_recipe(file, overrides))
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    losses = [sum(value for key, value in line.items() if key.startswith(f"{name}/")) for line in lines]
    assert losses[-1] < losses[0]
    assert output.metrics["eval_top1"] > 30  # of 10 classes
