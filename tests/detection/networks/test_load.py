"""The door to detectors: names, folders, other numbers of classes, and messages."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor, RTDetrImageProcessor

from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.detection.networks.families import FAMILIES
from kd_hf.detection.networks.load import VIDT, describe_detector, load_detector
from kd_hf.errors import UserError
from kd_hf.recipe.config import PreprocessingConfig
from tests.detection.detectors import CLASSES, TINY, detector, handle, images


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# parameters that the authors' code has; up to a million it never uses
@pytest.mark.parametrize(
    ("name", "parameters"), [("nano", 15_728_677), ("tiny", 37_962_901), ("small", 60_465_061), ("base", 99_959_635)]
)
def test_vidt_by_name(name, parameters, no_network):
    made = load_detector(f"kd_hf/vidt_{name}", device="meta")
    info = made.info
    assert parameters - 1e6 < info.parameters < parameters
    assert name != "nano" or info.parameters == parameters - 198_880
    assert (info.levels, info.states, info.queries, info.num_classes) == (4, 7, 100, 91)
    assert info.body and not info.softmax and not info.masks and info.model_type == "kd_hf_vidt"
    assert made.origin.architecture == "kd_hf_vidt" and made.origin.source == f"kd_hf/vidt_{name}"
    assert set(VIDT) == {"vidt_nano", "vidt_tiny", "vidt_small", "vidt_base"}


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"kd_hf_vidt"}))
def test_a_random_network_downloads_nothing(kind, no_network):
    """With the defaults of its configuration, whose backbone is timm's for some."""
    made = load_detector(f"transformers/{kind}", num_classes=3, device="meta")
    assert made.info.num_classes == 3 and made.info.parameters > 1e6
    assert all(parameter.is_meta for parameter in made.network.parameters())


def test_arguments():
    made = load_detector("kd_hf/vidt_nano", num_classes=3, kwargs={"num_queries": 20, "embed_dim": 24}, device="meta")
    assert made.network.config.num_queries == 20 and made.network.config.embed_dim == 24
    assert made.info.num_classes == 3 and made.network.class_embed[0].out_features == 3
    dropped = load_detector("kd_hf/vidt_nano", drop_path=0.2, device="meta")
    assert dropped.network.config.drop_path_rate == 0.2
    changed = load_detector("kd_hf/vidt_nano", preprocessing=PreprocessingConfig(mean=(0.5,) * 3), device="meta")
    assert changed.info.preprocessing.mean == (0.5,) * 3 and changed.info.native.mean == (0.485, 0.456, 0.406)
    made = handle("detr")
    assert not made.network.training and made.network.dtype == torch.float32


def _differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return {name for name, value in ours.items() if not torch.equal(value, theirs[name])}


def test_a_folder_with_other_classes(tmp_path):
    """Everything is kept but the class heads and the embedding of noisy classes."""
    made = handle("rt_detr_v2")
    made.network.save_pretrained(tmp_path)
    RTDetrImageProcessor().save_pretrained(tmp_path)
    same = load_detector(str(tmp_path), pretrained=True)
    assert same.info.preprocessing.mean == (0.0,) * 3 and same.info.preprocessing.std == (1.0,) * 3
    for (name, ours), (_, theirs) in zip(
        same.network.state_dict().items(), made.network.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    other = load_detector(str(tmp_path), pretrained=True, num_classes=3)
    kept = {
        name
        for name, value in other.network.state_dict().items()
        if torch.equal(value, made.network.state_dict()[name])
    }
    new = set(other.network.state_dict()) - kept
    assert new and all("class" in name or "score" in name for name in new)
    assert TappedDetector(other, other.info)(images()).logits.shape[-1] == 3
    random = load_detector(str(tmp_path))
    assert not torch.equal(
        random.network.state_dict()["model.enc_output.0.weight"], made.network.state_dict()["model.enc_output.0.weight"]
    )


@pytest.mark.parametrize("kind", ["detr", "yolos", "lw_detr", "deformable_detr"])
def test_other_classes_leave_the_boxes_as_they_are(kind, tmp_path):
    model = detector(kind).eval()
    model.network.save_pretrained(tmp_path)
    with torch.no_grad():
        before = model(images())
        other = load_detector(str(tmp_path), pretrained=True, num_classes=9)
        after = TappedDetector(other, other.info)(images())
    assert after.logits.shape[-1] == 9 + after.softmax
    if kind != "lw_detr":  # which picks queries by their classes
        torch.testing.assert_close(after.boxes, before.boxes, rtol=0, atol=1e-6)


def test_an_artefact_of_vidt_runs_no_foreign_code(tmp_path, monkeypatch):
    """Its own code lies beside it, for readers without this package; here it is not imported."""
    made = handle("kd_hf_vidt")
    (tmp_path / "run").mkdir()
    folder = tmp_path / "run/student"
    made.network.save_pretrained(folder)
    DeformableDetrImageProcessor().save_pretrained(folder)
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('foreign code')")
    found = load_detector(str(tmp_path / "run"), pretrained=True)
    assert type(found.network) is type(made.network)
    with torch.no_grad():
        wanted = TappedDetector(made, made.info)(images())
        torch.testing.assert_close(TappedDetector(found, found.info)(images()).boxes, wanted.boxes, rtol=0, atol=0)


def test_a_network_of_ones_own():
    network = AutoModelForObjectDetection.from_config(handle("yolos").network.config)
    info = describe_detector(network, "mine")
    assert info.name == "mine" and info.num_classes == CLASSES and info.softmax and info.body


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "kd_hf/vidt_nona"}, "no detector 'vidt_nona'. Did you mean 'vidt_nano'"),
        ({"model": "kd_hf/vidt_nano", "pretrained": True}, "random network of that type"),
        ({"model": "resnet50"}, "'resnet50' is no detector"),
        ({"model": "transformers/vit"}, "detectors of type 'vit' are not known here"),
        ({"model": "transformers/detrr"}, "no model type 'detrr'. Did you mean 'detr'"),
        (
            {"model": "transformers/detr", "kwargs": {"num_querys": 3}},
            "kwargs.num_querys: .*Did you mean 'num_queries'",
        ),
        ({"model": "transformers/detr", "drop_path": 0.1}, "has no stochastic depth"),
        (
            {"model": "transformers/deformable_detr", "kwargs": {"encoder_attention_heads": 7}},
            "cannot be built: Value",
        ),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(UserError, match=message):
        load_detector(**{"device": "meta", **arguments})


def test_folders_that_do_not_fit(tmp_path, caplog):
    handle("detr").network.save_pretrained(tmp_path / "detr")
    with pytest.raises(UserError, match=r"bbox_predictor.layers.0.bias is 16 in the weights and 32 in this network"):
        load_detector(str(tmp_path / "detr"), pretrained=True, kwargs={"d_model": 32})
    assert "MISMATCH" not in caplog.text  # nor a list of all that does not fit
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(UserError, match="is a classifier of timm, not a detector"):
        load_detector(str(tmp_path / "timm"))
    (tmp_path / "detr/model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors"):
        load_detector(str(tmp_path / "detr"), pretrained=True)


def test_tiny_ones_are_tiny():
    assert all(handle(kind, device="meta").info.parameters < 300_000 for kind in TINY)
