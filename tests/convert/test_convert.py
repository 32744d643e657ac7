import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_hf.convert.__main__ import main
from kd_hf.convert.checkpoint import convert_checkpoint
from kd_hf.errors import UserError, run_command
from kd_hf.models.load import load_model
from tests.convert.official import OFFICIAL, Official, build, logits_of, official_state
from tests.models.families import VIT

ARGUMENTS = {"depth": "3", "embed_dim": "32", "num_heads": "2"}
KWARGS = ["--kwargs", *(f"{key}={value}" for key, value in ARGUMENTS.items())]
DEIT = Official("deit_tiny_patch16_224", [], VIT)
VKD = Official("kd_hf/conv_stem_deit_tiny", [], VIT)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder; returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["convert", *argv])
        with pytest.raises(SystemExit) as exit_:
            run_command(main)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out + captured.err

    return call


def complaint(command, *argv):
    code, said = command(*argv)
    assert code == 2
    assert len(said.splitlines()) == 1, said
    assert said.startswith("kd_hf: error: ")
    assert not os.path.exists("out")
    return said


def reread(folder, size):
    return logits_of(load_model(str(folder), pretrained=True).network, size)


def flat(one):
    handle = build(one)
    return handle.network.state_dict(), logits_of(handle.network, one.size)


def test_openmmlab_to_a_folder_that_timm_reads(command):
    import timm

    one = OFFICIAL["swin"]
    original = build(one)
    state = {f"student.{name}": value for name, value in official_state(one, original).items()}
    state["teacher.backbone.conv1.weight"] = torch.ones(1)
    torch.save({"meta": {}, "state_dict": state, "optimizer": {}}, "epoch_100.pth")
    with open("names.txt", "w") as file:
        file.write("ant\nbee\ncat\ndog\neel\n")
    kwargs = [f"{key}={json.dumps(value)}" for key, value in one.kwargs.items()]
    options = ["--image-size", "64", "--label-names", "names.txt", "--crop-pct", "0.875", "--kwargs", *kwargs]
    code, said = command("epoch_100.pth", "--arch", one.arch, "-o", "out", *options)
    assert code == 0
    assert "out: swin_tiny_patch4_window7_224, 5 classes, weights of the entry 'state_dict'" in said
    assert "teacher.* (1)" in said
    network = timm.create_model("local-dir:out", pretrained=True)
    assert torch.equal(logits_of(network, 64), logits_of(original.network, 64))
    handle = load_model("out", pretrained=True)
    assert handle.label_names == ("ant", "bee", "cat", "dog", "eel")
    assert (handle.info.preprocessing.image_size, handle.info.preprocessing.crop_pct) == (64, 0.875)


@pytest.mark.parametrize("key", ["convnext", "vit-gap-14", "mixer", "shufflenet-v2"])
def test_networks_with_arguments(tmp_path, key):
    """The arguments are in the folder, so it says by itself which network it holds."""
    one = OFFICIAL[key]
    original = build(one)
    torch.save(official_state(one, original), tmp_path / "x.pth")
    convert_checkpoint(tmp_path / "x.pth", one.arch, tmp_path / "out", image_size=one.size, kwargs=one.kwargs)
    assert torch.equal(reread(tmp_path / "out", one.size), logits_of(original.network, one.size))


@pytest.mark.parametrize(("key", "size"), [("shufflenet-v2", 224), ("resnet-cifar", 32)])
def test_students_of_this_package(command, key, size):
    """By the network's name alone, at its full size."""
    one = Official(OFFICIAL[key].arch, OFFICIAL[key].names, size=size)
    original = build(one)
    torch.save({"meta": {}, "state_dict": official_state(one, original)}, "epoch_200.pth")
    code, said = command("epoch_200.pth", "--arch", one.arch, "-o", "out")
    assert code == 0
    assert f"out: {one.arch}, 5 classes, weights of the entry 'state_dict'" in said
    assert load_model("out", pretrained=True).info.preprocessing.image_size == size
    logits = logits_of(original.network, size)
    assert logits.isfinite().all()
    assert torch.equal(reread("out", size), logits)


def test_deit_layout(command):
    state, logits = flat(DEIT)
    projector = {"projector.fc1.weight": torch.ones(3, 3), "projector.fc1.bias": torch.ones(3)}
    average = {name: value * 2 for name, value in state.items()}
    entries = {"model": {**state, **projector}, "model_ema": {**average, **projector}, "epoch": 299}
    torch.save({**entries, "args": argparse.Namespace(lr=1e-3)}, "deit.pth")
    options = ["--arch", DEIT.arch, "--image-size", "32", *KWARGS]
    code, said = command("deit.pth", "-o", "out", *options)
    assert code == 0
    assert "left out: projector.* (2)" in said
    assert "not run: argparse.Namespace" in said
    assert torch.equal(reread("out", 32), logits)
    assert command("deit.pth", "-o", "average", "--weights", "ema", *options)[0] == 0
    written = load_file("average/model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in average.items())


def test_vkd_layout(tmp_path):
    state, logits = flat(VKD)
    student = {f"module.{name}": value for name, value in state.items()}
    student["module.projector.parametrizations.weight.0.base"] = torch.eye(3)
    torch.save({"student": student, "student_ema": None, "lr": 5e-4}, tmp_path / "latest.pth.tar")
    convert_checkpoint(tmp_path / "latest.pth.tar", VKD.arch, tmp_path / "out", image_size=32, kwargs=VIT)
    assert torch.equal(reread(tmp_path / "out", 32), logits)


def test_images_in_opencv_order(tmp_path):
    one = OFFICIAL["regnet"]
    original = build(one)
    torch.save(official_state(one, original), tmp_path / "x.pth")
    convert_checkpoint(tmp_path / "x.pth", one.arch, tmp_path / "out", bgr=True)
    rgb = torch.randn(2, 3, 32, 32)
    network = load_model(str(tmp_path / "out"), pretrained=True).network
    with torch.no_grad():
        torch.testing.assert_close(network(rgb), original.network.eval()(rgb.flip(1)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(network(rgb), original.network(rgb), rtol=1e-2)


def test_bgr_needs_a_first_convolution(tmp_path):
    handle = load_model("resnet18", num_classes=5, kwargs={"in_chans": 1})
    torch.save(handle.network.state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="--bgr: "):
        convert_checkpoint(tmp_path / "x.pth", "resnet18", tmp_path / "out", kwargs={"in_chans": 1}, bgr=True)


def test_imagenet_names(tmp_path):
    torch.save(build(Official("test_resnet", []), 1000).network.state_dict(), tmp_path / "x.pth")
    convert_checkpoint(tmp_path / "x.pth", "test_resnet", tmp_path / "out", label_names="imagenet-1k")
    assert load_model(str(tmp_path / "out"), pretrained=True).label_names[0] == "n01440764"


def test_mistakes_end_in_one_line(command):
    state, _ = flat(DEIT)
    torch.save(state, "deit.pth")
    good = ["deit.pth", "--arch", DEIT.arch, "-o", "out", "--image-size", "32", *KWARGS]

    def swapped(place, *values):
        return [*good[:place], *values, *good[place + 1 :]]

    def said(argv):
        return complaint(command, *argv)

    assert "Did you mean 'deit.pth'?" in said(swapped(0, "diet.pth"))
    assert "Did you mean 'deit_tiny_patch16_224'?" in said(swapped(2, "deit_tiny_patch_16_224"))
    assert "3 missing: dist_token, head_dist.weight" in said(swapped(2, "deit_tiny_distilled_patch16_224"))
    assert "head.weight 5×32 instead of 7×32" in said([*good, "--num-classes", "7"])
    assert "--label-names: cannot read 'names.txt'" in said([*good, "--label-names", "names.txt"])
    assert "it is not UTF-8" in said([*good, "--label-names", "deit.pth"])
    Path("twice.txt").write_text("\ufeffant\nbee\nant\ncat\ndog\n")  # as Windows begins a file
    assert "--label-names: 'twice.txt' calls the classes 0 and 2 'ant'" in said([*good, "--label-names", "twice.txt"])
    assert "--label-names: 'imagenet-1k' has 1000 names for 5" in said([*good, "--label-names", "imagenet-1k"])
    assert "--weights ema: " in said([*good, "--weights", "ema"])
    assert "--crop-pct: " in said([*good, "--crop-pct", "2"])
    assert "--interpolation: " in said([*good, "--interpolation", "cubic"])
    assert "--kwargs: expected key=value (got 'depth')" in said([*good, "--kwargs", "depth"])
    assert "--kwargs: '[1' is not a value" in said([*good, "--kwargs", "depth=[1"])
    assert "kwargs.dept: " in said([*good, "--kwargs", "dept=3"])
    torch.save({**state, "extra": torch.ones(1)}, "deit.pth")
    assert "1 not known to the network: extra" in said(good)
    with open("deit.pth", "wb") as file:
        file.write(b"<html>")
    assert "cannot be read as a checkpoint" in said(good)


def test_an_existing_folder_is_kept(command, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    code, said = command("x.pth", "--arch", "resnet18", "-o", "thesis")
    assert code == 2
    assert "-o: 'thesis' exists already" in said
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "x"


def test_a_malicious_checkpoint_does_not_run(command):
    class Attack:
        def __reduce__(self):
            return os.mkdir, ("evidence",)

    torch.save(Attack(), "x.pth")
    said = complaint(command, "x.pth", "--arch", "test_resnet", "-o", "out")
    assert f"(found {os.name}.mkdir, not run)" in said
    assert not os.path.exists("evidence")


def test_numbers_on_the_command_line(command):
    for option in ("--num-classes", "--image-size"):
        code, said = command("x.pth", "--arch", "resnet18", "-o", "out", option, "0")
        assert code == 2
        assert f"argument {option}: expected 1 or more (got '0')" in said


def test_help_names_the_networks(command):
    code, said = command("--help")
    assert code == 0
    assert "--arch kd_hf/mobilenetv1_relu" in said
    assert "--arch kd_hf/shufflenetv2_x1" in said
    assert "--arch kd_hf/resnet18_cifar, kd_hf/resnet34_cifar" in said
    assert said.index("networks:") < said.index("ResNet-50, also of cls_KD")


OFFICIAL_RESNET = {"downsample": "shortcut", "fc": "linear"}


@pytest.mark.parametrize(
    ("folder", "arch", "names"),
    [
        ("resnet56_vanilla", "kd_hf/resnet56", {}),
        ("wrn_40_2_vanilla", "kd_hf/wrn_40_2", {}),
        ("vgg13_vanilla", "kd_hf/vgg13", {}),
        ("ResNet50_vanilla", "kd_hf/resnet50_cifar", OFFICIAL_RESNET),
        ("ShuffleV1", "kd_hf/shufflenetv1_cifar", {}),
    ],
)
def test_teachers_of_repdistiller(command, folder, arch, names):
    """Their folder says which network it is."""
    original = load_model(arch)
    for name, value in original.network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
    renamed = {".".join(names.get(p, p) for p in key.split(".")): v for key, v in original.network.state_dict().items()}
    os.mkdir(folder)
    torch.save({"epoch": 240, "accuracy": torch.tensor(72.34), "model": renamed, "optimizer": {}}, f"{folder}/last.pth")
    code, said = command(f"{folder}/last.pth", "-o", "out")
    assert code == 0, said
    assert f"out: {arch}, 100 classes, weights of the entry 'model'" in said
    assert torch.equal(reread("out", 32), logits_of(original.network, 32))
    facts = load_model("out", pretrained=True).info.preprocessing
    assert (facts.image_size, facts.crop_pct, facts.mean) == (32, 1.0, (0.5071, 0.4867, 0.4408))


def test_a_distiller_of_mdistiller(command):
    """Everything it learned lies in one file, the student among it."""
    original = build(Official("kd_hf/resnet8", []), classes=100)
    state = {f"module.student.{name}": value for name, value in original.network.state_dict().items()}
    state |= {"module.teacher.fc.bias": torch.ones(3), "module.abfs.0.conv1.0.weight": torch.ones(3)}
    state |= {"module.memory_v1": torch.ones(3)}
    torch.save({"model": state, "epoch": 3, "best_acc": 60.0}, "student_best")
    assert "--arch: name the network" in complaint(command, "student_best", "-o", "out")
    code, said = command("student_best", "--arch", "kd_hf/resnet8", "-o", "out")
    assert code == 0, said
    assert "left out: teacher.* (1), abfs.* (1), memory_v1.* (1)" in said
    assert torch.equal(reread("out", 32), logits_of(original.network, 32))
