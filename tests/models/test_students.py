import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from torch.nn import functional

from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.models.students import STUDENTS
from kd_hf.models.taps import TappedModel, available_taps, tap_shapes

NAMES = ("ant", "bee", "cat", "dog", "eel")
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
# (arguments that make it small, image size)
TINY = {
    "conv_stem_deit_tiny": (SMALL, 32),
    "mixer_b14": ({"embed_dim": 32, "depth": 3}, 56),
    "mobilenetv1_relu": ({}, 32),
    "vit_small_patch16_gap": (SMALL, 48),
    "vit_base_patch14_gap": (SMALL, 42),
    "resnet18_cifar": ({"depths": [1, 1, 1, 1]}, 16),
    "shufflenetv2_x1": ({"depths": [1, 1, 1]}, 64),
    "resnet8": ({"widths": [4, 4, 8, 8]}, 16),
    "wrn_16_2": ({"depths": [1, 1, 2], "widths": [4, 4, 8, 8]}, 16),
    "vgg13": ({"widths": [4] * 5}, 64),
    "mobilenetv2_half": ({"width": 0.25}, 32),
    "shufflenetv1_cifar": ({"depths": [1, 2, 1], "widths": [12, 24, 48, 96]}, 32),
    "shufflenetv2_cifar": ({"depths": [1, 2, 1], "widths": [6, 8, 16, 32, 64]}, 32),
    "resnet50_cifar": ({"depths": [1, 1, 1, 1]}, 16),
}
STOCK = ("mobilenetv1_relu", "vit_small_patch16_gap", "vit_base_patch14_gap")
OWN = tuple(name for name in TINY if name not in STOCK)
# for images of any size, without stochastic depth
CONVOLUTIONAL = tuple(name for name in OWN if name not in ("conv_stem_deit_tiny", "mixer_b14"))
NO_DROP_PATH = tuple(name for name in CONVOLUTIONAL if not name.endswith(("18_cifar", "50_cifar")))


def tiny(name, **more):
    """A small network of that name whose weights and statistics are not the initial ones."""
    kwargs, size = TINY[name]
    handle = load_model(f"kd_hf/{name}", num_classes=5, image_size=size, kwargs=kwargs, **more)
    with torch.no_grad():
        for tensor in handle.network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return handle


def pixels_for(handle, dtype=torch.float32):
    size = handle.info.preprocessing.image_size
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def logits_of(network, pixels):
    with torch.no_grad():
        return network.eval()(pixels)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("conv_stem_deit_tiny", 6_633_104),
        ("conv_stem_deit_small", 23_797_520),
        ("conv_stem_deit_base", 89_976_848),
    ],
)
def test_parameters_of_the_papers_networks(name, parameters):
    info = load_model(f"kd_hf/{name}", device="meta").info
    assert (info.parameters, info.num_classes, info.depth) == (parameters, 1000, 12)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_tap_fires_on_meta(name):
    handle = load_model(f"kd_hf/{name}", num_classes=7, device="meta")
    assert all(parameter.is_meta for parameter in handle.network.parameters())
    taps = available_taps(handle.info)
    shapes = tap_shapes(TappedModel(handle, handle.info, taps), 224)
    assert shapes.keys() == set(taps) and handle.info.num_classes == 7
    facts = handle.info.preprocessing
    if facts.crop_pct == 1:  # RepDistiller's
        assert (facts.mean, facts.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
        assert (facts.image_size, facts.interpolation) == (32, "bicubic")
        return
    assert (facts.mean, facts.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    size = 32 if name.endswith("_cifar") else 224
    assert (facts.image_size, facts.crop_pct, facts.interpolation) == (size, 0.875, "bicubic")


@pytest.mark.parametrize(
    ("name", "tap", "shape"),
    [
        ("conv_stem_deit_small", "tokens:patch", (196, 384)),
        ("conv_stem_deit_small", "tokens:dist", (384,)),
        ("mixer_b14", "block:9", (256, 768)),
        ("mixer_b14", "stage:1", (768, 16, 16)),
        ("shufflenetv2_x1", "stage:3", (464, 7, 7)),
        ("mobilenetv1_relu", "stage:4", (512, 14, 14)),
        ("mobilenetv1_relu", "stage:5", (1024, 7, 7)),
        ("vit_small_patch16_gap", "block:8", (196, 384)),
        ("vit_base_patch16_gap", "tokens", (196, 768)),
        ("vit_base_patch14_gap", "stage:1", (768, 16, 16)),
    ],
)
def test_shapes_the_papers_tap(name, tap, shape):
    handle = load_model(f"kd_hf/{name}", device="meta")
    assert tap_shapes(TappedModel(handle, handle.info, [tap]), 224) == {tap: shape}


def recomputed(weights, pixels, training, heads=2, depth=3):
    """VkD's network written out: (tokens after the final norm, class logits, distillation logits)."""
    value = pixels
    for index, (stride, padding) in zip((0, 3, 6), ((2, 3), (1, 1), (1, 1)), strict=True):
        value = functional.conv2d(value, weights[f"conv_embed.conv.{index}.weight"], None, stride, padding)
        norm = f"conv_embed.conv.{index + 1}."
        mean, var = weights[norm + "running_mean"], weights[norm + "running_var"]
        if training:
            mean, var = value.mean((0, 2, 3)), value.var((0, 2, 3), unbiased=False)
        value = (value - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        value = value * weights[norm + "weight"][:, None, None] + weights[norm + "bias"][:, None, None]
        value = value.clamp(min=0)
    patches = functional.conv2d(value, weights["conv_embed.proj.weight"], weights["conv_embed.proj.bias"], 8)
    patches = patches.flatten(2).transpose(1, 2)
    first = weights["cls_token"].repeat(len(pixels), 1, 1)
    tokens = torch.cat([first, patches.sum(1, keepdim=True) / patches.shape[1], patches], 1) + weights["pos_embed"]

    def linear(name, value):
        return value @ weights[name + ".weight"].T + weights[name + ".bias"]

    def layer_norm(name, value):
        return functional.layer_norm(value, value.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], 1e-6)

    for index in range(depth):
        block = f"blocks.{index}."
        query, key, heads_of_value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(block + "attn.qkv", layer_norm(block + "norm1", tokens)).chunk(3, -1)
        )
        attention = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        tokens = tokens + linear(block + "attn.proj", (attention @ heads_of_value).transpose(1, 2).flatten(2))
        hidden = functional.gelu(linear(block + "mlp.fc1", layer_norm(block + "norm2", tokens)))
        tokens = tokens + linear(block + "mlp.fc2", hidden)
    tokens = layer_norm("norm", tokens)
    return tokens, linear("head", tokens[:, 0]), linear("head_dist", tokens[:, 1])


@pytest.mark.parametrize("training", [False, True])
def test_conv_stem_deit_is_the_papers_network(training):
    handle = tiny("conv_stem_deit_tiny")
    network = handle.network.double().train(training)
    pixels = pixels_for(handle, torch.float64)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    tokens, logits, dist_logits = recomputed(weights, pixels, training)
    outputs = TappedModel(handle, handle.info, ["tokens", "tokens:dist"], dist_head=True).train(training)(pixels)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(outputs.taps["tokens"], tokens, **close)
    torch.testing.assert_close(outputs.taps["tokens:dist"], tokens[:, 1], **close)
    if training:
        torch.testing.assert_close(outputs.logits, logits, **close)
        torch.testing.assert_close(outputs.dist_logits, dist_logits, **close)
    else:
        assert outputs.dist_logits is None
        torch.testing.assert_close(outputs.logits, (logits + dist_logits) / 2, **close)


def test_without_a_distilling_method_the_heads_are_one_classifier():
    handle = tiny("conv_stem_deit_tiny")
    outputs = TappedModel(handle, handle.info, []).train()(pixels_for(handle))
    assert outputs.dist_logits is None and outputs.logits.shape == (2, 5)


def test_conv_stem_deit_starts_as_in_the_paper():
    network = load_model("kd_hf/conv_stem_deit_tiny").network
    weights = network.state_dict()
    fan_in = {"conv_embed.conv.0": 3 * 49, "conv_embed.conv.3": 64 * 9, "conv_embed.proj": 64 * 64}
    for name, inputs in fan_in.items():
        assert weights[name + ".weight"].std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.05)
    for name in ("pos_embed", "cls_token", "blocks.5.attn.qkv.weight", "head_dist.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.2)
    assert not weights["blocks.5.mlp.fc1.bias"].any() and not weights["head.bias"].any()


def test_every_parameter_of_the_conv_stem_deit_is_trained():
    handle = tiny("conv_stem_deit_tiny")
    outputs = TappedModel(handle, handle.info, ["tokens:patch"], dist_head=True).train()(pixels_for(handle))
    (outputs.logits.sum() + outputs.dist_logits.sum() + outputs.taps["tokens:patch"].square().sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in handle.network.parameters())


def test_decay_and_layers_of_the_conv_stem_deit():
    network = load_model("kd_hf/conv_stem_deit_tiny", kwargs=SMALL).network
    assert network.no_weight_decay() == {"cls_token", "pos_embed"}
    layers = group_parameters(network, network.group_matcher(), reverse=True)
    assert layers.keys() == dict(network.named_parameters()).keys()
    assert layers["conv_embed.proj.weight"] == layers["pos_embed"] == 0
    assert layers["blocks.0.norm1.weight"] < layers["blocks.2.norm1.weight"] <= layers["norm.weight"]


def test_mobilenet_has_relu_where_timm_has_relu6():
    handle = tiny("mobilenetv1_relu")
    pixels = pixels_for(handle) * 20
    stock = timm.create_model("mobilenetv1_100", num_classes=5)
    stock.load_state_dict(handle.network.state_dict())
    assert not torch.allclose(logits_of(stock, pixels), logits_of(handle.network, pixels))
    for module in stock.modules():
        if isinstance(getattr(module, "act", None), nn.ReLU6):
            module.act = nn.ReLU()
    assert torch.equal(logits_of(stock, pixels), logits_of(handle.network, pixels))


def test_vit_without_class_token_pools_the_normalised_patches():
    handle = tiny("vit_small_patch16_gap")
    outputs = TappedModel(handle, handle.info, ["tokens"])(pixels_for(handle))
    assert outputs.taps["tokens"].shape == (2, 9, 32)
    torch.testing.assert_close(outputs.logits, handle.network.head(outputs.taps["tokens"].mean(1)))
    assert "cls_token" not in handle.network.state_dict() and handle.info.prefix == ()


def test_vit_with_two_norms_is_timms_vit_with_another_norm():
    handle = tiny("vit_base_patch14_gap")
    vit = timm.create_model(
        "vit_base_patch16_224", patch_size=14, img_size=42, num_classes=5, class_token=False, global_pool="avg", **SMALL
    )
    vit.norm = nn.LayerNorm(32, eps=1e-6)
    vit.load_state_dict(handle.network.state_dict())
    pixels = pixels_for(handle)
    assert torch.equal(logits_of(vit, pixels), logits_of(handle.network, pixels))


def test_vit_with_two_norms_starts_like_a_vit():
    weights = load_model("kd_hf/vit_base_patch14_gap", kwargs={"depth": 4, "embed_dim": 192}).network.state_dict()
    for name in ("blocks.3.attn.proj.weight", "blocks.3.mlp.fc2.weight", "head.weight", "pos_embed"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert not weights["blocks.3.attn.qkv.bias"].any() and (weights["fc_norm.weight"] == 1).all()


def test_mixer_is_timms_but_for_patches_and_epsilon():
    handle = load_model(
        "kd_hf/mixer_b14", num_classes=5, image_size=64, kwargs={"patch_size": 16, "depth": 8, "embed_dim": 512}
    )
    stock = timm.create_model("mixer_s16_224", num_classes=5, img_size=64)
    stock.load_state_dict(handle.network.state_dict())
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    pixels = pixels_for(handle)
    assert torch.equal(logits_of(stock, pixels), logits_of(handle.network, pixels))


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("conv_stem_deit_tiny", [set(), {0.1}, {0.2}]),
        ("mixer_b14", [{0.2}] * 3),
        ("vit_base_patch14_gap", [set(), {0.1}, {0.2}]),
    ],
)
def test_drop_path_of_each_block(name, rates):
    blocks = tiny(name, drop_path=0.2).network.blocks
    found = [{round(part.drop_prob, 6) for part in block.modules() if isinstance(part, DropPath)} for block in blocks]
    assert found == rates


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_nothing(name):
    handle = tiny(name)
    pixels, gradients = pixels_for(handle), []
    before = {key: value.clone() for key, value in handle.network.state_dict().items()}
    for recompute in (False, True):
        handle.network.load_state_dict(before)
        handle.network.zero_grad()
        handle.network.set_grad_checkpointing(recompute)
        handle.network.train()(pixels).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in handle.network.parameters()])
    for plain, recomputed_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed_gradient)


# runs without this package
READER = """
import sys
from pathlib import Path
import timm, torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

for folder in sorted(Path(sys.argv[1]).iterdir()):
    pixels, logits = load_file(folder / "pixels.tensors")["pixels"], {}
    own = any(folder.glob("*.py"))
    if own:
        try:
            AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise AssertionError(f"{folder} ran its code unasked")
    with torch.no_grad():
        if not own:
            logits["timm"] = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)
        model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=own).eval()
        logits["transformers"] = model(pixels).logits
        if own:
            assert model(pixels, labels=torch.tensor([0, 1])).loss > 0
            model.save_pretrained(folder / "again")
            again = AutoModelForImageClassification.from_pretrained(folder / "again", trust_remote_code=True)
            assert torch.equal(again.eval()(pixels).logits, logits["transformers"])
    assert list(model.config.id2label.values()) == ["ant", "bee", "cat", "dog", "eel"]
    assert AutoImageProcessor.from_pretrained(folder) is not None
    save_file(logits, folder / "logits.tensors")
assert not any(name.partition(".")[0] == "kd_hf" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """Every network, saved, with its logits in memory, and read by both libraries in a process without this package."""
    torch.manual_seed(0)
    root, made = tmp_path_factory.mktemp("artefacts"), {}
    for name in TINY:
        handle = tiny(name)
        handle.label_names = NAMES
        pixels = pixels_for(handle)
        save_student(handle, root / name)
        # another .safetensors beside the weights would be one too many for timm before 1.0.29
        save_file({"pixels": pixels}, root / name / "pixels.tensors")
        made[name] = (handle, pixels, logits_of(handle.network, pixels))
    modules = tmp_path_factory.mktemp("modules")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", textwrap.dedent(READER), str(root)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, made


@pytest.mark.parametrize("name", TINY)
def test_the_libraries_read_the_artefact_to_the_bit(artefacts, name):
    root, made = artefacts
    logits = load_file(root / name / "logits.tensors")
    assert logits.keys() == ({"transformers"} if name in OWN else {"timm", "transformers"})
    assert all(torch.equal(value, made[name][2]) for value in logits.values())
    assert bool(list((root / name).glob("*.py"))) == (name in OWN)


@pytest.mark.parametrize("name", TINY)
def test_load_model_reads_it_back_without_running_its_code(artefacts, name):
    root, made = artefacts
    saved, pixels, logits = made[name]
    for code in (root / name).glob("*.py"):
        code.write_text("raise RuntimeError('the code in the artefact was run')")
    handle = load_model(str(root / name), pretrained=True)
    assert torch.equal(logits_of(handle.network, pixels), logits)
    assert type(handle.network) is type(saved.network) and handle.label_names == NAMES
    for fact in ("preprocessing", "stages", "blocks", "prefix", "norm", "head", "dist_head", "parameters", "library"):
        assert getattr(handle.info, fact) == getattr(saved.info, fact), fact


@pytest.mark.parametrize("name", OWN)
def test_an_artefact_starts_another_training(artefacts, name):
    root, made = artefacts
    drop_path = None if name in NO_DROP_PATH else 0.2
    old, new = made[name][0].network, load_model(str(root / name), pretrained=True, num_classes=3, drop_path=drop_path)
    assert new.info.num_classes == 3 and new.label_names == ()
    assert new.network.get_submodule(new.info.head).weight.shape[0] == 3
    weights = new.network.state_dict()
    assert all(
        torch.equal(weights[key], value)
        for key, value in old.state_dict().items()
        if not key.startswith(("head", "fc", "linear", "classifier"))
    )
    assert any(isinstance(module, DropPath) for module in new.network.modules()) == bool(drop_path)
    if name not in CONVOLUTIONAL:  # a network of one size
        with pytest.raises(UserError, match="cannot be built: RuntimeError"):
            load_model(str(root / name), pretrained=True, image_size=112)


def test_code_of_others_runs_only_with_leave(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirs.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from transformers import PreTrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import ImageClassifierOutput

        class TheirConfig(PreTrainedConfig):
            model_type = "theirs"

        class TheirModel(PreTrainedModel):
            config_class = TheirConfig

            def __init__(self, config):
                super().__init__(config)
                self.head = nn.Linear(3, config.num_labels)
                self.post_init()

            def forward(self, pixel_values):
                return ImageClassifierOutput(logits=self.head(pixel_values.mean((2, 3))))
        """)
    )
    (folder / "config.json").write_text(
        '{"model_type": "theirs", "num_labels": 4, "auto_map": {"AutoConfig": "theirs.TheirConfig", '
        '"AutoModelForImageClassification": "theirs.TheirModel"}}'
    )
    with pytest.raises(UserError, match=r"brings code of its own \(theirs\).* trust_remote_code: true"):
        load_model(str(folder))
    handle = load_model(str(folder), trust_remote_code=True)
    assert handle.info.num_classes == 4
    assert logits_of(handle.network, torch.zeros(2, 3, 8, 8)).logits.shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "kd_hf/mixer_b16"}, "kd_hf has no network 'mixer_b16'. Did you mean 'mixer_b14'?"),
        ({"model": "kd_hf/resnet9000"}, "kd_hf has no network 'resnet9000'. Did you mean 'resnet20'?"),
        ({"model": "kd_hf/mixer_b14", "pretrained": True}, "is a random network of that type"),
        ({"model": "kd_hf/mixer_b14", "kwargs": {"patchsize": 7}}, "kwargs.patchsize: .* Did you mean 'patch_size'?"),
        ({"model": "kd_hf/mixer_b14", "image_size": 225}, "image_size 225 is no multiple of patch_size 14"),
        ({"model": "kd_hf/conv_stem_deit_tiny", "image_size": 100}, "image_size 100 is no multiple of 16"),
        ({"model": "kd_hf/mobilenetv1_relu", "kwargs": {"act": 1}}, "kwargs.act: EfficientNet .* takes no such"),
        ({"model": "kd_hf/vit_base_patch14_gap", "kwargs": {"dept": 1}}, "kwargs.dept: Eva .* Did you mean 'depth'?"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        load_model(**{"device": "meta", **arguments})
    assert "\n" not in str(caught.value)


def test_a_resnet_for_small_images_is_timms_behind_its_stem():
    handle = load_model("kd_hf/resnet18_cifar", num_classes=100)
    assert handle.info.parameters == 11_220_132  # the usual count of ResNet-18 for CIFAR-100
    assert load_model("kd_hf/resnet34_cifar", num_classes=100, device="meta").info.parameters == 21_328_292
    pixels = torch.randn(2, 3, 32, 32)
    shapes = tap_shapes(TappedModel(handle, handle.info, ("stage:1", "stage:3", "stage:4")), 32)
    assert shapes == {"stage:1": (64, 32, 32), "stage:3": (256, 8, 8), "stage:4": (512, 4, 4)}
    stock = timm.create_model("resnet18", num_classes=100).eval()
    weights = handle.network.state_dict()
    stock.load_state_dict({**weights, "conv1.weight": stock.conv1.weight.detach()})
    stem = functional.conv2d(pixels, weights["conv1.weight"], padding=1)
    with torch.no_grad():
        value = stock.act1(stock.bn1(stem))
        for stage in (stock.layer1, stock.layer2, stock.layer3, stock.layer4):
            value = stage(value)
        expected = stock.fc(stock.global_pool(value))
    assert logits_of(handle.network, pixels).equal(expected)


def test_shufflenetv2_is_torchvisions():
    from torchvision.models import shufflenet_v2_x1_0

    ours, theirs = load_model("kd_hf/shufflenetv2_x1", num_classes=5), shufflenet_v2_x1_0(num_classes=5)
    theirs.load_state_dict(ours.network.state_dict())
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits_of(ours.network, pixels), logits_of(theirs, pixels))
