"""``python -m kd_hf.eval … --boxes`` against pycocotools on the files that anybody would give it."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import pytest
import torch

from kd_hf.detection.metrics import average_precision
from kd_hf.detection.metrics.average_precision import NAMES
from kd_hf.detection.networks.load import load_detector
from kd_hf.detection.networks.processors import image_processor
from kd_hf.errors import UserError
from kd_hf.eval.__main__ import main
from kd_hf.eval.detectors import evaluate_detectors, is_detector, own_sizes
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.recipe.config import BoxAugment
from tests.detection.scenes import NAMES as COLOURS
from tests.detection.scenes import VIEW, scene, write_coco
from tests.detection.tiny import tiny_config
from tests.forked import run

ROWS = 14
SPLIT = "validation"


def save_detector(folder, labels, size=(64, 160), seed=1):
    """A random detector, spread so that it finds something else in every image."""
    torch.manual_seed(seed)
    sizes = tiny_config().to_dict()
    kwargs = {name: sizes[name] for name in ("embed_dim", "depths", "num_heads", "window_size", "num_queries")}
    kwargs |= {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 16}
    handle = load_detector("kd_hf/vidt_nano", num_classes=len(labels), kwargs=kwargs)
    with torch.no_grad():
        for parameter in handle.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for head in handle.network.bbox_embed:
            head.layers[-1].bias[2:] += 1.0
    processor = image_processor(handle, VIEW.mean, VIEW.std, *size)
    save_student(replace(handle, label_names=labels, image_processor=processor), folder)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Large objects, some of them crowds, as COCO's files, and two detectors of different sizes for their numbers."""
    folder = tmp_path_factory.mktemp("detectors")
    scenes = [scene(row, least=45) for row in range(ROWS)]
    scenes[3].iscrowd[1] = 1
    write_coco(folder / "coco", scenes, split=SPLIT)
    labels = ("N/A", "red", "green", "N/A", "blue")
    save_detector(folder / "one" / "student", labels)  # as a run folder has it
    save_detector(folder / "two", labels, size=(96, 200), seed=4)
    return folder


def by_pycocotools(truth, found):
    """The 12 numbers of a plain call on two files, in percent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO(str(truth))
        evaluation = COCOeval(annotated, annotated.loadRes(str(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: 100 * value for name, value in zip(NAMES, evaluation.stats.tolist(), strict=True) if value >= 0}


def test_the_command_gives_the_numbers_of_pycocotools(made, tmp_path):
    files = {"json": tmp_path / "values.json", "save-detections": tmp_path / "found.json"}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    data = str(made / "coco")
    done = run("kd_hf.eval", str(made / "one"), "--data", data, "--boxes", "--use-cpu", "--batch-size", "4", *options)
    assert done.returncode == 0, done.stderr
    head, _, row, *notes = done.stdout.splitlines()
    values = json.loads(files["json"].read_text())[data][str(made / "one")]
    expected = by_pycocotools(made / "coco" / "annotations" / f"instances_{SPLIT}.json", files["save-detections"])
    assert values["samples"] == ROWS and values["images_per_second"] > 0
    assert {name: values[name] for name in NAMES if name in values} == pytest.approx(expected, rel=0, abs=1e-9)
    assert expected["ap50"] > 0 and expected["ar100"] > expected["ar1"] > 0
    assert head.split()[:6] == ["data", "model", "images", "AP", "AP50", "AP75"]
    assert row.split()[2:5] == [str(ROWS), f"{expected['ap']:.2f}", f"{expected['ap50']:.2f}"]
    assert "shortest side 64 pixels, longest at most 160" in "\n".join(notes)  # the model's own


def test_several_models_and_data_sets(made, capsys):
    """Each model in its own size, by 10 of the images; a Markdown table of one data set by two names."""
    models = [str(made / "one"), str(made / "two")]
    options = ["--boxes", "--use-cpu", "--max-samples", "10", "--markdown"]
    assert main([*models, "--data", str(made / "coco"), "--data", str(made / "coco") + "/", *options]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| data | model | images | AP | AP50 | AP75 |")
    assert [line.split(" | ")[2] for line in rows[:4]] == ["10"] * 4
    numbers = [line.split(" | ")[3:-1] for line in rows[:4]]
    assert numbers[0] == numbers[2] and numbers[1] == numbers[3] and numbers[0] != numbers[1]
    assert f"- images of {models[1]}: shortest side 96 pixels, longest at most 200" in "\n".join(rows)


def test_sizes_are_those_given_or_the_networks_own(made):
    data, models = {"path": str(made / "coco")}, [str(made / "one"), str(made / "two")]
    own = evaluate_detectors(models, data, use_cpu=True)
    asked = {"eval_size": 64, "max_size": 160}
    given = evaluate_detectors(models, data | {"boxes": {"augment": asked}}, use_cpu=True)
    assert [given[name]["ar100"] == pytest.approx(own[name]["ar100"]) for name in models] == [True, False]
    handle = load_detector(models[1], pretrained=True)
    assert own_sizes(handle, BoxAugment(eval_size=320)) == BoxAugment(eval_size=320)
    assert own_sizes(handle, BoxAugment()).max_size == 200


def test_squares_of_other_processors_keep_their_shortest_side(tmp_path):
    save_detector(tmp_path, COLOURS)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 96}}))
    handle = load_detector(str(tmp_path), pretrained=True)
    own = own_sizes(handle, BoxAugment())
    assert (own.eval_size, own.max_size, own.multiple_of) == (64, 1333, 32)
    assert own_sizes(handle, BoxAugment(multiple_of=16, eval_size=80)) == BoxAugment(multiple_of=16, eval_size=80)


def test_what_does_not_fit_is_one_line(made, tmp_path, private_cache):
    save_student(load_model("test_resnet", num_classes=5), tmp_path / "classifier")
    seven = save_detector(tmp_path / "seven", tuple("abcdefg"))
    swapped = save_detector(tmp_path / "swapped", ("N/A", "green", "red", "N/A", "blue"))
    model, data = str(made / "one"), ["--data", str(made / "coco"), "--use-cpu"]
    digits = ["--data", "builtin:digits", "--use-cpu"]
    boxes = [*data, "--boxes"]
    mistakes = [
        ([str(tmp_path / "classifier"), *boxes], "classifier' is a classifier of timm, not a detector"),
        ([model, *digits], "one is a detector: add --boxes"),
        ([model, *data], "one is a detector: add --boxes"),
        ([model, *digits, "--boxes"], "^--data: 'builtin:digits' has no boxes"),
        ([seven, *boxes], r"seven does not fit .*: the network has 7 classes, the data 5"),
        ([swapped, *boxes], "'red' is number 1 in the data, which is 'green' for the network"),
        ([model, *boxes, "--split", "tests"], "^--split: .* has no split 'tests'"),
        ([model, *boxes, "--annotations", "no.json"], "^--annotations: there is no file"),
        ([model, *boxes, "--eval-size", "0"], "^--eval-size: .*greater than 0"),
        ([model, *boxes, "--max-size", "8"], "^--eval-size, --max-size: .*multiple_of"),
        ([model, *boxes, "--teacher", model], r"^--teacher is not for detectors \(--boxes\)$"),
        ([model, *data, "--eval-size", "64"], "^--eval-size needs --boxes$"),
        ([model, seven, *boxes, "--save-detections", "x"], "one model finds in one data set; here are 2 and 1"),
    ]
    for argv, wanted in mistakes:
        with pytest.raises(UserError, match=wanted):
            main(argv)


def test_data_without_boxes(made, tmp_path):
    folder = tmp_path / "photos" / "train" / "cat"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^--data: .* holds neither Parquet files nor COCO's annotations"):
        main([str(made / "one"), "--data", str(tmp_path / "photos"), "--boxes"])


def test_pycocotools_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(average_precision, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs pycocotools: pip install kd_hf\[detection\]"):
        main(["nothing", "--data", "nowhere", "--boxes"])


def test_detectors_are_told_from_classifiers(made):
    assert is_detector(str(made / "one")) and not is_detector("resnet18")
