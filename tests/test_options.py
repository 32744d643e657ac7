"""Options that make training faster or smaller leave its numbers as they are: losses, weights, resuming, processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_hf.cache.write import write_store
from kd_hf.distillation.teacher import Teacher
from tests.forked import launch
from tests.programs.two_rank_options import OPTIONS, PAIRS, RUNS, TRAINING, Trained, losses_of, train, write_photos
from tests.runs import assert_same_tensors, final_tensors, merged, recipe

Run = Callable[..., Trained]

# How far each loss may be off, relative to itself, and all tensors together, relative to what training moved them by.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "checkpointing": (0, 0),
    "ahead": (0, 0),
    "channels_last": (1e-5, 1e-5),  # float32, summed in another order
    "compile": (1e-5, 1e-5),
    "store": (2**-10, 2**-9),  # float16: 2⁻¹¹ of log-probabilities between −2 and 0, and of taps
    "bf16_teacher": (2**-7, 2**-6),  # bfloat16 keeps eight bits
    "pil": (0.02, 0.02),  # 50 dB are 0.3 % of the pixels' range
}
# A stored teacher has no classifier, which `srrl` runs. What torch.compile does to one pair costs ten seconds.
CASES = [
    *((pair, option) for pair in ("maps", "tokens") for option in BOUNDS if option not in ("compile", "store")),
    *(("tokens", "store"), ("separate", "store"), ("maps", "compile"), ("small", "compile")),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with photographs and the stores of two pairs."""
    folder = tmp_path_factory.mktemp("options")
    write_photos(folder / "data")
    for pair in ("tokens", "separate"):
        run = merged(TRAINING, PAIRS[pair], {"data": {"path": str(folder / "data")}})
        write_store(recipe(folder / "unused", run), folder / f"store_{pair}", taps=True)
    return folder


@pytest.fixture(scope="module")
def ran(root) -> Run:
    """Trains a pair with an option when it is first asked for."""

    @cache
    def run(pair: str, option: str) -> Trained:
        return train(root, root / "one" / pair / option, pair, option)

    return run


def assert_close(found: Trained, expected: Trained, losses: float, moved: float) -> None:
    """Losses of every step, and all that is learned, averaged and counted."""
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=losses, abs=0)
    assert found.after.keys() == expected.after.keys()
    counters = [key for key, value in expected.after.items() if not value.is_floating_point()]
    assert [key for key in counters if not found.after[key].equal(expected.after[key])] == []
    numbers = [key for key in expected.after if key not in counters]
    ours, theirs, before = (
        torch.cat([tensors[key].double().flatten() for key in numbers])
        for tensors in (found.after, expected.after, expected.before)
    )
    assert (ours - theirs).norm() <= moved * (theirs - before).norm()


@pytest.mark.parametrize(("pair", "option"), CASES)
def test_training_is_as_without_the_option(ran, pair, option):
    assert_close(ran(pair, option), ran(pair, "none"), *BOUNDS[option])


def _lies_channels_last(run: Trained) -> bool:
    networks = (run.trainer.trained.plain, run.trainer.teachers["teacher"].model)
    weights = [[value for value in network.parameters() if value.ndim == 4] for network in networks]
    last = {value.is_contiguous(memory_format=torch.channels_last) for values in weights for value in values}
    return all(weights) and last == {True}


EFFECTS: Mapping[str, Callable[[Trained], bool]] = {
    "checkpointing": lambda run: run.trainer.trained.plain.student.network.grad_checkpointing,
    "ahead": lambda run: run.trainer.feed().ahead == 1,
    "channels_last": _lies_channels_last,
    "compile": lambda run: run.graphs >= 2,
    "bf16_teacher": lambda run: run.trainer.teachers["teacher"].dtype == torch.bfloat16,
    "store": lambda run: not run.trainer.teachers,
    "pil": lambda run: run.trainer.recipe.data.decoder == "pil",
}


@pytest.mark.parametrize(("pair", "option"), CASES)
def test_the_option_is_at_work(ran, pair, option):
    run, without = ran(pair, option), ran(pair, "none")
    assert EFFECTS[option](run)
    assert option == "compile" or not EFFECTS[option](without)
    if BOUNDS[option][0] > 1e-5:
        assert run.losses != without.losses


@pytest.mark.parametrize("option", ["bf16_teacher", "store"])
def test_what_stands_for_a_teacher_leaves_the_student_as_it_is(ran, option):
    run, without = ran("tokens", option), ran("tokens", "none")
    assert run.losses[0]["task/ce"] == without.losses[0]["task/ce"]
    assert {key: value.dtype for key, value in run.after.items()} == {k: v.dtype for k, v in without.after.items()}


@pytest.mark.parametrize(("pair", "logits"), [("maps", ("kd", "srrl")), ("tokens", ("nkd",))])
def test_a_teacher_that_stops_after_its_taps_says_the_same(root, monkeypatch, pair, logits):
    features: dict[str, Any] = {"methods": {name: {"weight": 0} for name in logits}}
    call, classes, to_the_end = Teacher.__call__, [], False

    def watched(self: Teacher, pixels: Any, whole: bool = True) -> Any:
        outputs = call(self, pixels, whole or to_the_end)
        classes.append(outputs.logits.shape[1])
        return outputs

    monkeypatch.setattr(Teacher, "__call__", watched)
    short = train(root, root / pair / "short", pair, "none", features)
    assert classes.count(0) == len(short.losses)  # once a step; evaluation reads them
    classes, to_the_end = [], True
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    full = train(root, root / pair / "full", pair, "none", features)
    assert classes and 0 not in classes
    assert_close(short, full, 0, 0)


@pytest.mark.parametrize(("pair", "option"), [*RUNS, ("maps", "together"), ("tokens", "together")])
def test_resume_is_equal_to_the_bit(root, ran, tmp_path, pair, option):
    whole = ran(pair, option).trainer.run.path
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", tmp_path / "checkpoints" / "checkpoint-2")
    train(root, tmp_path, pair, option)
    assert losses_of(tmp_path) == losses_of(whole)[2:]
    assert_same_tensors(final_tensors(tmp_path), final_tensors(whole))


@pytest.fixture(scope="module")
def two_processes(root) -> Path:
    """Run folders of two processes with half a batch each."""
    done = launch("tests.programs.two_rank_options", str(root))
    assert done.returncode == 0, done.stderr
    return root / "two"


@pytest.mark.parametrize(("pair", "option"), RUNS)
def test_two_processes_train_as_one(two_processes, ran, pair, option):
    one, two = ran(pair, option).trainer.run.path, two_processes / option
    for ours, theirs in zip(losses_of(two), losses_of(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    found, expected = final_tensors(two), final_tensors(one)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_every_option_is_continued_and_shared():
    together = OPTIONS["together"]
    for name in BOUNDS.keys() - {option for _, option in RUNS}:
        option = OPTIONS[name]
        assert merged(together.blocks, option.blocks) == together.blocks
        assert issubclass(together.trainer, option.trainer)
