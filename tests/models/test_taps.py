import copy
import pickle

import pytest
import torch
from torch import nn

from kd_hf.errors import UserError
from kd_hf.info import Preprocessing
from kd_hf.models.handle import describe_torch
from kd_hf.models.parts import live_part
from kd_hf.models.recompute import enable_checkpointing
from kd_hf.models.taps import TappedModel, available_taps, check_tap, tap_shapes
from tests.models.families import (
    TIMM_PLAIN,
    TIMM_PYRAMID,
    TRANSFORMERS_PLAIN,
    TRANSFORMERS_PYRAMID,
    tiny_timm,
    tiny_transformers,
)


def images(size, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def tapped(handle, taps=None, **options):
    return TappedModel(handle, handle.info, available_taps(handle.info) if taps is None else taps, **options)


def same(left, right):
    return left.shape == right.shape and torch.equal(left, right)


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_PLAIN)
def test_plain_timm_networks_agree_with_timm_itself(name):
    handle, size = tiny_timm(name)
    network, info, x = handle.network, handle.info, images(size)
    model = tapped(handle)
    outputs = model(x)
    features, maps = network.forward_intermediates(x)
    assert same(outputs.logits, network(x)) and outputs.dist_logits is None
    assert info.depth == len(maps) and len(info.prefix) == features.shape[1] - maps[-1][0, 0].numel()
    for index, expected in enumerate(maps):
        block = outputs.taps[f"block:{index}"][:, len(info.block_prefix) :]
        assert same(block, expected.flatten(2).transpose(1, 2))
    tokens = outputs.taps["tokens"]
    assert same(tokens, features)
    assert same(outputs.taps["tokens:patch"], features[:, len(info.prefix) :])
    assert same(outputs.taps["stage:1"].flatten(2).transpose(1, 2), features[:, len(info.prefix) :])
    assert outputs.taps["stage:1"].shape[1:] == (info.stages[0].channels, *maps[-1].shape[2:])
    for index, token in enumerate(info.prefix):
        assert same(outputs.taps[f"tokens:{token}"], features[:, index])
    logits = network.get_submodule(info.head)(outputs.taps["pre_logits"])
    if info.dist_head:
        logits = (logits + network.get_submodule(info.dist_head)(outputs.taps["tokens:dist"])) / 2
    assert same(logits, outputs.logits)
    shapes = tap_shapes(model, size)
    assert shapes == {tap: tuple(value.shape[1:]) for tap, value in outputs.taps.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_PYRAMID)
def test_timm_pyramids_agree_with_timm_itself(name):
    handle, size = tiny_timm(name)
    network, info, x = handle.network, handle.info, images(size)
    outputs = tapped(handle)(x)
    features, maps = network.forward_intermediates(x)
    assert same(outputs.logits, network(x))
    stages = [outputs.taps[f"stage:{index + 1}"] for index in range(len(info.stages))]
    assert len(stages) >= 4 and info.depth == 0
    for stage, facts, expected in zip(stages, info.stages, maps[-len(stages) :], strict=True):
        assert same(stage, expected) and stage.shape[1] == facts.channels
    assert same(outputs.taps["pre_logits"], network.forward_head(features, pre_logits=True))
    if info.norm:
        assert same(outputs.taps["tokens"], features.flatten(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", [*TIMM_PYRAMID, *TRANSFORMERS_PYRAMID])
def test_no_later_layer_overwrites_a_stage(name):
    handle = tiny_transformers(name) if name in TRANSFORMERS_PYRAMID else tiny_timm(name)[0]
    copies = {}
    for stage in handle.info.stages:

        def keep(module, args, output, path=stage.path):
            copies[path] = (output[0] if isinstance(output, tuple) else output).clone()

        handle.network.get_submodule(stage.path).register_forward_hook(keep)
    outputs = tapped(handle).train()(images(handle.info.preprocessing.image_size))
    for index, stage in enumerate(handle.info.stages):
        value = outputs.taps[f"stage:{index + 1}"]
        flat = {"NCHW": lambda x: x, "NHWC": lambda x: x.permute(0, 2, 3, 1), "NLC": lambda x: x.flatten(2).mT}
        assert same(flat[stage.layout](value), copies[stage.path])


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "test_resnet", "regnety_002", "mobilenetv1_100", "resnet"])
def test_before_its_last_relu_a_stage_is_signed_and_the_relu_makes_the_stage_of_it(name):
    """Also where that ReLU works in place, and with the BatchNorm that scales it as a part."""
    handle = tiny_transformers(name) if name in TRANSFORMERS_PYRAMID else tiny_timm(name)[0]
    norms = [live_part(handle, f"norm:preact:{index + 1}") for index in range(len(handle.info.stages))]
    for norm in norms:  # timm starts the last one of a block with weight 0, which leaves the shortcut
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias, -2, 0)
    outputs = tapped(handle).train()(images(handle.info.preprocessing.image_size))
    for index, (stage, norm) in enumerate(zip(handle.info.stages, norms, strict=True)):
        before, after = (outputs.taps[f"{kind}:{index + 1}"] for kind in ("preact", "stage"))
        activation = nn.ReLU6() if name == "mobilenetv1_100" else nn.ReLU()
        assert same(activation(before), after) and (before < 0).any()
        assert isinstance(norm, nn.BatchNorm2d) and norm.num_features == stage.channels


@pytest.mark.parametrize("name", ["mobilenetv2_050", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_stages_that_end_in_no_relu_have_nothing_before_it(name):
    info = tiny_timm(name)[0].info
    with pytest.raises(UserError, match=r"'preact:1' does not exist in .* It has: stage:1 … stage:\d, "):
        check_tap(info, "preact:1")


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("mobilenetv1_100", [64, 128, 256, 512, 1024]),
        ("mobilenetv3_small_050", [8, 16, 24, 288]),
        ("efficientnet_b0", [16, 24, 40, 112, 320]),
        ("convnext_atto", [40, 80, 160, 320]),
    ],
)
def test_stages_start_after_the_stem(name, channels):
    handle, _ = tiny_timm(name)
    assert [stage.channels for stage in handle.info.stages] == channels


@torch.no_grad()
@pytest.mark.parametrize("key", TRANSFORMERS_PLAIN)
def test_plain_transformers_networks_agree_with_their_hidden_states(key):
    handle = tiny_transformers(key)
    network, info, x = handle.network, handle.info, images(32)
    outputs = tapped(handle)(x)
    reference = network(x, output_hidden_states=True)
    assert same(outputs.logits, reference.logits)
    assert info.depth == 3
    for index in range(3):
        assert same(outputs.taps[f"block:{index}"], reference.hidden_states[index + 1])
    final = network.base_model(x).last_hidden_state
    assert same(outputs.taps["tokens"], final)
    assert same(outputs.taps["stage:1"].flatten(2).transpose(1, 2), final[:, len(info.prefix) :])
    logits = network.get_submodule(info.head)(outputs.taps["pre_logits"])
    assert same(logits, reference.cls_logits if info.dist_head else reference.logits)


@torch.no_grad()
@pytest.mark.parametrize("key", TRANSFORMERS_PYRAMID)
def test_transformers_pyramids_agree_with_their_hidden_states(key):
    handle = tiny_transformers(key)
    network, info, x = handle.network, handle.info, images(32)
    outputs = tapped(handle)(x)
    assert same(outputs.logits, network(x).logits)
    if key.startswith("swin"):
        option = {"output_hidden_states_before_downsampling": True}
        expected = network.base_model.encoder(*_swin_input(network, x), output_hidden_states=True, **option)
        expected = expected.reshaped_hidden_states[1:]
        assert same(outputs.taps["tokens"], network.base_model(x).last_hidden_state)
    else:
        expected = network(x, output_hidden_states=True).hidden_states[1:]
    stages = [outputs.taps[f"stage:{index + 1}"] for index in range(len(info.stages))]
    assert len(stages) == len(expected)
    assert all(same(stage, value) for stage, value in zip(stages, expected, strict=True))
    assert [stage.shape[1] for stage in stages] == [stage.channels for stage in info.stages]


def _swin_input(network, x):
    return network.base_model.embeddings(x)


def test_prefix_tokens_have_names():
    prefixes = {name: tiny_timm(name)[0].info.prefix for name in ("test_vit", "test_vit2", "mixer_s32_224")}
    assert prefixes == {"test_vit": ("cls",), "test_vit2": ("reg0",), "mixer_s32_224": ()}
    distilled = tiny_timm("deit_tiny_distilled_patch16_224")[0].info
    assert (distilled.prefix, distilled.head, distilled.dist_head) == (("cls", "dist"), "head", "head_dist")
    cait = tiny_timm("cait_xxs24_224")[0].info
    assert (cait.prefix, cait.block_prefix) == (("cls",), ())
    registers = tiny_transformers("dinov2-registers").info.prefix
    assert registers == ("cls", "reg0", "reg1", "reg2", "reg3")


def test_negative_indices_count_from_the_end():
    handle, size = tiny_timm("test_vit")
    taps = tapped(handle, ["block:-1", "block:5", "stage:-1", "stage:1", "block:-6", "block:0"])(images(size)).taps
    assert same(taps["block:-1"], taps["block:5"])
    assert same(taps["stage:-1"], taps["stage:1"])
    assert same(taps["block:-6"], taps["block:0"])
    assert not same(taps["block:0"], taps["block:5"])


def test_a_module_tap_is_what_the_module_returned_even_if_the_next_works_in_place():
    handle, size = tiny_timm("resnet18")
    network, x = handle.network, images(size)
    value = tapped(handle, ["module:bn1"])(x).taps["module:bn1"]
    assert same(value, network.bn1(network.conv1(x)))
    assert value.min() < 0  # the ReLU after it works in place


@pytest.mark.parametrize(
    ("name", "tap", "parts"),
    [
        ("resnet18", "stage:5", ["stage:5", "stage:1 … stage:4", "pre_logits"]),
        ("resnet18", "stage:0", ["stage:1 … stage:4"]),
        ("resnet18", "block:0", ["block:0", "stage:1"]),
        ("resnet18", "tokens:cls", ["tokens:cls"]),
        ("resnet18", "module:layer4.7", ["layer4.7", "Did you mean 'layer4."]),
        ("test_vit", "block:6", ["block:0 … block:5"]),
        ("test_vit", "tokens:dist", ["tokens:cls"]),
        ("test_vit", "tokns:cls", ["Did you mean 'tokens:cls'?"]),
        ("test_vit", "stage:one", ["stage:1"]),
        ("test_vit", "pre_logits:x", ["pre_logits"]),
        ("test_vit", "", ["tokens"]),
    ],
)
def test_a_tap_that_does_not_exist_is_refused_with_those_that_do(name, tap, parts):
    info = tiny_timm(name)[0].info
    with pytest.raises(UserError) as caught:
        check_tap(info, tap)
    assert all(part in str(caught.value) for part in [*parts, name])


def test_every_available_tap_passes_the_check():
    info = tiny_timm("deit_tiny_distilled_patch16_224")[0].info
    for tap in [*available_taps(info), "module:blocks.0.attn"]:
        check_tap(info, tap)


def test_a_tap_that_does_not_fire_is_an_error_at_that_step():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3, 4)
            self.unused = nn.Linear(3, 4)

        def forward(self, x):
            return self.used(x.mean((2, 3)))

    network = Skips()
    info = describe_torch(network, "skips", 4, Preprocessing())
    model = TappedModel(network, info, ["module:unused"])
    with pytest.raises(UserError, match=r"'module:unused' did not fire in the forward pass.*'unused'"):
        model(images(4))


def test_nothing_is_kept_between_calls_and_only_what_was_asked_is_caught():
    handle, size = tiny_timm("test_vit")
    model = tapped(handle, ["block:0"])
    assert list(model(images(size)).taps) == ["block:0"]
    assert model._recorder.caught == {}
    handle.network(images(size))
    assert model._recorder.caught == {}
    assert tapped(handle, [])(images(size)).taps == {}


def test_state_dict_keys_and_parameters_are_the_networks():
    handle, _ = tiny_timm("test_resnet")
    model = tapped(handle)
    assert model.network is handle.network
    assert list(model.state_dict()) == [f"network.{key}" for key in handle.network.state_dict()]


def test_gradients_flow_through_taps():
    handle, size = tiny_timm("deit_tiny_patch16_224")
    model = tapped(handle, ["block:1"])
    model(images(size)).taps["block:1"].square().sum().backward()
    network = handle.network
    assert network.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
    assert network.blocks[2].mlp.fc2.weight.grad is None and network.head.weight.grad is None


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_autocast_and_modes(kind):
    handle, size = tiny_timm("test_resnet")
    model = tapped(handle).train(kind == "train")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images(size))
    assert outputs.logits.dtype == torch.bfloat16 and torch.isfinite(outputs.taps["stage:2"]).all()


@pytest.mark.parametrize("source", ["deit_tiny_distilled_patch16_224", "test_resnet", "efficientnet_b0", "vit"])
def test_gradient_checkpointing_changes_no_value_and_no_gradient(source):
    handle = tiny_transformers(source) if source == "vit" else tiny_timm(source)[0]
    size = handle.info.preprocessing.image_size
    model = tapped(handle).train()

    def step():
        model.zero_grad()
        torch.manual_seed(0)
        outputs = model(images(size))
        (outputs.logits.sum() + sum(value.square().mean() for value in outputs.taps.values())).backward()
        return outputs, [parameter.grad for parameter in model.parameters()]

    plain, expected = step()
    enable_checkpointing(handle.network)
    recomputed, gradients = step()
    assert all(same(value, recomputed.taps[tap]) for tap, value in plain.taps.items())
    assert all(same(left, right) for left, right in zip(expected, gradients, strict=True))
    assert model._recorder.caught == {}


@pytest.mark.parametrize("source", ["deit_tiny_distilled_patch16_224", "test_resnet", "swin", "vit"])
def test_compile_needs_no_graph_break(source):
    handle = tiny_transformers(source) if source in TRANSFORMERS_PLAIN | TRANSFORMERS_PYRAMID else tiny_timm(source)[0]
    model = tapped(handle, dist_head=handle.info.dist_head is not None).eval()
    x = images(handle.info.preprocessing.image_size)
    torch._dynamo.reset()
    outputs, expected = torch.compile(model, backend="eager", fullgraph=True)(x), model(x)
    assert same(outputs.logits, expected.logits)
    assert all(same(outputs.taps[tap], value) for tap, value in expected.taps.items())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_hooks_of_its_own(copier):
    handle, size = tiny_timm("test_vit")
    model = tapped(handle, ["block:0", "pre_logits"])
    twin = copier(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    model._recorder.armed = True
    outputs = twin(images(size))
    assert model._recorder.caught == {}
    features = twin.network.forward_features(images(size))
    assert same(outputs.taps["pre_logits"], twin.network.forward_head(features, pre_logits=True))
    assert not same(outputs.taps["block:0"], model(images(size)).taps["block:0"])


def test_ddp_gives_the_same_outputs_and_gradients(tmp_path):
    handle, size = tiny_timm("test_resnet")
    model = tapped(handle, ["stage:2", "pre_logits"])

    def loss(outputs):
        return outputs.logits.sum() + outputs.taps["stage:2"].mean()

    loss(model(images(size))).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        outputs = nn.parallel.DistributedDataParallel(model)(images(size))
        loss(outputs).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(same(parameter.grad, value) for parameter, value in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("source", ["deit_tiny_distilled_patch16_224", "deit-two-heads"])
def test_two_heads_are_apart_only_when_asked_and_in_train_mode(source):
    handle = tiny_timm(source)[0] if source in TIMM_PLAIN else tiny_transformers(source)
    x = images(handle.info.preprocessing.image_size)
    taps = ["tokens:cls", "tokens:dist"]
    model = tapped(handle, taps, dist_head=True).train()
    outputs = model(x)
    heads = [handle.network.get_submodule(path) for path in (handle.info.head, handle.info.dist_head)]
    assert same(outputs.logits, heads[0](outputs.taps["tokens:cls"]))
    assert same(outputs.dist_logits, heads[1](outputs.taps["tokens:dist"]))
    mean = (outputs.logits + outputs.dist_logits) / 2
    evaluated = model.eval()(x)
    assert evaluated.dist_logits is None and same(evaluated.logits, mean)
    together = tapped(handle, taps).train()(x)
    assert together.dist_logits is None and same(together.logits, mean)


def calls_of(network):
    """Names of the modules that run from now on, in the order they begin."""
    called = []
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "taps", "left_out"),
    [
        ("resnet18", ["stage:2"], ["layer3", "layer4", "fc"]),
        ("resnet18", ["stage:2", "stage:1"], ["layer3", "layer4", "fc"]),  # not in the order in which they come
        ("deit_tiny_patch16_224", ["block:0", "block:1"], ["blocks.2", "norm", "head"]),
        ("deit_tiny_patch16_224", ["tokens"], ["head"]),
        ("deit_tiny_patch16_224", ["pre_logits"], ["head.bias"]),
        ("swin_tiny_patch4_window7_224", ["stage:3"], ["layers.3", "head"]),
        ("vit", ["block:1"], ["vit.layers.2", "vit.encoder.layer.2", "classifier"]),
        ("swin", ["stage:1"], ["classifier"]),
    ],
)
def test_a_pass_of_which_only_taps_are_read_stops_after_the_last(network, taps, left_out):
    build = tiny_transformers if network in TRANSFORMERS_PLAIN or network in TRANSFORMERS_PYRAMID else None
    handle = build(network) if build else tiny_timm(network)[0]
    x = images(handle.info.preprocessing.image_size)
    model = tapped(handle, taps).eval()
    expected = model(x)
    called = calls_of(handle.network)
    for _ in range(2):
        outputs = model(x, whole=False)
        assert outputs.logits.shape == (2, 0) and outputs.dist_logits is None
        assert all(same(outputs.taps[tap], expected.taps[tap]) for tap in taps)
    assert called and not set(called) & set(left_out)
    assert same(model(x).logits, expected.logits)  # and a whole pass is whole again


@torch.no_grad()
def test_a_module_that_runs_twice_is_waited_for():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail, self.fc = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.tail(self.body(self.body(x.mean((2, 3))))))

    network = Twice()
    model = TappedModel(network, describe_torch(network, "twice", 4, Preprocessing()), ["module:body"])
    x = images(8)
    expected = model(x).taps["module:body"]
    called = calls_of(network)
    assert same(model(x, whole=False).taps["module:body"], expected)
    assert called == ["", "body", "body"]


@torch.no_grad()
def test_the_first_pass_is_whole_because_nobody_knows_yet_where_to_stop():
    handle, size = tiny_timm("resnet18")
    model, called = tapped(handle, ["stage:1"]).eval(), calls_of(handle.network)
    first = model(images(size), whole=False)
    assert called.pop() == "fc" and first.logits.shape == (2, 0)
    called.clear()
    assert same(model(images(size), whole=False).taps["stage:1"], first.taps["stage:1"])
    assert called[-1].startswith("layer1")


def test_an_error_of_the_network_is_no_early_end():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            raise ZeroDivisionError

    network = Broken()
    model = TappedModel(network, describe_torch(network, "broken", 4, Preprocessing()), ["module:fc"])
    with pytest.raises(ZeroDivisionError):
        model(images(8), whole=False)


def test_dist_head_needs_one():
    handle, _ = tiny_timm("test_vit")
    with pytest.raises(UserError, match="test_vit has no distillation head"):
        tapped(handle, dist_head=True)


@pytest.mark.parametrize("output", [tuple, lambda pair: {"logits": pair[0]}])
def test_networks_that_return_a_tuple_or_a_mapping(output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return output((self.fc(x.mean((2, 3))), x))

    network = Wrapped()
    info = describe_torch(network, "wrapped", 4, Preprocessing())
    outputs = TappedModel(network, info, ["pre_logits"])(images(8))
    assert same(outputs.logits, network.fc(outputs.taps["pre_logits"]))


def test_tap_shapes_leaves_batchnorm_and_modes_alone():
    handle, size = tiny_timm("test_resnet")
    model = tapped(handle).train()
    model.network.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert tap_shapes(model, size)["stage:1"] == (32, size // 4, size // 4)
    assert [module.training for module in model.modules()] == modes
    assert all(same(before[key], value) for key, value in model.state_dict().items())


def test_a_wide_image_gives_a_wide_map():
    handle, _ = tiny_timm("deit_tiny_patch16_224", dynamic_img_size=True)
    x = torch.randn(1, 3, 32, 64)
    taps = tapped(handle, ["stage:1", "tokens:patch"])(x).taps
    assert taps["stage:1"].shape == (1, 32, 2, 4)
    assert same(taps["stage:1"].flatten(2).transpose(1, 2), taps["tokens:patch"])
