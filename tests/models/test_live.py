import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.info import Preprocessing
from kd_hf.models.live import handle_of
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from tests.models.families import HF_VIT, VIT, tiny_timm, tiny_transformers

NAMES = ("ant", "bee", "cat", "dog", "eel")
LOADED = {
    "timm": lambda: tiny_timm("test_resnet")[0],
    "timm vit": lambda: tiny_timm("deit_tiny_distilled_patch16_224")[0],
    "timm swin": lambda: tiny_timm("swin_tiny_patch4_window7_224")[0],
    "transformers": lambda: tiny_transformers("vit"),
    "transformers swin": lambda: tiny_transformers("swin"),
    "own": lambda: load_model("kd_hf/conv_stem_deit_tiny", num_classes=5, image_size=32, kwargs=VIT),
}


class Small(nn.Module):
    """A network of nobody's library."""

    def __init__(self, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, pixels):
        return self.head(self.body(pixels).mean((2, 3)))


@pytest.mark.parametrize("key", LOADED)
def test_a_network_tells_of_itself_what_its_name_does(key):
    loaded = LOADED[key]()
    handle = handle_of(loaded.network, loaded.info.name)
    if loaded.info.preprocessing != loaded.info.native:  # a size that was asked for, and that only the loader knows
        assert loaded.network is handle.network and handle.info.preprocessing == handle.info.native
        handle = handle_of(loaded.network, loaded.info.name, loaded.info.preprocessing)
    facts = {name: getattr(loaded.info, name) for name in vars(loaded.info) if name != "native"}
    assert {name: getattr(handle.info, name) for name in facts} == facts
    assert (handle.origin.library, handle.origin.architecture) == (loaded.origin.library, loaded.origin.architecture)
    assert handle.network is loaded.network and handle.label_names == loaded.label_names == ()


def test_any_other_network():
    network = Small().train()
    handle = handle_of(network, "mine", label_names=NAMES)
    info = handle.info
    assert (info.library, info.num_classes, info.head, info.name) == ("torch", 5, "head", "mine")
    assert info.preprocessing == info.native == Preprocessing()
    assert handle.label_names == NAMES and network.training
    assert handle.origin.architecture == "tests.models.test_live.Small"
    outputs = TappedModel(handle, info, ["pre_logits", "module:body"]).eval()(torch.randn(2, 3, 9, 9))
    assert outputs.logits.shape == (2, 5) and outputs.taps["module:body"].shape == (2, 8, 4, 4)
    assert torch.equal(network.head(outputs.taps["pre_logits"]), outputs.logits)
    convolutional = nn.Sequential(nn.Conv2d(3, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert handle_of(convolutional, "conv").info.num_classes == 7


def test_preprocessing_may_be_an_image_processor():
    from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor

    def seen(processor):
        return handle_of(Small(), "mine", processor).info.preprocessing

    cropped = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}, image_mean=[0.1] * 3)
    facts = seen(cropped)
    assert (facts.image_size, facts.crop_pct, facts.crop_mode, facts.mean) == (48, 0.75, "center", (0.1,) * 3)
    facts = seen(ViTImageProcessor(size={"height": 40, "width": 40}))
    assert (facts.image_size, facts.crop_mode, facts.interpolation, facts.std) == (40, "squash", "bilinear", (0.5,) * 3)
    facts = seen(ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.9, do_normalize=False))
    assert (facts.image_size, facts.crop_pct, facts.mean, facts.std) == (32, 0.9, (0.0,) * 3, (1.0,) * 3)
    handle = handle_of(Small(), "mine")
    assert handle_of(handle, "mine", cropped).info.preprocessing == seen(cropped)
    assert handle_of(handle, "mine") == handle


def test_a_processor_is_read_as_its_file_is(tmp_path):
    """As much as loading the folder says, for a network of transformers."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    made = load_model("transformers/vit", num_classes=5, image_size=32, kwargs=HF_VIT)
    made.label_names = NAMES
    save_student(made, tmp_path / "vit")
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    handle = handle_of(network, "x", AutoImageProcessor.from_pretrained(tmp_path / "vit"))
    loaded = load_model(str(tmp_path / "vit"), pretrained=True)
    assert handle.info.preprocessing.image_size == loaded.info.preprocessing.image_size == 32
    assert handle.info.preprocessing.mean == loaded.info.preprocessing.mean
    assert abs(handle.info.preprocessing.crop_pct - loaded.info.preprocessing.crop_pct) < 1 / 32  # whole pixels
    assert handle.label_names == loaded.label_names == NAMES


def test_class_names_of_timm_are_those_of_its_configuration(tmp_path):
    made = load_model("test_resnet", num_classes=5, image_size=32)
    made.label_names = NAMES
    save_student(made, tmp_path / "student")
    network = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert handle_of(network, "x").label_names == NAMES
    network.reset_classifier(3)
    assert handle_of(network, "x").label_names == ()
    assert handle_of(timm.create_model("test_resnet"), "x").label_names == ()


def test_what_does_not_fit():
    with pytest.raises(TypeError, match=r"student: expected a torch.nn.Module .*not str"):
        handle_of("resnet18", "student")
    with pytest.raises(UserError, match="student: 5 class names were given, but Small has 3 classes"):
        handle_of(Small(3), "student", label_names=NAMES)
    with pytest.raises(UserError, match="student: Flatten has no Linear or Conv2d"):
        handle_of(nn.Flatten(), "student")
    assert handle_of(nn.Flatten(), "student", label_names=NAMES).info.num_classes == 5
    network = timm.create_model("test_vit")
    network.head = nn.Linear(network.num_features, 7)
    with pytest.raises(UserError, match=r"7 outputs, but its num_classes is 1000; .*reset_classifier\(7\)"):
        handle_of(network, "student")


def test_the_artefact_of_any_other_network(tmp_path):
    network = Small()
    handle = handle_of(network, "mine", Preprocessing(image_size=16, crop_pct=1.0), NAMES)
    save_student(handle, tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text())
    facts = config.pop("preprocessing")
    architecture = "tests.models.test_live.Small"
    names = list(NAMES)
    assert config == {"library": "torch", "architecture": architecture, "num_classes": 5, "label_names": names}
    assert (
        Preprocessing(**{**facts, "mean": tuple(facts["mean"]), "std": tuple(facts["std"])})
        == handle.info.preprocessing
    )
    again = Small()
    again.load_state_dict(load_file(tmp_path / "student/model.safetensors"))
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(pixels), network.eval()(pixels))
    with pytest.raises(UserError, match="build it in Python"):
        load_model(str(tmp_path / "student"), pretrained=True)
