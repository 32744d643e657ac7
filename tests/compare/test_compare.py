"""Comparing runs: tables, recipe difference, spread over seeds, plot, and what a user can get wrong."""

import json
import statistics
import subprocess
import sys

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from kd_hf.compare.__main__ import main
from kd_hf.compare.runs import difference, read_runs, seed_groups
from kd_hf.compare.tables import as_json, compare, draw, runs_table
from kd_hf.errors import UserError
from kd_hf.files import write_text
from kd_hf.layout import LOG, RESOLVED
from kd_hf.recipe.resolved import dump_recipe
from kd_hf.train.chain import train_recipe
from tests.detection.runs import detection_recipe
from tests.runs import ROOT, environment, recipe

DISTILLED = {"teacher": {"model": "test_resnet"}, "methods": {"kd": {"temperature": 4}}}
MODELS = {"student": {"name": "test_vit", "parameters": 371234}, "teacher": {"name": "test_resnet", "parameters": 9}}


def written(folder, values, *blocks, finished=True, start=None, seconds=12.0):
    """A run folder by hand; `values` are (step, top-1) of its evaluations."""
    made = recipe(folder, *blocks)
    write_text(folder / RESOLVED, dump_recipe(made))
    lines = [{"step": 0, "models": MODELS, "steps_per_epoch": 134, "global_batch": 8, **(start or {})}]
    for step, top1 in values:
        lines.append({"step": step, "loss": 5.0 - step, "weight/kd": 1.0})
        lines.append({"step": step, "eval_top1": top1, "eval_agreement": top1 / 2, "train_seconds": seconds})
    write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        write_text(folder / "student" / RESOLVED, dump_recipe(made))
    return folder


@pytest.fixture
def three(tmp_path):
    """A plain run, and one recipe of distillation with two seeds."""
    return [
        written(tmp_path / "plain", [(2, 50.0), (4, 60.0)]),
        written(tmp_path / "kd0", [(2, 75.0), (4, 71.0)], DISTILLED, {"baseline": 60.0}),
        written(tmp_path / "kd1", [(2, 70.0), (4, 74.0)], DISTILLED, {"baseline": 60.0, "train": {"seed": 1}}),
    ]


def test_table_of_runs(three):
    head, plain, first, second = runs_table(read_runs(three))
    assert head == ["run", "student", "teacher", "methods", "best top-1 %", "last", "plain", "gain", "agreement %",
                    "parameters", "train s", "steps"]  # fmt: skip
    assert plain == ["plain", "test_vit", "–", "–", "60.00", "60.00", "–", "–", "30.00", "371,234", "12", "4"]
    assert first[2:8] == ["test_resnet", "kd", "75.00", "71.00", "60.00", "+11.00"]
    assert second[4:8] == ["74.00", "74.00", "60.00", "+14.00"]


def test_columns_without_values_are_left_out(tmp_path):
    runs = read_runs([written(tmp_path / "one", [(4, 60.0)])])
    assert runs_table(runs)[0] == ["run", "student", "best top-1 %", "last", "agreement %", "parameters", "train s",
                                   "steps"]  # fmt: skip
    assert len(compare(runs).split("\n\n")) == 1  # nothing to compare it with


def test_the_value_is_that_of_the_exported_weights(tmp_path):
    best = {"train": {"load_best_model_at_end": True}}
    folder = written(tmp_path / "run", [(2, 75.0), (4, 71.0)], DISTILLED, best, {"baseline": "train"})
    written(folder / "plain", [(2, 65.0), (4, 61.0)], best)
    (run,) = read_runs([folder])
    assert (run.best, run.last, run.value, run.plain, run.gain) == (75.0, 71.0, 75.0, 65.0, 10.0)


def test_how_far_a_run_is(tmp_path):
    epochs = {"train": {"max_steps": None, "num_train_epochs": 2.0}}
    unfinished = {"finished": False}
    folders = [
        written(tmp_path / "done", [(4, 1.0)]),
        written(tmp_path / "steps", [(2, 1.0)], **unfinished),
        written(tmp_path / "epochs", [(100, 1.0)], epochs, **unfinished),
        written(tmp_path / "unknown", [(3, 1.0)], epochs, start={"steps_per_epoch": None}, **unfinished),
        written(tmp_path / "changed", [(4, 1.0)], {"train": {"seed": 5}}),
    ]
    write_text(folders[-1] / "student" / RESOLVED, dump_recipe(recipe(tmp_path)))  # the artefact of another recipe
    shown = [row[-1] for row in runs_table(read_runs(folders))[1:]]
    assert shown == ["4", "2 of 4", "100 of 268", "3, not finished", "4 of 4"]


def test_difference_has_only_what_differs(three):
    found = difference(read_runs(three))
    assert found == {
        "teacher.model": [None, "test_resnet", "test_resnet"],
        "baseline": [None, 60.0, 60.0],
        "methods.kd.weight": [None, 0.5, 0.5],
        "methods.kd.temperature": [None, 4.0, 4.0],
        "train.seed": [0, 0, 1],
    }


def test_defaults_count_where_they_meet_other_values(tmp_path):
    other = {"methods": {"kd": {"temperature": 4, "weight": {"one_minus": "task"}}, "deit_hard": {}}}
    folders = [
        written(tmp_path / "a", [(4, 1.0)], {"methods": {"kd": {}}}, {"teacher": {"model": "test_resnet"}}),
        written(tmp_path / "b", [(4, 1.0)], other, {"teacher": {"model": "test_resnet"}}),
    ]
    default = recipe(tmp_path, {"methods": {"kd": {}}}, {"teacher": {"model": "x"}})
    temperature = next(line for line in dump_recipe(default).splitlines() if "temperature" in line).split(": ")[1]
    assert difference(read_runs(folders)) == {
        "methods.kd.weight": [0.5, "1 − task"],
        "methods.kd.temperature": [float(temperature), 4.0],
        "methods.deit_hard.weight": [None, 0.5],  # a method without options is seen by its weight
    }


def test_equal_recipes_are_said_to_be_equal(tmp_path):
    folders = [written(tmp_path / name, [(4, 1.0)]) for name in ("a", "b")]
    assert compare(read_runs(folders)).endswith("The recipes do not differ.")


def test_spread_over_seeds(three):
    groups = seed_groups(read_runs(three))
    assert [(group.runs, group.seeds) for group in groups] == [(("plain",), (0,)), (("kd0", "kd1"), (0, 1))]
    single, pair = groups
    assert (single.value.mean, single.value.std, single.gain) == (60.0, None, None)
    assert pair.value.mean == 72.5 and pair.value.std == pytest.approx(statistics.stdev([71.0, 74.0]))
    assert (pair.plain.mean, pair.plain.std) == (60.0, 0.0)
    assert pair.gain.mean == 12.5 and pair.gain.std == pytest.approx(pair.value.std)
    row = next(line for line in compare(read_runs(three)).splitlines() if line.startswith("kd0, kd1"))
    assert row.split("  ")[-1] == "2" and "72.50 ± 2.12" in row and "+12.50 ± 2.12" in row


@pytest.mark.parametrize(
    ("changes", "start", "finished"),
    [
        ({"train": {"seed": 1, "learning_rate": 0.5}}, {}, True),  # not the seed alone
        ({"train": {"seed": 1}}, {"global_batch": 16}, True),  # another batch on other machines
        ({"train": {"seed": 1}}, {}, False),  # still training: its number is of another step
    ],
)
def test_only_finished_runs_that_differ_in_seed_are_averaged(tmp_path, changes, start, finished):
    folders = [
        written(tmp_path / "a", [(4, 1.0)]),
        written(tmp_path / "b", [(4, 2.0)], changes, start=start, finished=finished),
    ]
    assert seed_groups(read_runs(folders)) == []


def test_less_is_better_for_a_loss(three):
    _, run, _ = read_runs(three, "loss")
    assert (run.best, run.last, run.plain) == (1.0, 1.0, None)  # losses of other methods are no plain twin's
    assert read_runs(three, "eval_agreement")[1].best == 37.5
    assert read_runs(three, "agreement")[1].metric == "eval_agreement"


def test_a_gain_in_a_loss_is_a_smaller_value(tmp_path):
    folder = written(tmp_path / "run", [(4, 50.0)], DISTILLED, {"baseline": "train"})
    written(folder / "plain", [(4, 40.0)])
    for place, value in ((folder, 0.8), (folder / "plain", 1.0)):
        with (place / LOG).open("a") as log:
            log.write(json.dumps({"step": 4, "eval_nll": value}) + "\n")
    (run,) = read_runs([folder], "nll")
    assert run.gain == pytest.approx(0.2)


def test_markdown_is_tables(three):
    tokens = MarkdownIt("commonmark").enable("table").parse(compare(read_runs(three), markdown=True))
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 3 and "paragraph_open" not in kinds
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert shown[12:15] == ["plain", "test_vit", "–"]
    assert "72.50 ± 2.12" in shown and "train.seed" in shown


def test_json_holds_the_numbers(three):
    values = json.loads(as_json(read_runs(three)))
    assert values["metric"] == "eval_top1"
    assert values["runs"][1]["gain"] == 11.0 and values["runs"][1]["finished"] is True
    assert values["recipe"]["train.seed"] == {"plain": 0, "kd0": 0, "kd1": 1}
    assert values["seeds"][1]["value"] == {"mean": 72.5, "std": pytest.approx(2.1213, abs=1e-3)}


def test_plot_is_a_picture_of_the_runs(three, tmp_path):
    path = tmp_path / "new" / "plot.png"
    draw(read_runs(three), path)
    with Image.open(path) as picture:
        colours = {pixel[:3] for _, pixel in picture.getcolors(1 << 20)}
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    assert {blue, orange} <= colours and green not in colours  # seeds of one recipe share a colour
    assert [entry.name for entry in path.parent.iterdir()] == ["plot.png"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [written(tmp_path / place / "run", [(4, 1.0)]) for place in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_run_may_have_any_name(tmp_path):
    folders = [written(tmp_path / name, [(4, 1.0)]) for name in ("犬", "$a_{b$", "_c")]
    draw(read_runs(folders), tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert all(f"<!--  {name} -->" in drawn for name in ("犬", "$a_{b$", "_c"))


def test_a_run_without_the_number_is_named_with_what_it_has(tmp_path):
    early = written(tmp_path / "early", [], finished=False)
    begun = written(tmp_path / "begun", [], finished=False)
    with (begun / LOG).open("a") as log:
        log.write(json.dumps({"step": 2, "epoch": 0.1, "loss": 5.0, "weight/kd": 1.0, "images_per_second": 9.0}) + "\n")
    with pytest.raises(UserError, match=r"^'\S*/early' \(step 0 of 4\) has no eval_top1 .*, nor other numbers$"):
        read_runs([early])
    known = "--metric can name what is there: images_per_second, loss, weight/kd$"
    with pytest.raises(UserError, match=rf"^'\S*/begun' \(step 2 of 4\) has no eval_top1 in its log, .*; {known}"):
        read_runs([begun])
    with pytest.raises(UserError, match=rf"^none of '\S*/early' .*, '\S*/begun' .* has an eval_top1 .*; {known}"):
        read_runs([early, begun])
    with pytest.raises(UserError, match=r"^--metric: '.*/begun' has not logged 'los'\. Did you mean 'loss'\?$"):
        read_runs([begun], "los")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/plian"], r"no run folder '.*plian'\. Did you mean 'plain'\?"),
        (["{0}"], "is no run folder: it holds no recipe.resolved.yaml"),
        (["{0}/plain", "{0}/empty"], r"empty' holds no log.jsonl yet; start its training first"),
        (["{0}/plain", "{0}/../{1}/plain"], "is given twice"),
        (
            ["{0}/plain", "--metric", "eval_top2"],
            r"--metric: '.*/plain' has not logged 'eval_top2'\. Did you mean 'eval_top1'\?",
        ),
        (["{0}/plain", "--plot", "{0}/x.pgn"], r"--plot: '.*x.pgn' does not end as a picture does\."),
        (["{0}/plain", "--plot", "{0}/x"], r"--plot: '.*x' does not end as a picture does\. Known: .*png"),
        (["{0}/plain", "--json", "{0}/plain/log.jsonl/x"], r"cannot write .*log.jsonl/x"),
    ],
)
def test_mistakes_are_named(three, tmp_path, arguments, message):
    write_text(tmp_path / "empty" / RESOLVED, dump_recipe(recipe(tmp_path / "empty")))
    with pytest.raises(UserError, match=message):
        main([argument.format(tmp_path, tmp_path.name) for argument in arguments])


def test_the_command_on_trained_runs(tmp_path):
    for seed in (0, 1):
        train_recipe(recipe(tmp_path / f"run{seed}", {"train": {"seed": seed, "max_steps": 2}}))
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.svg")]
    command = [sys.executable, "-m", "kd_hf.compare", str(tmp_path / "run0"), str(tmp_path / "run1")]
    done = subprocess.run([*command, *files], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run0, run1" in done.stdout and "train.seed" in done.stdout
    values = json.loads((tmp_path / "c.json").read_text())
    assert [row["step"] for row in values["runs"]] == [2, 2] and values["seeds"][0]["seeds"] == [0, 1]
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    command[3] += "-gone"
    wrong = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("kd_hf: error: no run folder") and wrong.stderr.count("\n") == 1


def test_detectors_are_compared_by_precision(three, tmp_path):
    found = []
    for name, ap in (("a", 41.5), ("b", 43.0)):
        made = detection_recipe(tmp_path / name, {"baseline": 40.0})
        write_text(tmp_path / name / RESOLVED, dump_recipe(made))
        write_text(tmp_path / name / LOG, json.dumps({"step": 4, "eval_ap": ap, "eval_ap50": 60.0}) + "\n")
        found.append(tmp_path / name)
    runs = read_runs(found)
    assert [(run.metric, run.value, run.gain) for run in runs] == [("eval_ap", 41.5, 1.5), ("eval_ap", 43.0, 3.0)]
    head, first, _ = runs_table(runs)
    assert dict(zip(head, first, strict=True))["best AP"] == "41.50"
    with pytest.raises(UserError, match="different tasks, measured by eval_ap and eval_top1; name a number"):
        read_runs([found[0], three[0]])
