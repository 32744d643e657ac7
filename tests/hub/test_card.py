"""The model card: what a run says about its student, in words and for the Hub's machines."""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from markdown_it import MarkdownIt
from PIL import Image

from kd_hf.data.digits import DigitsSource
from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.hub.card import model_card, write_card
from kd_hf.layout import LOG, RESOLVED
from kd_hf.models.load import load_model
from kd_hf.recipe.resolved import dump_recipe, recipe_hash
from kd_hf.run.record import RunRecord
from kd_hf.train.chain import train_recipe
from tests.hub.server import User, serve
from tests.runs import environment, recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DISTILLED = {"teacher": {"model": "test_resnet"}, "methods": {"kd": {"temperature": 4}}}
# argv: the folder to upload; then the programs of the card that lies on the Hub run as they are printed
PUBLISHED = """
import re, sys
from huggingface_hub import HfApi, ModelCard
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
    card = ModelCard.load(name)
    for program in re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL):
        print(card.data.library_name, flush=True)
        exec(program, {})
"""


def start_line(**changes):
    """What a run logs first."""
    models = {
        "student": {"name": "test_vit", "parameters": 371234, "library": "timm", "architecture": "test_vit"},
        "teacher": {"name": "test_resnet", "parameters": 1234567, "library": "timm", "architecture": "test_resnet"},
    }
    data = {split: f"builtin:digits ({split}, 719 images, 10 classes)" for split in ("train", "eval")}
    facts = {"models": models, "data": data, "global_batch": 8, "steps_per_epoch": 134, "processes": 2, "device": "cpu"}
    return {"step": 0, **facts, "versions": {"kd_hf": "0.1.0", "torch": "2.14"}, **changes}


def written(folder, *blocks, lines=(), names=("zero", "one", "two"), student="test_vit"):
    """A run folder by hand: recipe, log, artefact."""
    folder.mkdir(parents=True, exist_ok=True)
    made = recipe(folder, *blocks)
    (folder / RESOLVED).write_text(dump_recipe(made), encoding="utf-8")
    log = [line if "models" in line else {"step": 4, **line} for line in lines or [start_line()]]
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in log))
    handle = load_model(student, num_classes=len(names) or 3, image_size=32)
    handle.label_names = tuple(names)
    save_student(handle, folder / "student")
    return RunRecord.read(folder)


def sections(text):
    """Heading → its text."""
    parts = re.split(r"^## (.*)$", ModelCard(text).text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(text):
    """All table rows of a text, as lists of cells."""
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher and its student, trained for a few steps, with the plain twin."""
    folder = tmp_path_factory.mktemp("trained")
    train_recipe(recipe(folder / "teacher", {"student": {"model": "test_resnet"}}))
    teacher = {"model": str(folder / "teacher"), "gate": {"enabled": False}}
    mgd = {"weight": {"warmup": [0, 0.01, "0.5"]}, "until": "3 steps"}
    blocks = {"student": {"model": "test_efficientnet"}, "baseline": "train", "methods": {"mgd": mgd}}
    run = recipe(folder / "run", DISTILLED, blocks, {"teacher": teacher})
    train_recipe(run)
    record = RunRecord.read(folder / "run")
    write_card(record)
    return record


def test_front_matter_is_complete_and_survives_the_round_trip(trained):
    data = ModelCard.load(trained.student / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "apache-2.0")
    assert data.tags == ["image-classification", "knowledge-distillation", "kd_hf", "kd", "mgd"]
    assert (data.model_name, data.metrics) == ("run", ["accuracy"])
    assert "datasets" not in data.to_dict() and "base_model" not in data.to_dict()  # nothing of it is on the Hub
    results = {result.metric_name: result for result in data.eval_results}
    assert results["top-1 accuracy"].metric_value == pytest.approx(trained.last("eval_top1") / 100, abs=1e-6)
    assert results["top-5 accuracy"].metric_type == "accuracy"
    assert {(result.task_type, result.dataset_type) for result in results.values()} == {
        ("image-classification", "digits")
    }
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()
    assert not (trained.student / ".eval_results").exists()


def test_front_matter_names_teachers_methods_and_recipe(trained):
    found = yaml.safe_load(ModelCard.load(trained.student / "README.md").data.to_yaml())["distillation"]
    teacher = RunRecord.read(trained.recipe.teacher.model)
    assert found["teachers"] == [{"name": "teacher", "model": "test_resnet", "recipe": recipe_hash(teacher.recipe)}]
    assert found["methods"] == {"task": 1.0, "kd": 0.5, "mgd": "0 → 0.01 over 0.5 of the run, linear"}
    assert found["recipe"] == recipe_hash(trained.recipe)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_programs_classify_an_image_as_printed(trained, tmp_path, monkeypatch):
    content, _ = DigitsSource("eval").read(0)
    (tmp_path / "image.jpg").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", model_card(trained), re.DOTALL)
    assert ["timm.create_model" in program for program in programs] == [True, False]
    said = []
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, {})
        said.append(out.getvalue().split())
    network = timm.create_model(f"local-dir:{trained.student}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad(), Image.open(io.BytesIO(content)) as image:
        probabilities = network(transform(image)[None]).softmax(-1)[0]
    assert said == [[str(probabilities.argmax().item()), f"{probabilities.max():.3f}"]] * 2


def test_a_published_card_loads_the_published_student(trained, tmp_path):
    written(tmp_path / "own", names=[str(digit) for digit in range(10)], student="kd_hf/resnet18_cifar")
    write_card(trained, "org/digits")
    write_card(RunRecord.read(tmp_path / "own"), "org/own")
    Image.new("RGB", (40, 50), (200, 10, 90)).save(tmp_path / "image.jpg")
    folders = [str(trained.student), "org/digits", str(tmp_path / "own" / "student"), "org/own"]
    with serve(tmp_path / "hub", {"hf_token": User("member", orgs=("org",))}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUBLISHED, *folders],
            env=environment() | hub.environment(tmp_path / "home", "hf_token"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")[:-1]
    assert said[0::2] == ["timm", "timm", "transformers"]
    assert said[1] == said[3]  # both libraries see the same class, with the same probability
    assert all(re.fullmatch(r"\d 0\.\d{3}", answer) for answer in said[1::2])
    write_card(trained)


def test_results_are_those_of_the_log(trained):
    rows = {row[0]: row for row in cells(sections(model_card(trained))["Results"])}
    head = dict(zip(rows[""], range(20), strict=False))
    metrics, plain = trained.metrics(), trained.plain.metrics()
    assert rows["this model"][head["top-1 %"]] == f"{metrics['top1']:.2f}"
    assert rows["this model"][head["agreement %"]] == f"{metrics['agreement']:.2f}"
    assert rows["plain student"][head["top-5 %"]] == f"{plain['top5']:.2f}"
    assert rows["teacher"][head["top-1 %"]] == f"{metrics['teacher_top1']:.2f}"
    assert rows["teacher"][head["parameters"]] == f"{trained.networks['teacher'].parameters:,}"
    assert rows["teacher"][head["network"]] == "test_resnet"
    for name, network in (("this model", "student"), ("teacher", "teacher")):
        assert rows[name][head["GMACs"]] == f"{trained.macs(network) / 1e9:.3g}"
    assert f"{metrics['top1'] - plain['top1']:+.2f} points" in sections(model_card(trained))["Results"]
    assert "64 images" in sections(model_card(trained))["Results"]


def test_whatever_was_measured_is_in_the_table(tmp_path):
    measured = {"eval_top1": 71.234, "eval_nll": 1.23456, "eval_new_number": 0.5, "eval_samples": 100.0}
    others = {"eval_raw_top1": 70.0, "eval_teacher_top1": 80.0, "eval_teacher_nll": 0.9}
    start = start_line(macs={"student": 1_234_000_000})
    lines = [start, measured | others | {"eval_ece": None, "train_seconds": 7200.0}]
    record = written(tmp_path, DISTILLED, {"baseline": 70.5}, lines=lines)
    rows = cells(sections(model_card(record))["Results"])
    assert rows[0] == ["", "network", "top-1 %", "NLL", "new number", "parameters", "GMACs"]
    assert rows[2:] == [
        ["this model", "test_vit", "71.23", "1.235", "0.5", "371,234", "1.23"],
        ["its weights without averaging", "test_vit", "70.00", "–", "–", "371,234", "1.23"],
        ["plain student, as given", "test_vit", "70.50", "–", "–", "371,234", "1.23"],
        ["teacher", "test_resnet", "80.00", "0.9", "–", "1,234,567", ""],
    ]
    assert ModelCard(model_card(record)).data.eval_results[1].metric_value == 1.23456
    assert ["time", "2.0 h"] in cells(sections(model_card(record))["Training"])


def test_the_numbers_are_of_the_exported_weights(tmp_path):
    lines = [start_line()] + [{"step": step, "eval_top1": top1} for step, top1 in ((2, 50.0), (3, 60.0), (4, 55.0))]
    for best, top1 in ((False, "55.00"), (True, "60.00")):
        record = written(tmp_path / str(best), {"train": {"load_best_model_at_end": best}}, lines=lines)
        found = sections(model_card(record))
        assert cells(found["Results"])[2][2] == top1
        assert ("of step 3, best by eval" in found["Training"]) is best


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"eval_agreement": 90.0, "eval_samples": 64.0}, "the accuracy of the student is not known"),
        ({"loss": 1.0}, "Nothing was measured"),
    ],
)
def test_without_labels_there_is_no_accuracy(tmp_path, line, said):
    record = written(tmp_path, DISTILLED, lines=[start_line(), line])
    text = model_card(record)
    assert said in sections(text)["Results"]
    data = ModelCard(text).data
    assert data.metrics is None and not any(r.metric_type == "accuracy" for r in data.eval_results or ())
    assert data.model_name == tmp_path.name


def test_what_came_from_the_hub_is_named_with_its_commit(tmp_path):
    where = "ILSVRC/imagenet-1k"
    start = start_line(
        data={"train": f"{where}, split train (9 images, 3 classes)", "eval": f"{where}, split validation"}
    )
    start["data_revision"] = {"train": COMMIT, "eval": COMMIT[::-1]}
    for facts in start["models"].values():
        facts["revision"] = COMMIT
    blocks = {
        "student": {"model": "resnet18", "pretrained": True},
        "teachers": {"big": {"model": "timm/convnext_small.fb_in22k_ft_in1k"}, "hf": {"model": "google/vit-base"}},
        "data": {"path": where, "revision": "refs/convert/parquet"},
        "eval": {"max_samples": None},
        "hub": {"tags": ["kd", "vision"]},
    }
    start["models"] |= dict.fromkeys(("big", "hf"), start["models"]["teacher"])
    record = written(tmp_path, blocks, lines=[start, {"eval_top1": 80.0, "eval_samples": 50000.0}])
    write_card(record)
    data = ModelCard.load(tmp_path / "student" / "README.md").data
    assert data.base_model == ["timm/resnet18.a1_in1k", "timm/convnext_small.fb_in22k_ft_in1k", "google/vit-base"]
    assert data.datasets == [where]
    assert data.tags[-3:] == ["kd_hf", "kd", "vision"]
    assert [teacher["revision"] for teacher in data.distillation["teachers"]] == [COMMIT] * 2
    assert (data.eval_results[0].dataset_type, data.eval_results[0].dataset_revision) == (where, COMMIT[::-1])
    assert data.distillation["data_revision"] == COMMIT
    rows = dict(row for row in cells(sections(model_card(record))["Training"]) if len(row) == 2)
    address = f"https://huggingface.co/datasets/{where}/tree/{COMMIT}"
    assert rows["data revision"] == f"[{COMMIT}]({address}), as `refs/convert/parquet"
    assert f"https://huggingface.co/google/vit-base/tree/{COMMIT}" in sections(model_card(record))["Lineage"]
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((tmp_path / "student" / ".eval_results" / "imagenet-1k.yaml").read_text())
    )
    assert (entry.dataset_id, entry.task_id, entry.value) == (where, "default", 80.0)
    assert entry.dataset_revision == COMMIT[::-1] and "50000 images" in entry.notes
    written(tmp_path, blocks, {"eval": {"max_samples": 64}}, lines=[start, {"eval_top1": 80.0}])
    write_card(RunRecord.read(tmp_path))
    assert not (tmp_path / "student" / ".eval_results").exists()  # a part of the split is no result of the benchmark


def test_folders_are_not_taken_for_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "birds").mkdir(parents=True)
    data = {"path": "photos/birds"}
    start = start_line(data={"train": "photos/birds, split train (9 images, 3 classes)"})
    record = written(tmp_path / "run", DISTILLED, {"data": data}, {"teacher": {"model": "runs/gone"}}, lines=[start])
    found = ModelCard(model_card(record)).data
    assert found.datasets is None and found.base_model is None


def test_a_teacher_that_was_pushed_is_a_base_model(tmp_path):
    written(tmp_path / "teacher", {"hub": {"push_to_hub": True, "hub_model_id": "org/teacher"}})
    record = written(tmp_path / "run", DISTILLED, {"teacher": {"model": str(tmp_path / "teacher")}})
    assert ModelCard(model_card(record)).data.base_model == ["org/teacher"]


def test_user_text_breaks_nothing(tmp_path):
    names = ["a|b", "`tick`", "</details>", "---", "*no* [x](y)", "naïve: #1", "\n---\ntwo lines", "<script>"]
    blocks = {
        "teachers": {"the | big `one`": {"model": "test_resnet"}},
        "hub": {"license": "other: # x\n---\n", "tags": ["a: b", "---", "[x"]},
        "train": {"output_dir": str(tmp_path / "```\n# run | <b>"), "metric_for_best_model": "`x`"},
        "data": {"path": "/home/me/ph|o`tos`"},
    }
    start = start_line(data={"train": "/home/me/ph|o`tos`/train (9 images)", "eval": "/home/me/ph|o`tos`/val"})
    record = written(tmp_path / "run", blocks, lines=[start, {"eval_top1": 50.0, "eval_samples": 9.0}], names=names)
    text = model_card(record)
    data = ModelCard(text).data
    assert data.license == blocks["hub"]["license"] and data.tags[-3:] == blocks["hub"]["tags"]
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    kinds = [token.type for token in tokens]
    assert [token.content for token in tokens if token.type == "html_block"] == [
        f"<details><summary>{RESOLVED}</summary>\n",
        "</details>\n",
    ]
    assert kinds.count("table_open") == 4 and kinds.count("hr") == 0 and kinds.count("heading_open") == 7
    spans = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert {" ".join(name.split()) for name in names} <= set(spans)
    recipe_text = next(token.content for token in tokens if token.info == "yaml")
    assert yaml.safe_load(recipe_text) == yaml.safe_load(dump_recipe(record.recipe))
    assert "/home/me" not in text.partition("<details>")[0]  # a folder of somebody's machine is no news


def test_lineage_links_the_papers(trained):
    lineage = sections(model_card(trained))["Lineage"]
    assert "[Masked Generative Distillation](https://arxiv.org/abs/2205.01529)" in lineage
    rows = {row[0]: row for row in cells(lineage)}
    assert rows["mgd"][1] == "0 → 0.01 over 0.5 of the run, linear, until 3 steps"
    assert rows["kd"][3] == "temperature: 4.0" and rows["task"][1] == "1"
    assert rows["teacher"][2].startswith("trained by kd_hf, recipe")


def test_training_tells_procedure_and_cost(trained):
    rows = {row[0]: row[1] for row in cells(sections(model_card(trained))["Training"])}
    assert rows["data"] == "builtin:digits (train, 1078 images, 10 classes)"
    assert rows["preprocessing"].startswith("32 × 32 pixels, the central 0.95 of the image, bicubic")
    assert rows["length"].startswith("4 steps") and rows["images seen"] == "32"
    assert rows["machine"] == "1 × cpu" and rows["precision"] == "float32"
    assert rows["optimiser"] == "adamw, learning rate 0.001 (cosine), weight decay 0"
    assert rows["augmentation"] == "crop.kind pad, hflip 0.5"


def test_pictures_go_along_and_the_card_is_safe_to_write_again(tmp_path):
    record = written(tmp_path, DISTILLED)
    record.report.mkdir()
    for name in ("losses", "accuracy", "disagreements", "another_one"):
        Image.new("RGB", (2, 2)).save(record.report / f"{name}.png")
    write_card(record)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in record.student.rglob("*") if path.is_file()}
    write_card(record)
    again = {path.relative_to(tmp_path): path.read_bytes() for path in record.student.rglob("*") if path.is_file()}
    assert before == again
    text = (record.student / "README.md").read_text()
    shown = re.findall(r"\n(.+):\n\n!\[.+\]\(report/(.*)\.png\)", text)
    assert [name for _, name in shown] == ["accuracy", "losses", "another_one"]
    assert shown[0][0] == "Top-1 on held-out images over training steps" and shown[2][0] == "Another one"
    # images of the data stay at home
    assert {path.stem for path in (record.student / "report").iterdir()} == {"accuracy", "losses", "another_one"}
    for path in record.report.iterdir():
        path.unlink()
    write_card(record)
    assert not (record.student / "report").exists() and "![" not in (record.student / "README.md").read_text()
    assert load_model(str(record.student), pretrained=True).label_names == ("zero", "one", "two")


def test_a_plain_run_is_not_called_distilled(tmp_path):
    record = written(tmp_path, names=())
    text = model_card(record)
    assert "distil" not in text.partition("<details>")[0].replace("distillation:", "")
    assert "print(index," in text  # no class names to print
    uskd = written(tmp_path / "self", {"methods": {"uskd": {}}})
    assert ModelCard(model_card(uskd)).data.tags[1] == "knowledge-distillation"


def test_a_layout_of_another_kind_shows_its_own_lines(tmp_path, monkeypatch):
    record = written(tmp_path)
    monkeypatch.setattr(
        "kd_hf.hub.artefact.load_lines", lambda student: ["model = build()", f'load(model, "{student}")']
    )
    (record.student / "config.json").write_text("{}")
    text = model_card(record, "org/name")
    assert '```python\nmodel = build()\nload(model, "org/name")\n```' in text
    assert ModelCard(text).data.library_name == "pytorch"


def test_there_is_no_card_before_there_is_a_student(tmp_path):
    (tmp_path / RESOLVED).write_text(dump_recipe(recipe(tmp_path)))
    for write in (model_card, write_card):
        with pytest.raises(UserError, match="holds no student yet"):
            write(RunRecord.read(tmp_path))
    assert not (tmp_path / "student").exists()


def test_long_lists_of_classes_are_cut(tmp_path):
    text = model_card(written(tmp_path, names=[f"class {index}" for index in range(30)]))
    assert "`class 19`, … (30 in all, in `config.json`)" in text and "class 20`" not in text
