"""Networks of RepDistiller and mdistiller: their sizes, initial weights, and levels before the last activation."""

import pytest
import torch
from torch.nn import functional

from kd_hf.errors import UserError
from kd_hf.models.load import load_model
from kd_hf.models.parts import live_part
from kd_hf.models.taps import TappedModel, available_taps, resolve_tap, tap_shapes

# parameters, then channels and size of each stage, then what the classifier receives
NETWORKS = {
    "resnet8": (83_892, ["16@32", "32@16", "64@8"], 64),
    "resnet14": (181_108, ["16@32", "32@16", "64@8"], 64),
    "resnet20": (278_324, ["16@32", "32@16", "64@8"], 64),
    "resnet32": (472_756, ["16@32", "32@16", "64@8"], 64),
    "resnet44": (667_188, ["16@32", "32@16", "64@8"], 64),
    "resnet56": (861_620, ["16@32", "32@16", "64@8"], 64),
    "resnet110": (1_736_564, ["16@32", "32@16", "64@8"], 64),
    "resnet8x4": (1_233_540, ["64@32", "128@16", "256@8"], 256),
    "resnet32x4": (7_433_860, ["64@32", "128@16", "256@8"], 256),
    "wrn_16_1": (180_916, ["16@32", "32@16", "64@8"], 64),
    "wrn_40_1": (569_780, ["16@32", "32@16", "64@8"], 64),
    "wrn_16_2": (703_284, ["32@32", "64@16", "128@8"], 128),
    "wrn_40_2": (2_255_156, ["32@32", "64@16", "128@8"], 128),
    "vgg8": (3_965_028, ["128@16", "256@8", "512@4", "512@4"], 512),
    "vgg11": (9_277_284, ["128@16", "256@8", "512@4", "512@4"], 512),
    "vgg13": (9_462_180, ["128@16", "256@8", "512@4", "512@4"], 512),
    "vgg16": (14_774_436, ["128@16", "256@8", "512@4", "512@4"], 512),
    "vgg19": (20_086_692, ["128@16", "256@8", "512@4", "512@4"], 512),
    "mobilenetv2_half": (812_836, ["12@16", "16@8", "48@4", "160@2"], 1280),
    "shufflenetv1_cifar": (949_258, ["240@16", "480@8", "960@4"], 960),
    "shufflenetv2_cifar": (1_355_528, ["116@16", "232@8", "464@4"], 1024),
    "resnet18_cifar": (11_220_132, ["64@32", "128@16", "256@8", "512@4"], 512),
    "resnet34_cifar": (21_328_292, ["64@32", "128@16", "256@8", "512@4"], 512),
    "resnet50_cifar": (23_705_252, ["256@32", "512@16", "1024@8", "2048@4"], 2048),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes(name):
    handle = load_model(f"kd_hf/{name}", device="meta")
    parameters, stages, width = NETWORKS[name]
    assert (handle.info.parameters, handle.info.num_classes) == (parameters, 100)
    shapes = tap_shapes(TappedModel(handle, handle.info, available_taps(handle.info)), 32)
    maps = {f"stage:{index}": tuple(map(int, text.split("@"))) for index, text in enumerate(stages, 1)}
    maps = {tap: (channels, size, size) for tap, (channels, size) in maps.items()}
    if name != "mobilenetv2_half":  # its stages are linear
        maps |= {tap.replace("stage", "preact"): shape for tap, shape in maps.items()}
    assert shapes == {**maps, "pre_logits": (width,)}


def without_zeros(handle):
    """With every BatchNorm as if no block had been switched off at the start."""
    for module in handle.network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return handle


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1", "vgg11", "shufflenetv1_cifar", "resnet18_cifar"])
def test_a_level_before_its_activation(name):
    """In train mode, where an activation that works in place would show."""
    handle = without_zeros(load_model(f"kd_hf/{name}", num_classes=7))
    outputs = TappedModel(handle, handle.info, available_taps(handle.info)).train()(torch.randn(2, 3, 32, 32))
    for index in range(1, len(handle.info.stages) + 1):
        preact, stage = outputs.taps[f"preact:{index}"], outputs.taps[f"stage:{index}"]
        assert (preact < 0).any()
        if name == "wrn_16_1":  # the stage is a sum, the other its normalised form
            torch.testing.assert_close(preact, functional.batch_norm(stage, None, None, training=True))
        else:
            assert torch.equal(preact.relu(), stage)
        norm = live_part(handle, f"norm:preact:{index}")
        assert norm.num_features == preact.shape[1]


@torch.no_grad()
def test_shufflenetv2_shuffles_after_its_activation():
    handle = load_model("kd_hf/shufflenetv2_cifar", num_classes=7)
    outputs = TappedModel(handle, handle.info, ["preact:-1", "stage:-1"]).train()(torch.randn(2, 3, 32, 32))
    left, right = outputs.taps["preact:-1"].relu().chunk(2, 1)
    assert torch.equal(torch.stack((left, right), 2).flatten(1, 2), outputs.taps["stage:-1"])
    with pytest.raises(UserError, match=r"norm:preact:-1.*has no BatchNorm there"):
        live_part(handle, "norm:preact:-1")


def test_networks_that_have_none_say_so():
    handle = load_model("kd_hf/mobilenetv2_half", device="meta")
    with pytest.raises(UserError, match=r"tap 'preact:4' does not exist.* It has: stage:1 … stage:4, pre_logits"):
        resolve_tap(handle.info, "preact:4")
    with pytest.raises(UserError, match=r"'preact:9' does not exist.* stage:1 … stage:3, preact:1 … preact:3"):
        resolve_tap(load_model("kd_hf/resnet20", device="meta").info, "preact:9")


def test_only_mdistillers_wide_resnet_counts_a_batch_twice():
    for twice in (False, True):
        handle = load_model("kd_hf/wrn_16_1", num_classes=3, kwargs={"norms_count_twice": twice})
        handle.network.train()(torch.randn(2, 3, 16, 16))
        counts = {key: int(value) for key, value in handle.network.state_dict().items() if "num_batches" in key}
        assert {key for key, count in counts.items() if count == 2} == (
            {f"{name}.num_batches_tracked" for name in ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")}
            if twice
            else set()
        )
        assert set(counts.values()) <= {1, 2}


@pytest.mark.parametrize(
    ("name", "weight", "spread"),
    [
        ("resnet8x4", "layer3.0.conv2.weight", (2 / (9 * 256)) ** 0.5),
        ("wrn_16_2", "block3.layer.0.conv2.weight", (2 / (9 * 128)) ** 0.5),
        ("vgg8", "block4.0.weight", (2 / (9 * 512)) ** 0.5),
        ("vgg8", "classifier.weight", 0.01),
        ("mobilenetv2_half", "blocks.5.0.conv.3.weight", (2 / (9 * 288)) ** 0.5),
        ("mobilenetv2_half", "classifier.0.weight", 0.01),
        ("shufflenetv2_cifar", "conv2.weight", (1 / (3 * 464)) ** 0.5),  # torch's own
        ("resnet50_cifar", "layer4.0.conv2.weight", (2 / (9 * 512)) ** 0.5),
    ],
)
def test_initial_weights(name, weight, spread):
    state = load_model(f"kd_hf/{name}").network.state_dict()
    assert state[weight].std().item() == pytest.approx(spread, rel=0.05)
    norms = [value for key, value in state.items() if value.ndim == 1 and key.endswith(("bn1.weight", "bn3.weight"))]
    assert all((value == 1).all() for value in norms)
