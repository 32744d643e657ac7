"""Label maps and protocols on small drawn folders, seen through a network that says what is written in the image."""

from __future__ import annotations

from importlib.resources import files

import datasets
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from kd_hf.data.opening import open_source
from kd_hf.data.source import Source
from kd_hf.errors import UserError
from kd_hf.eval.benchmarks import BENCHMARKS, EvalSet, match_classes, open_eval_set, real_answers
from kd_hf.info import ModelInfo, Preprocessing
from kd_hf.metrics.measure import Subject, measure
from kd_hf.metrics.meters import Accuracy, Calibration
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import DataConfig

SYNSETS = ImageNetInfo().label_names()
VIEW = Preprocessing(8, mean=(0.0,) * 3, std=(1 / 255,) * 3, interpolation="nearest", crop_pct=1.0)
NETWORK = ModelInfo("reader", "torch", 1000, VIEW)


def draw(path, first, second=0):
    """An image that tells the network its first and second choice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digits = [first // 100, first % 100, second // 100, second % 100]
    image = Image.new("RGB", (8, 8), (digits[0], digits[1], 0))
    image.paste((digits[2], digits[3], 0), (0, 4, 8, 8))
    image.save(path.with_suffix(".png"))


def reader(pixels):
    """Logits ``[B, 1000]`` of the choices that are written in the images."""
    top, bottom = (pixels[:, :, row, 0].round().long() for row in (0, 7))
    logits = torch.zeros(len(pixels), 1000)
    logits[torch.arange(len(pixels)), bottom[:, 0] * 100 + bottom[:, 1]] = 5.0
    logits[torch.arange(len(pixels)), top[:, 0] * 100 + top[:, 1]] = 9.0
    return Outputs(logits)


def evaluate(path, info=NETWORK, names=(), run=reader):
    data = open_eval_set(DataConfig(path=str(path)))
    meters = [Accuracy(torch.device("cpu"))] + ([Calibration(torch.device("cpu"))] if data.answers is None else [])
    subject = Subject(run, VIEW, meters, match_classes(info, names, data))
    accelerator = Accelerator(cpu=True)
    return measure({"reader": subject}, data.source, accelerator, batch_size=3, answers=data.answers)["reader"]


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_choice_is_among_the_200_classes(tmp_path, name):
    """The first choice of the unrestricted network lies outside them, the best inside decides."""
    inside = (files("timm.data") / "_info" / f"{name.replace('-', '_')}_indices.txt").read_text().split()
    inside = [int(index) for index in inside]
    outside = next(index for index in range(1000) if index not in inside)
    for index in (inside[0], inside[50], inside[199]):
        draw(tmp_path / "set" / SYNSETS[index] / "outside", outside, index)
        draw(tmp_path / "set" / SYNSETS[index] / "right", index)
        draw(tmp_path / "set" / SYNSETS[index] / "wrong", inside[7], index)
    values = evaluate(f"{name}={tmp_path / 'set'}")
    assert (values["samples"], values["top1"], values["top5"]) == (9, pytest.approx(200 / 3), 100.0)
    # named by their numbers among the 200 classes, as the copies on the Hub are
    for index in (0, 50, 199):
        draw(tmp_path / "numbers" / str(index) / "outside", outside, inside[index])
    assert evaluate(f"{name}={tmp_path / 'numbers'}")["top1"] == 100.0


def test_a_class_that_is_not_of_the_set(tmp_path):
    draw(tmp_path / SYNSETS[0] / "a", 0)
    with pytest.raises(UserError, match="'n01440764' is not one of the 200 classes of imagenet-a"):
        evaluate(f"imagenet-a={tmp_path}")


def test_folders_of_v2_are_numbers_not_strings(tmp_path):
    for index in (0, 2, 10, 100, 999):  # as strings: 0, 10, 100, 2, 999
        draw(tmp_path / "imagenetv2-matched-frequency-format-val" / str(index) / "a", index)
    assert evaluate(f"imagenet-v2={tmp_path}")["top1"] == 100.0
    draw(tmp_path / "imagenetv2-matched-frequency-format-val" / "1000" / "a", 0)
    with pytest.raises(UserError, match="has the classes 0 to 999, and the data has 1000"):
        evaluate(f"imagenet-v2={tmp_path}")


def test_neighbouring_folders_are_other_sets(tmp_path):
    draw(tmp_path / "sketch" / SYNSETS[3] / "a", 3)
    draw(tmp_path / "train" / SYNSETS[4] / "a", 4)
    (tmp_path / "sketch.tar").touch()
    assert evaluate(f"imagenet-sketch={tmp_path / 'sketch'}")["top1"] == 100.0


def validation_files(folder):
    """Validation images, by number: with several labels, with one, with none; as timm counts them."""
    chosen = {2: 970, 3: 231, 4: 5, 1: 0, 5: 850, 6: 57}
    for number, choice in chosen.items():
        draw(folder / "val" / SYNSETS[number % 3] / f"ILSVRC2012_val_{number:08d}", choice, 516)
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(50000)]
    counter = RealLabelsImagenet(names)
    for number, choice in chosen.items():
        counter.sample_idx = number - 1
        ranked = torch.zeros(1, 1000).index_fill(1, torch.tensor([choice]), 2.0)
        counter.add_result(ranked.index_fill(1, torch.tensor([516]), 1.0))
    return counter.get_accuracy()


def test_reassessed_labels_as_timm_counts_them(tmp_path):
    expected = validation_files(tmp_path)
    values = evaluate(f"imagenet-real={tmp_path}")
    assert values["samples"] == 5  # one of the six has no label
    assert (values["top1"], values["top5"]) == (pytest.approx(expected[1]), pytest.approx(expected[5]))
    assert "nll" not in values


@pytest.mark.parametrize("streaming", [False, True])
def test_reassessed_labels_by_the_names_in_parquet_files(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = validation_files(tmp_path)
    paths = sorted((tmp_path / "val").rglob("*.png"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=SYNSETS)})

    def write(folder, images):
        folder.mkdir()
        columns = {"image": images, "label": [SYNSETS.index(path.parent.name) for path in paths]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "validation.parquet")
        return open_eval_set(DataConfig(path=f"imagenet-real={folder}", streaming=streaming))

    data = write(tmp_path / "named", [{"bytes": path.read_bytes(), "path": path.name} for path in paths])
    subject = Subject(reader, VIEW, [Accuracy(torch.device("cpu"))], match_classes(NETWORK, (), data))
    values = measure({"a": subject}, data.source, Accelerator(cpu=True), batch_size=4, answers=data.answers)["a"]
    assert (values["top1"], values["samples"]) == (pytest.approx(expected[1]), 5)
    with pytest.raises(UserError, match=r"goes by the file names ILSVRC2012_val_00000001\.JPEG.* row 0 is ''"):
        write(tmp_path / "unnamed", [{"bytes": path.read_bytes(), "path": None} for path in paths])


def test_reassessed_labels_need_the_file_names():
    assert real_answers(["x/ILSVRC2012_val_00000002_n01440764.JPEG"], "here")[0, :3].tolist() == [970, 795, -1]
    for odd in ("ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG", "1.jpg"):
        with pytest.raises(UserError, match=f"of here row 1 is '{odd}'"):
            real_answers(["ILSVRC2012_val_00000002.JPEG", odd], "here")
    with pytest.raises(UserError, match="of here they have none"):
        real_answers([], "here")


class Named(Source):
    """A set of classes without images."""

    group_sizes = (0,)

    def __init__(self, *names):
        self.class_names = names

    def read(self, row):
        raise OSError

    def labels(self):
        raise OSError

    def describe(self):
        return "the set"


def matched(info, names, *classes, indices=False):
    found = match_classes(info, names, EvalSet("set", Named(*classes)), indices)
    return [part if part is None else part.tolist() for part in (found.label, found.choices)]


def test_classes_are_matched_by_name_where_they_are_known():
    three, four = ModelInfo("m", "timm", 3, VIEW), ModelInfo("m", "timm", 4, VIEW)
    assert matched(three, ("cat", "dog", "fox"), "Cat", "dog", "fox") == [None, None]
    assert matched(three, ("cat", "dog", "fox"), "fox", "cat", "dog") == [None, [2, 0, 1]]  # in the data's order
    assert matched(four, ("ant", "cat", "dog", "fox"), "fox", "cat") == [[3, 1], None]  # among all four
    assert matched(three, (), "a", "b", "c") == [None, None]
    assert matched(three, ("x", "y", "z"), "a", "b", "c") == [None, None]
    with pytest.raises(UserError, match=r"m has 4 classes, the set has 2$"):
        matched(four, ("ant", "cat", "dog", "fox"), "fox", "wolf")


def test_synset_folders_and_a_network_that_knows_the_words():
    words = ImageNetInfo().label_descriptions()
    assert matched(NETWORK, words, "n02979186", SYNSETS[0]) == [[482, 0], None]
    assert matched(NETWORK, (), "n02979186") == [[482], None]
    with pytest.raises(UserError, match="1000 classes"):
        matched(NETWORK, sorted(words), "n02979186")  # 1000 classes in another order


def test_numbers_are_indices_only_when_asked():
    numbers = [str(index) for index in range(702)]
    with pytest.raises(UserError, match=r"the set has 702; if these are indices .* add --label-indices"):
        matched(NETWORK, SYNSETS, *numbers)
    assert matched(NETWORK, SYNSETS, *numbers, indices=True) == [list(range(702)), None]
    assert matched(NETWORK, SYNSETS, "0", "10", "9", indices=True) == [[0, 10, 9], None]


def test_larger_networks_choose_among_the_set_only():
    """Networks of 21,842 classes, with those of ImageNet among them by their synset ids."""
    large = ImageNetInfo("imagenet-22k-ms").label_names()
    data = EvalSet("imagenet-1k", Named(*ImageNetInfo().label_descriptions()), tuple(SYNSETS))
    found = match_classes(ModelInfo("m", "timm", len(large), VIEW), large, data)
    assert [large[index] for index in found.choices.tolist()] == SYNSETS
    assert found.label.tolist() == list(range(1000))
    with pytest.raises(UserError, match="imagenet-1k needs a network that knows ImageNet's classes; m has 10 others"):
        match_classes(ModelInfo("m", "timm", 10, VIEW), (), data)
    shuffled = EvalSet("imagenet-1k", Named(*sorted(ImageNetInfo().label_descriptions())), tuple(SYNSETS))
    with pytest.raises(UserError, match="cannot tell which classes of imagenet-1k"):
        match_classes(NETWORK, (), shuffled)


def test_what_is_not_there(tmp_path):
    for path, message in (
        ("imagenet-b=/x", r"no benchmark 'imagenet-b' in 'imagenet-b=/x'\. Did you mean 'imagenet-"),
        (f"imagenet-a={tmp_path / 'nowhere'}", "the folder '.*nowhere' does not exist"),
        (f"imagenet-a={tmp_path}", r"has no class folders; expected .*/n01440764/<image>\.JPEG"),
    ):
        with pytest.raises(UserError, match=message):
            open_eval_set(DataConfig(path=path))


def test_a_folder_with_the_name_of_a_benchmark(tmp_path, monkeypatch):
    draw(tmp_path / "imagenet-r" / "n01443537" / "a", 1)
    monkeypatch.chdir(tmp_path)
    assert evaluate("imagenet-r")["top1"] == 100.0


def test_benchmarks_from_the_hub(monkeypatch):
    """What is asked of the Hub: these repositories, these splits, the large one as a stream."""
    asked = {}

    def opened(cfg, split):
        asked[cfg.path, cfg.eval_split] = cfg.streaming
        return Named(*SYNSETS)

    monkeypatch.setattr("kd_hf.eval.benchmarks.open_source", opened)
    for name in BENCHMARKS.keys() - {"imagenet-real"}:
        assert open_eval_set(DataConfig(path=name)).name == name
    assert asked == {
        ("ILSVRC/imagenet-1k", "validation"): True,
        ("clip-benchmark/wds_imagenetv2", "test"): False,
        ("clip-benchmark/wds_imagenet-a", "test"): False,
        ("clip-benchmark/wds_imagenet-r", "test"): False,
        ("clip-benchmark/wds_imagenet_sketch", "test"): False,
    }
    with pytest.raises(UserError, match="they have none"):  # a source that does not tell file names
        open_eval_set(DataConfig(path="imagenet-real"))


def test_other_data_is_opened_as_in_a_recipe():
    data = open_eval_set(DataConfig(path="builtin:digits"))
    assert data.source.describe() == open_source(DataConfig(path="builtin:digits"), "eval").describe()
    assert (data.synsets, data.answers) == ((), None)
