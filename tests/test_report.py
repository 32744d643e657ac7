import subprocess
import sys

import pytest
from PIL import Image

from kd_hf.artefact import save_student
from kd_hf.callbacks import JsonLines
from kd_hf.models.load import load_model
from kd_hf.report import finish_report, load_lines, table
from tests.runs import RECIPE, TEACHER, environment, merged, recipe


def write_log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    log = JsonLines(folder, 0)
    for line in lines:
        log.write(line)


def run_lines(top1, seconds=12.3, **more):
    """What a run writes: its networks, losses, evaluations."""
    models = {
        "student": {"name": "test_vit", "parameters": 371234},
        "teacher": {"name": "test_resnet", "parameters": 1234567},
    }
    return (
        {"step": 0, "models": models},
        {"step": 1, "loss": 2.0, "task/ce": 1.5, "kd/soft": 0.5, "weight/kd": 1.0},
        {"step": 2, "loss": None, "task/ce": 1.0, "kd/soft": 0.25, "weight/kd": 1.0},
        {"step": 2, "eval_top1": top1 - 10, "train_seconds": 5.0},
        {"step": 4, "eval_top1": top1, "train_seconds": seconds, **more},
    )


def test_table_is_aligned():
    lines = table([("", "name", "number"), ("a", "long name", "1.5"), ("bbb", "x", "100.25")])
    assert lines == [
        "     name       number",
        "---  ---------  ------",
        "a    long name     1.5",
        "bbb  x          100.25",
    ]


def test_distilled_student_beside_its_teacher(tmp_path):
    write_log(tmp_path, *run_lines(71.234, eval_teacher_top1=80.5))
    text = finish_report(recipe(tmp_path, {"teacher": TEACHER, "baseline": 66.6}))
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert rows["teacher"][1:] == ["test_resnet", "80.50", "1,234,567"]
    assert rows["plain student"][-1] == "66.60"
    assert rows["distilled student"][2:] == ["test_vit", "71.23", "371,234", "12"]
    assert "load it with" not in text  # there is no student yet


def test_twin_and_trained_teacher_are_read_from_their_own_runs(tmp_path):
    import yaml

    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(merged(RECIPE, {"train": {"output_dir": str(tmp_path / "teacher")}})))
    write_log(
        tmp_path / "teacher",
        {"step": 0, "models": {"student": {"name": "big_net", "parameters": 9}}},
        {"step": 1, "train_seconds": 77},
    )
    write_log(tmp_path / "run", *run_lines(71.0, eval_teacher_top1=80.5))
    write_log(tmp_path / "run" / "plain", *run_lines(60.0, seconds=3.0))
    text = finish_report(recipe(tmp_path / "run", {"teacher": {"recipe": str(path)}, "baseline": "train"}))
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert rows["teacher"][1:3] == ["big_net", "80.50"]
    assert rows["teacher"][-1] == "77"
    assert rows["plain student"][2:] == ["test_vit", "60.00", "371,234", "3"]


def test_without_a_teacher_nothing_is_called_distilled(tmp_path):
    write_log(tmp_path, *run_lines(71.0))
    text = finish_report(recipe(tmp_path, {"data": {"num_labels": 50}}))
    assert "distilled" not in text
    assert "Labels of 50 training images were used." in text


@pytest.mark.parametrize(("unlabelled", "also"), [("keep", True), ("drop", False)])
def test_few_labels_are_explained(tmp_path, unlabelled, also):
    write_log(tmp_path, *run_lines(71.0))
    text = finish_report(recipe(tmp_path, {"teacher": TEACHER, "data": {"num_labels": 50, "unlabelled": unlabelled}}))
    assert ("teacher's outputs on the others" in text) is also


def test_curve_is_a_picture(tmp_path):
    write_log(tmp_path, *run_lines(71.0, eval_teacher_top1=80.5))
    finish_report(recipe(tmp_path, {"teacher": TEACHER}))
    with Image.open(tmp_path / "report" / "curve.png") as picture:
        assert picture.size == (1200, 456)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_run_that_measured_nothing_is_still_reported(tmp_path):
    write_log(tmp_path, {"step": 0, "models": {"student": {"name": "test_vit", "parameters": 5}}})
    text = finish_report(recipe(tmp_path))
    assert "student" in text
    assert (tmp_path / "report" / "curve.png").is_file()


def test_the_lines_that_are_shown_load_the_student(tmp_path):
    handle = load_model("test_vit", num_classes=3, image_size=32)
    save_student(handle, tmp_path / "student")
    text = finish_report(recipe(tmp_path))
    lines = load_lines(tmp_path / "student")
    assert len(lines) == 2 and all(f"  {line}" in text.splitlines() for line in lines)
    code = ["import timm, torch, transformers", "x = torch.ones(1, 3, 32, 32)"]
    code += [line for shown in lines for line in (shown, "y = model.eval()(x)")]
    code += ["print(y.logits.shape)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "torch.Size([1, 3])\n"
