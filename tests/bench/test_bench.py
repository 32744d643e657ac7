"""The bench: whose step is timed, how its parts add up, what is shown."""

import io
import json
import statistics

import pytest
import torch
from PIL import Image

from kd_hf.bench import __main__ as command
from kd_hf.bench.clock import Slot, Stopwatch, medians, ratio, take_turns, totals
from kd_hf.bench.measure import Options, bench_recipe
from kd_hf.bench.memory import peak_bytes
from kd_hf.bench.photos import Photos
from kd_hf.bench.show import PARTS, describe, extra_bytes
from kd_hf.bench.work import TrainerStep, has_bf16
from kd_hf.data.opening import open_source
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.cost import step_cost
from kd_hf.errors import UserError
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.variants import with_untrained_teachers
from kd_hf.train.trainer import DistillTrainer
from tests.forked import launch
from tests.programs.benchmark_table import CASES, page, renewed
from tests.programs.gpu.page import section
from tests.runs import ROOT, TEACHER, recipe, recipe_file

DISTILLED = {
    "student": {"model": "test_vit"},
    "teacher": TEACHER | {"model": "test_vit2"},
    "methods": {"kd": {"weight": {"warmup": [0, 1, "2 steps"]}}, "mgd": {"weight": 0.01}},
    "data": {"augment": {"mixup": 0.8, "erasing": 0.25}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One round, so that sums and ratios are those of the parts."""
    run = recipe(tmp_path_factory.mktemp("run"), DISTILLED)
    return bench_recipe(run, Options(rounds=1, batch=4, against_plain=True, bf16_teacher=True))


def test_parts_add_up_to_the_step(found):
    assert list(found["parts"]) and set(found["parts"]) == set(PARTS)
    assert sum(found["parts"].values()) == pytest.approx(found["step_seconds"])
    assert set(found["bare"]) == {"teacher", "student", "losses", "backward"}
    assert sum(found["bare"].values()) == pytest.approx(found["bare_seconds"])
    without = found["step_seconds"] - found["parts"]["optimiser"]
    assert found["tax"]["median"] == pytest.approx(without / found["bare_seconds"])
    assert found["tax_with_optimiser"]["median"] == pytest.approx(found["step_seconds"] / found["bare_seconds"])
    assert found["images_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert min(found["over_plain"]["median"], found["data_seconds"]) > 0
    assert ("bf16_teacher" in found) == has_bf16(torch.device("cpu"))


def test_a_bench_stands_where_all_losses_count_and_knows_their_size(found):
    assert found["losses"] == ["task", "kd", "mgd"]  # at step 0 the weight of kd is 0
    assert found["at_step"] == 1
    assert found["teachers"] == {"teacher": "test_vit2"}
    assert found["images"].startswith("builtin:digits")
    parts = assemble(load_distilled(), 10)
    trained = {"student": parts.module.student, "methods": parts.module.methods}
    expected = {name: 4 * sum(p.numel() for p in part.parameters()) for name, part in trained.items()}
    assert found["exchange"]["gradient_bytes"] == expected
    assert found["exchange"]["sent_bytes"] == 0
    cost = step_cost(assemble(load_distilled(), 10, device="meta"))
    assert found["flops"]["student"] == 3 * 4 * cost.flops["student"]
    assert found["flops"]["teacher"] == 4 * cost.flops["teacher"]
    assert found["flops"]["methods"] == 3 * 4 * cost.method_flops["mgd"] > 0


def load_distilled():
    return recipe("unused", DISTILLED)


def test_numbers_are_plain_json_and_text(found):
    assert json.loads(json.dumps(found)) == found
    text = describe(found)
    for part in ("test_vit2 → test_vit", "task, kd, mgd", *PARTS, "÷ bare pair", "none sent"):
        assert part in text, text


def test_the_step_is_the_trainers(tmp_path):
    run = recipe(
        tmp_path, DISTILLED, {"train": {"max_steps": 1, "save_strategy": "no"}, "methods": {"kd": {"weight": 1}}}
    )
    source = open_source(run.data, "train")
    step = TrainerStep(run, source)
    marks: list[str] = []
    step.in_parts(marks.append)
    assert [mark for mark, after in zip(marks, [*marks[1:], ""], strict=True) if mark != after] == [
        "hand-over", "teacher", "hand-over", "student", "losses", "backward", "optimiser"
    ]  # fmt: skip
    trainer = DistillTrainer(run, train_dataset=source, eval_dataset=source)
    trainer.train()
    expected = trainer.trained.plain.state_dict()
    for key, value in step.trainer.trained.plain.state_dict().items():
        assert value.equal(expected[key]), key


def test_slots_take_turns_in_reversed_order():
    order: list[str] = []

    class Counted(Stopwatch):
        def start(self):
            order.append("|")
            super().start()

    watch = Counted(torch.device("cpu"))

    def work(name):
        def run(mark):
            order.append(name)
            mark("one")
            mark("two")
            mark("one")

        return run

    times = take_turns({name: Slot(work(name), watch, repeats=2) for name in "ab"}, 3)
    assert "".join(order) == "a|aab|bb" + "b|bba|aa" + "a|aab|bb"  # once untimed, then twice on the watch
    assert [set(parts) for parts in times["a"]] == [{"one", "two"}] * 3


def test_medians_of_parts_and_of_ratios():
    rounds = [{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 4.0}]
    assert medians(rounds) == {"a": 2.0, "b": 4.0}
    assert totals(rounds) == [6.0, 4.0, 6.0]
    assert ratio([1, 4, 9, 16, 25], [1, 2, 3, 4, 5]) == {"median": 3, "low": 2, "high": 4}


def test_processor_time_is_counted_only_where_it_means_something():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert Stopwatch(torch.device("cpu")).counts == "processor time"
        assert Stopwatch(torch.device("cpu"), alone=False).counts == "wall-clock time"
        torch.set_num_threads(2)
        assert Stopwatch(torch.device("cpu")).counts == "wall-clock time"
    finally:
        torch.set_num_threads(threads)


def test_photos_are_as_large_as_those_of_imagenet():
    photos = Photos(20, 3)
    files = [photos.read(row) for row in range(20)]
    assert [label for _, label in files] == photos.labels().tolist() == [row % 3 for row in range(20)]
    assert Image.open(io.BytesIO(files[0][0])).size == (500, 375)
    assert statistics.mean(len(data) for data, _ in files) == pytest.approx(110e3, rel=0.05)
    assert files[0][0] == Photos(1, 1).read(0)[0] != files[1][0]


def test_the_command_measures_without_data_writes_and_draws(tmp_path, capsys):
    gone = {"data": {"path": str(tmp_path / "gone")}, "student": {"num_classes": 10}}
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", DISTILLED, gone)
    outputs = ["--json", str(tmp_path / "out" / "b.json"), "--plot", str(tmp_path / "out" / "b.png")]
    assert command.main([str(file), "--rounds", "1", *outputs, "train.seed=3"]) == 0
    printed = capsys.readouterr().out
    assert "synthetic JPEGs" in printed and "gone' does not exist" in printed
    found = json.loads((tmp_path / "out" / "b.json").read_text())
    assert found["overrides"] == ["train.seed=3"]
    assert found["batch"] == 8
    assert "over_plain" not in found and "bf16_teacher" not in found and found["memory"] is None
    with Image.open(tmp_path / "out" / "b.png") as picture:
        assert picture.width > picture.height > 100
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more"),
        (["--batch", "-1"], "--batch: expected 1 or more"),
        (["--plot", "step.txt"], "--plot: 'step.txt' does not end as a picture"),
        (["train.seeed=1"], "seeed"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr("kd_hf.bench.measure.bench_recipe", lambda *_: pytest.fail("measured"))
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", DISTILLED)
    with pytest.raises(UserError, match=message):
        command.main([str(file), *options])


def test_peak_memory_is_that_of_processes_of_their_own(tmp_path):
    run = recipe(tmp_path, DISTILLED, {"student": {"num_classes": 10}})
    ballast = torch.ones(1 << 28)  # 1 GiB that is only this process's
    peaks = peak_bytes(run, 10)
    assert all(1e8 < peaks[case] < 1e8 + ballast.nbytes for case in ("step", "bare")), peaks
    trained = assemble(run, 10).module.parameters()
    # two moments of float32 for each parameter, and a count
    assert peaks["optimiser"] == sum(2 * 4 * p.numel() + 4 for p in trained if p.requires_grad)
    assert extra_bytes(peaks) == peaks["step"] - peaks["optimiser"] - peaks["bare"]


def test_two_processes_send_the_gradients_of_student_and_methods_once(tmp_path):
    file = recipe_file(tmp_path / "recipe.yaml", tmp_path / "run", DISTILLED)
    done = launch("kd_hf.bench", str(file), "--rounds", "1", "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["processes"] == 2
    assert found["counted"] == "wall-clock time"
    assert found["exchange"]["sent_over_gradients"] == 1.0
    assert done.stdout.count("bare pair") == describe(found).count("bare pair")  # one process speaks


def test_the_page_of_benchmarks_keeps_what_other_machines_gave():
    first = page("## a CPU", "cpu", "")
    both = page("## a GPU", "gpu", first)
    again = page("## another CPU", "cpu", both)
    assert "## a CPU" in both and "## a CPU" not in again
    assert again.index("## another CPU") < again.index("## a GPU")
    assert page("## a GPU", "gpu", again) == again


def test_rows_of_the_page_are_renewed():
    table = "\n".join(("| case | tax |", "| --- | ---: |", "| nkd_vit | 1.1 |", "| nkd_cnn | 1.2 |"))
    before = page(f"## a GPU\n{table}", "gpu", page(f"## a CPU\n{table}", "cpu", ""))
    after = renewed(["| case | tax |", "| --- | ---: |", "| nkd_vit | 1.01 |", "", "| mgd | 1.3 |"], "cpu", before)
    assert after == before.replace("| nkd_vit | 1.1 |", "| nkd_vit | 1.01 |", 1)
    assert renewed(["| nkd_vit | 1.01 |"], "gpu", "") == ""


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_cnn")])
def test_what_the_page_measures_can_be_planned(name):
    case = CASES[name]
    run = load_recipe(ROOT / "recipes" / f"{case.recipe}.yaml", case.overrides)
    parts = assemble(with_untrained_teachers(run), num_classes=1000, device="meta")
    measured = {choice.name for choice in parts.choices}
    assert any(name.startswith(method) for method in measured), measured


def test_the_page_says_which_checks_of_a_gpu_failed():
    rows = [
        {"check": "setting", "status": "ok", "device": "a GPU", "date": "today", "versions": "torch 2"},
        {"check": "bits/kill", "status": "ok"},
        {"check": "bits/resume", "status": "FAILED 3 | tensors"},
        {
            **{"check": "speed/eager/nkd", "status": "OVER 1.1 > 1.02", "batch": 8, "images_per_second": 80.0},
            **{"step_ms": 100.0, "plain_over_step": 2.0, "gigabytes": 1.0, "plain_gigabytes": 2.0},
            **{"step_over_bare": [1.1, 1.0, 1.2], "bound": 1.02},
        },
    ]
    lines = section(rows).splitlines()
    assert "| nkd, eager | 8 | 80 | 100.0 | 1.100 [1.000–1.200] | ≤ 1.020 **over** | 2.00 | 1.0 | 2.0 |  |" in lines
    assert lines[lines.index(next(line for line in lines if line.endswith("1 of 2"))) + 1].startswith("  - bits/resume")
