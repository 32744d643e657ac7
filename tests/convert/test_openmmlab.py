import pytest
import torch
from timm.models.swin_transformer import PatchMerging
from torch import nn
from torch.nn import functional as F

from kd_hf.convert.fitting import fit_weights, name_weights
from kd_hf.convert.layouts import StudentWeights
from kd_hf.errors import UserError
from kd_hf.models.load import load_model
from tests.convert.official import OFFICIAL, Official, build, logits_of, official_state, randomise
from tests.models.families import SWIN, VIT


def converted(state, one, classes=5):
    """A network with other weights that has taken over those of the checkpoint."""
    handle = load_model(one.arch, num_classes=classes, image_size=one.size, kwargs=one.kwargs)
    student = StudentWeights("", dict(state))
    handle.network.load_state_dict(fit_weights(name_weights(student, handle), student, handle, "x.pth"))
    return handle, student


@pytest.mark.parametrize("key", OFFICIAL)
def test_a_converted_network_computes_the_same(key):
    one = OFFICIAL[key]
    original = build(one)
    handle, _ = converted(official_state(one, original), one)
    assert torch.equal(logits_of(handle.network, one.size), logits_of(original.network, one.size))


@pytest.mark.parametrize("key", ["vit-gap", "swin"])
def test_what_has_no_use_is_named(key):
    one = OFFICIAL[key]
    state = official_state(one, build(one))
    _, student = converted(state, one)
    assert student.left_out
    assert all("cls_token" in name or "position_index" in name or ".norm" in name for name in student.left_out)


def test_a_class_token_in_use_is_not_dropped():
    with_token = OFFICIAL["deit"]
    state = official_state(with_token, build(with_token))
    with pytest.raises(UserError, match=r"1 not known to the network: backbone\.cls_token.*pos_embed 1×5×32 instead"):
        converted(state, Official("kd_hf/vit_small_patch16_gap", [], VIT))


def test_patch_merging_agrees_with_unfolding():
    """OpenMMLab merges with ``nn.Unfold``, so its 4C features are ordered (channel, row, column)."""
    one = OFFICIAL["swin"]
    handle = build(one)
    state = official_state(one, handle)
    norm = [torch.rand(64), torch.rand(64)]
    reduction = torch.randn(32, 64)
    state["backbone.stages.0.downsample.norm.weight"], state["backbone.stages.0.downsample.norm.bias"] = norm
    state["backbone.stages.0.downsample.reduction.weight"] = reduction

    pixels = torch.randn(2, 16, 8, 6)
    unfolded = F.unfold(pixels, kernel_size=2, stride=2).transpose(1, 2)  # [B, 12, 4C]
    expected = F.linear(F.layer_norm(unfolded, (64,), *norm), reduction)

    merging = converted(state, one)[0].network.layers[1].downsample
    assert isinstance(merging, PatchMerging)
    torch.testing.assert_close(merging(pixels.permute(0, 2, 3, 1)).flatten(1, 2), expected)


class Shuffled(nn.Module):
    """A unit of ShuffleNetV2: both branches see everything when it halves the resolution, otherwise one sees a half."""

    def __init__(self, before, after, stride):
        super().__init__()
        half = after // 2
        seen = before if stride == 2 else half
        if stride == 2:
            self.branch1 = nn.Sequential(pair(before, before, 3, 2, before), pair(before, half))
        self.branch2 = nn.Sequential(pair(seen, half), pair(half, half, 3, stride, half), pair(half, half))

    def forward(self, features):
        halves = (features, features) if hasattr(self, "branch1") else features.chunk(2, 1)
        passed = passing(self.branch1, halves[0]) if hasattr(self, "branch1") else halves[0]
        return torch.stack((passed, passing(self.branch2, halves[1])), 2).flatten(1, 2)


def pair(before, after, side=1, stride=1, groups=1):
    """A convolution and its norm as OpenMMLab holds them."""
    convolution = nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=False)
    return nn.ModuleDict({"conv": convolution, "bn": nn.BatchNorm2d(after)})


def passing(pairs, features):
    """Through convolutions and norms, with a ReLU behind those that see every channel."""
    for each in pairs:
        features = each["bn"](each["conv"](features))
        features = features if each["conv"].groups > 1 else F.relu(features)
    return features


class OpenmmlabShuffleNet(nn.Module):
    """ShuffleNetV2 with OpenMMLab's modules, so its names are theirs by construction."""

    def __init__(self, depths, widths, classes):
        super().__init__()
        sizes = zip(depths, widths[:3], widths[1:4], strict=True)
        stages = [
            nn.Sequential(Shuffled(before, after, 2), *(Shuffled(after, after, 1) for _ in range(depth - 1)))
            for depth, before, after in sizes
        ]
        last = pair(widths[3], widths[4])
        self.backbone = nn.ModuleDict({"conv1": pair(3, widths[0], 3, 2), "layers": nn.ModuleList([*stages, last])})
        self.head = nn.ModuleDict({"fc": nn.Linear(widths[4], classes)})

    def forward(self, pixels):
        *stages, last = self.backbone["layers"]
        features = F.max_pool2d(passing([self.backbone["conv1"]], pixels), 3, 2, 1)
        features = passing([last], nn.Sequential(*stages)(features))
        return self.head["fc"](features.mean((2, 3)))


def test_shufflenet_agrees_with_openmmlabs_modules():
    one = OFFICIAL["shufflenet-v2"]
    original = OpenmmlabShuffleNet(**one.kwargs, classes=5)
    randomise(original)
    assert original.state_dict().keys() == official_state(one, build(one)).keys()
    logits = logits_of(original, one.size)
    assert logits.isfinite().all() and logits.std(0).min() > 0
    assert torch.equal(logits_of(converted(original.state_dict(), one)[0].network, one.size), logits)


def test_resnet_for_small_images_is_not_the_large_one():
    """Their names are the same; the first convolution tells them apart."""
    state = official_state(OFFICIAL["resnet-cifar"], build(OFFICIAL["resnet-cifar"]))
    with pytest.raises(UserError, match=r"1 of another shape: backbone\.conv1\.weight 64×3×3×3 instead of 64×3×7×7$"):
        converted(state, OFFICIAL["resnet"])


@pytest.mark.parametrize("key", OFFICIAL)
def test_a_name_that_is_not_in_the_tables_is_refused(key):
    one = OFFICIAL[key]
    state = official_state(one, build(one))
    with pytest.raises(UserError, match=r"1 not known to the network: backbone\.layers\.0\.extra$"):
        converted({**state, "backbone.layers.0.extra": torch.zeros(1)}, one)


def test_another_network():
    one = OFFICIAL["resnet-v1d"]
    state = official_state(one, build(one))
    with pytest.raises(UserError) as caught:
        converted(state, OFFICIAL["resnet"])
    message = str(caught.value)
    assert "does not fit --arch resnet18" in message
    assert "82 not known to the network: backbone.stem.0.conv.weight, " in message
    assert "missing: conv1.weight" in message
    assert "backbone.layer1.0.conv1.weight 64×64×1×1 instead of 64×64×3×3" in message
    assert len(message) < 600


def test_a_network_without_table():
    one = OFFICIAL["resnet"]
    state = official_state(one, build(one))
    with pytest.raises(UserError, match=r"--arch test_byobnet: .*no table.*ByobNet; .*ResNet"):
        converted(state, Official("test_byobnet", []))


def test_two_names_for_one_weight():
    """Neither of two candidates for a place is taken silently."""
    one = OFFICIAL["swin"]
    state = official_state(one, build(one))
    state["backbone.norm.weight"] = state["backbone.norm3.weight"]
    with pytest.raises(UserError, match=r"1 not known to the network: backbone\.norm\.weight$"):
        converted(state, Official(one.arch, [], SWIN, one.size))
