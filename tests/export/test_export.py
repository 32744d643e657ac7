import json
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import onnxruntime
import pytest
import timm
import torch

from kd_hf.errors import UserError, run_command
from kd_hf.export import model as export
from kd_hf.export.__main__ import main
from kd_hf.export.model import FORMATS, export_model
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from tests.models.families import HF_VIT, SWIN, VIT

NAMES = ("ant", "bee", "cat", "dog", "né")
SHALLOW = {**VIT, "depth": 1}
STUDENTS = {
    "resnet": ("test_resnet", {}, 32),
    "distilled": ("deit_tiny_distilled_patch16_224", SHALLOW, 32),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "depths": (2,), "num_heads": (1,)}, 32),
    "beit": ("beit_base_patch16_224", SHALLOW, 32),  # masked attention
    "eva": ("eva02_tiny_patch14_224", SHALLOW, 28),  # the optimiser logs about it
    "hf-vit": ("transformers/vit", {**HF_VIT, "num_hidden_layers": 1}, 32),
    "civt": ("kd_hf/conv_stem_deit_tiny", SHALLOW, 32),  # asks for len(x)
}
TRACED = ("distilled", "swin", "hf-vit", "civt")


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """A folder of model folders, made when they are asked for."""
    root = tmp_path_factory.mktemp("students")

    def get(key):
        model, kwargs, size = STUDENTS[key]
        if not (root / key).exists():
            torch.manual_seed(0)
            handle = load_model(model, num_classes=5, image_size=size, kwargs=kwargs)
            handle.label_names = NAMES
            with torch.no_grad():  # statistics and classifiers that are not their initial values
                for tensor in handle.network.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.mul_(torch.rand_like(tensor) * 0.5 + 1).add_(torch.randn_like(tensor) * 0.02)
                    elif tensor.ndim == 0:
                        tensor.fill_(3)
                for name, tensor in handle.network.state_dict().items():
                    if name.endswith("running_var"):
                        tensor.abs_()
            save_student(handle, root / key)
        return root / key

    return get


@contextmanager
def silent(capfd):
    """No warning, and nothing on the screen but transformers' bar while it reads weights."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    out, err = capfd.readouterr()
    assert not caught and not out
    assert not [line for line in err.splitlines() if line.strip() and not line.startswith("Loading weights: ")]


def logits_of(folder, pixels):
    with torch.no_grad():
        output = load_model(str(folder), pretrained=True).network(pixels)
    return getattr(output, "logits", output)


def batches(side):
    return [torch.randn(count, 3, side, side) for count in (1, 3, 4)]


@pytest.mark.parametrize("key", STUDENTS)
def test_onnx_in_onnxruntime(students, tmp_path, capfd, key):
    folder, side = students(key), STUDENTS[key][2]
    with silent(capfd):
        done = export_model(str(folder), "onnx", tmp_path / "x.onnx")
    assert set(done.differences) == {1, 2, 5} and max(done.differences.values()) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, side, side] and session.get_outputs()[0].shape == ["batch", 5]
    for pixels in batches(side):
        expected = logits_of(folder, pixels)
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()
    facts = json.loads(session.get_modelmeta().custom_metadata_map["model.json"])
    assert facts["label_names"] == list(NAMES) and facts["preprocessing"]["image_size"] == side


@pytest.mark.parametrize("key", TRACED)
def test_torch_export(students, tmp_path, capfd, key):
    folder, side = students(key), STUDENTS[key][2]
    with silent(capfd):
        export_model(str(folder), "torch-export", tmp_path / "x.pt2")
    files = {"model.json": ""}
    network = torch.export.load(tmp_path / "x.pt2", extra_files=files).module()
    for pixels in batches(side):
        assert torch.equal(network(pixels), logits_of(folder, pixels))
    facts = json.loads(files["model.json"])
    handle = load_model(str(folder), pretrained=True)
    assert facts["preprocessing"]["mean"] == list(handle.info.preprocessing.mean)
    assert facts["input"]["shape"] == ["batch", 3, side, side] and facts["architecture"] == handle.origin.architecture


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_says_how_to_run_the_file(students, tmp_path, monkeypatch, capsys, format):
    """A run folder, another image size, and the printed lines."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/student").symlink_to(students("resnet"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "run", "--format", format, "--image-size", "40"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    path = f"run/model{FORMATS[format].suffix}"
    assert lines[0].startswith(f"{path}: ") and "pixels [batch, 3, 40, 40] float32 → logits [batch, 5]" in lines[0]
    assert "at batch sizes 1, 2, 5" in lines[1]
    names = {}
    exec("\n".join(line.strip() for line in lines[-3:]), names)
    assert tuple(names["logits"].shape) == (8, 5)
    written = (tmp_path / path).read_bytes()
    assert b"site-packages" not in written and str(tmp_path).encode() not in written and b"kd_hf/" not in written
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == sorted(["student", path.split("/")[1]])


def test_the_operator_set(students, tmp_path):
    import onnx

    export_model(str(students("resnet")), "onnx", tmp_path / "x.onnx", opset=18)
    assert [(entry.domain, entry.version) for entry in onnx.load(tmp_path / "x.onnx").opset_import] == [("", 18)]


def test_other_logits_are_refused_and_leave_nothing(students, tmp_path, monkeypatch):
    target = tmp_path / "x.pt2"
    target.write_text("before")
    honest = FORMATS["torch-export"]
    mistakes = {
        "size 1 .* by [12].*e-06": lambda pixels, logits: logits * (1 + 2e-6),
        "size 5 .* by nan": lambda pixels, logits: logits / 0 * 0 if len(pixels) == 5 else logits,
    }
    for message, mistake in mistakes.items():
        broken = replace(honest, read=partial(_reading_with, honest.read, mistake))
        monkeypatch.setattr(export, "FORMATS", {"torch-export": broken})
        with pytest.raises(UserError, match=rf"x\.pt2 was not written: .*{message}"):
            export_model(str(students("resnet")), "torch-export", target)
    assert target.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["x.pt2"]


def _reading_with(read, mistake, path):
    """A file that computes something else."""
    network = read(path)
    return lambda pixels: mistake(pixels, network(pixels))


def test_a_network_that_cannot_be_followed(students, tmp_path, monkeypatch):
    monkeypatch.setattr(timm.models.resnet.ResNet, "forward", _by_value)
    with pytest.raises(UserError, match=r"torch\.export cannot follow this network: ") as caught:
        export_model(str(students("resnet")), "torch-export", tmp_path / "x.pt2")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def _by_value(self, pixels):
    return self.forward_head(self.forward_features(pixels * 2 if float(pixels.sum()) > 0 else pixels))


def test_mistakes(students, tmp_path, monkeypatch):
    model = str(students("resnet"))

    def refused(pattern, *arguments, **options):
        with pytest.raises(UserError, match=pattern) as caught:
            export_model(*arguments, **options)
        assert "\n" not in str(caught.value)

    refused("--opset: only ONNX", model, "torch-export", opset=18)
    refused(r"--opset: expected 18 to \d+ \(got 9\)", model, "onnx", opset=9)
    refused(r"-o: expected a file name that ends in .onnx", model, "onnx", tmp_path / "x.pt2")
    refused("--image-size: expected 1 or more", model, "onnx", image_size=0)
    refused("format: unknown 'onxx'. Did you mean 'onnx'", model, "onxx")
    refused("no config.json in that folder", str(tmp_path), "onnx")
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    refused("a file holds 2 GB, .*use torch-export", model, "onnx", tmp_path / "x.onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    refused(r"--format onnx needs onnxscript: pip install 'kd_hf\[export\]'", model, "onnx")
    (tmp_path / "file").write_text("")
    refused("cannot write .*File exists|Not a directory", model, "torch-export", tmp_path / "file/x.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
