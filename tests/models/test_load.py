import json

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.recipe.config import PreprocessingConfig
from tests.hub.server import serve
from tests.models.families import HF_SWIN, HF_TWO_HEADS, HF_VIT, VIT


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache and no network: what is not in the cache cannot be had."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def into_cache(cache, repository, handle, revision="main"):
    """Lay an artefact into the Hub cache as a download would have."""
    root = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    save_student(handle, root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)


def vit(**options):
    return load_model("deit_tiny_patch16_224", num_classes=5, image_size=32, kwargs=VIT, **options)


def equal(left, right):
    tensors, others = left.network.state_dict(), right.network.state_dict()
    return tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "resnet18.a1_in1k", "timm/resnet18.a1_in1k"])
def test_architecture_names(name):
    handle = load_model(name, num_classes=7, device="meta")
    assert (handle.info.library, handle.info.num_classes, handle.info.name) == ("timm", 7, name)
    assert type(handle.network).__name__ == "ResNet"
    assert handle.origin.architecture == name.removeprefix("timm/") and handle.label_names == ()
    assert not handle.network.training


def test_facts_of_a_timm_name_come_from_its_configuration():
    facts = load_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", device="meta").info.preprocessing
    assert (facts.image_size, facts.mean, facts.interpolation, facts.crop_pct) == (224, (0.5,) * 3, "bicubic", 0.9)


def test_image_size_reaches_the_networks_that_are_built_for_one():
    assert vit().network.patch_embed.grid_size == (2, 2)
    assert vit().info.preprocessing.image_size == 32
    handle = load_model("test_resnet", image_size=48)
    assert handle.info.preprocessing.image_size == 48 and "img_size" not in handle.origin.kwargs
    handle = load_model("transformers/vit", image_size=64, kwargs=HF_VIT, device="meta")
    assert handle.network.config.image_size == handle.info.preprocessing.image_size == 64
    handle = load_model("transformers/resnet", image_size=64, device="meta")
    assert handle.info.preprocessing.image_size == 64


def test_preprocessing_overrides():
    own = load_model("test_resnet").info.preprocessing
    changed = load_model("test_resnet", preprocessing=PreprocessingConfig(mean=(0, 0, 0), crop_pct=1.0))
    facts = changed.info.preprocessing
    assert (facts.mean, facts.crop_pct) == ((0, 0, 0), 1.0)
    assert (facts.std, facts.interpolation) == (own.std, own.interpolation)
    plain = load_model("transformers/resnet", device="meta").info.preprocessing
    assert plain.mean == (0.485, 0.456, 0.406) and plain.image_size == 224


def test_drop_path():
    blocks = vit(drop_path=0.2).network.blocks
    assert [block.drop_path1.drop_prob for block in blocks[1:]] == pytest.approx([0.1, 0.2])
    handle = load_model("transformers/swin", kwargs=HF_SWIN, image_size=32, drop_path=0.3)
    assert handle.network.config.drop_path_rate == 0.3
    for name in ("vgg11", "transformers/vit"):
        with pytest.raises(UserError, match=rf"drop_path: model '{name}' has no stochastic depth"):
            load_model(name, drop_path=0.1, device="meta")


@pytest.mark.parametrize("name", ["swin_large_patch4_window7_224", "transformers/vit", "beit_base_patch16_224"])
def test_meta_uses_no_memory(name):
    network = load_model(name, device="meta").network
    assert all(tensor.device.type == "meta" for tensor in network.state_dict().values())


def test_device():
    assert next(load_model("test_resnet", device="cpu").network.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet81"}, "timm has no architecture 'resnet81'. Did you mean 'resnet"),
        ({"model": "timm/resnet81"}, "timm has no architecture 'resnet81'. Did you mean 'resnet"),
        ({"model": "resnet18.a1_in2k"}, "timm has no weights 'resnet18.a1_in2k'. Did you mean 'resnet18.a1_in1k'?"),
        ({"model": "transformers/vot"}, "transformers has no model type 'vot'"),
        ({"model": "transformers/vit", "pretrained": True}, "random network of that type"),
        ({"model": "transformers/bert"}, "cannot be built: ValueError: Unrecognized configuration class"),
        ({"model": "./nowhere"}, "there is no config.json in that folder"),
        ({"model": "local-dir:nowhere"}, "there is no config.json in that folder"),
        ({"model": "a/b/c"}, "neither a folder nor a valid Hub id"),
        ({"model": "org/name"}, "is not in the cache and the Hub cannot be reached"),
        ({"model": "resnet18.a1_in1k", "pretrained": True}, "`hf download timm/resnet18.a1_in1k`"),
        ({"model": "resnet18", "pretrained": True}, "is not in the cache and the Hub cannot be reached"),
        ({"model": "test_vit", "kwargs": {"num_head": 2}}, "kwargs.num_head: VisionTransformer of model 'test_vit'"),
        ({"model": "test_vit", "kwargs": {"num_head": 2}}, "Did you mean 'num_heads'?"),
        (
            {"model": "mixer_s32_224", "kwargs": {"num_blocks": 2}},
            "kwargs.num_blocks: the architecture 'mixer_s32_224'",
        ),
        ({"model": "transformers/vit", "kwargs": {"hidden": 2}}, "Did you mean 'hidden_act'?"),
        ({"model": "transformers/vit", "kwargs": {"hidden_size": "wide"}}, "hidden_size"),
        ({"model": "test_vit", "kwargs": {"num_heads": 7}}, "model 'test_vit' cannot be built"),
        ({"model": "swin_tiny_patch4_window7_224", "kwargs": {"depths": 3}}, "cannot be built: TypeError"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        load_model(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_without_weights_on_the_hub_is_refused():
    bare = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(name))
    with pytest.raises(UserError, match="names no Hub repository"):
        load_model(bare, pretrained=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process asks."""
    with serve(tmp_path / "server") as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/missing", None, "is neither a folder nor a repository on the Hub"),
        ("org/gated", None, "is gated: accept its terms on https://huggingface.co/org/gated"),
        ("org/open", "v9", "has no revision 'v9'"),
        ("org/odd", None, "could not be downloaded: BadRequestError"),
        ("org/open", None, "config.json has neither `architecture` (timm) nor `model_type`"),
    ],
)
def test_what_the_hub_refuses_is_explained(name, revision, message, hub):
    for repository in ("org/gated", "org/open", "org/odd"):
        hub.store.write("models", repository, {"config.json": b"{}"})
    hub.store.change("models", "org/gated", gated="manual")
    hub.fail("status", "^GET .*org/odd", status=400)
    with pytest.raises(UserError) as caught:
        load_model(name, revision=revision)
    assert message in str(caught.value)


@pytest.mark.parametrize("scheme", ["", "hf-hub:"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_hub_ids_of_both_libraries_by_revision(library, scheme, hub_cache):
    torch.manual_seed(0)
    made = vit() if library == "timm" else load_model("transformers/vit", num_classes=5, image_size=32, kwargs=HF_VIT)
    into_cache(hub_cache, "org/name", made, revision="v1")
    handle = load_model(f"{scheme}org/name", pretrained=True, revision="v1")
    assert equal(handle, made) and handle.info.library == library
    assert handle.info.preprocessing == made.info.preprocessing
    assert not equal(load_model(f"{scheme}org/name", revision="v1"), made)
    assert load_model(f"{scheme}org/name", pretrained=True, revision="v1", device="meta").info.num_classes == 5


def test_folders_and_run_folders(tmp_path):
    torch.manual_seed(0)
    made = vit()
    save_student(made, tmp_path / "run" / "student")
    for name in (f"{tmp_path}/run/student", f"local-dir:{tmp_path}/run/student", f"{tmp_path}/run"):
        assert equal(load_model(name, pretrained=True), made)
    assert not equal(load_model(f"{tmp_path}/run"), made)


def test_weights_are_adapted_to_another_head_and_size(tmp_path):
    made = vit()
    save_student(made, tmp_path / "student")
    handle = load_model(str(tmp_path), pretrained=True, num_classes=9, image_size=64)
    assert handle.network.head.out_features == 9 and handle.label_names == ()
    assert handle.network.patch_embed.grid_size == (4, 4)
    assert torch.equal(handle.network.blocks[0].attn.qkv.weight, made.network.blocks[0].attn.qkv.weight)


def test_transformers_weights_take_a_new_head_but_no_new_size(tmp_path):
    made = load_model("transformers/vit", num_classes=5, image_size=32, kwargs=HF_VIT)
    save_student(made, tmp_path / "student")
    handle = load_model(str(tmp_path), pretrained=True, num_classes=9)
    assert handle.network.classifier.out_features == handle.info.num_classes == 9
    assert torch.equal(handle.network.vit.layers[0].mlp.fc1.weight, made.network.vit.layers[0].mlp.fc1.weight)
    with pytest.raises(UserError, match="position_embeddings has another shape in the weights"):
        load_model(str(tmp_path), pretrained=True, image_size=64)


def test_weights_that_lack_a_layer_are_refused(tmp_path):
    made = load_model("transformers/vit", num_classes=5, image_size=32, kwargs=HF_VIT)
    save_student(made, tmp_path / "student")
    tensors = {key: value for key, value in made.network.state_dict().items() if "layers.1." not in key}
    save_file(tensors, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the weights lack vit\.layers\.1\."):
        load_model(str(tmp_path), pretrained=True)


def test_pickles_are_refused(tmp_path):
    save_student(vit(), tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "student" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no safetensors weights .* pickles are not loaded"):
        load_model(str(tmp_path), pretrained=True)


@pytest.mark.parametrize("name", ["vit", "transformers/vit"])
def test_pickles_are_read_where_they_are_allowed(tmp_path, name):
    made = vit() if name == "vit" else load_model(name, num_classes=5, image_size=32, kwargs=HF_VIT)
    folder = tmp_path / "snapshots" / "a1b2"
    save_student(made, folder)
    (folder / "model.safetensors").unlink()
    torch.save(made.network.state_dict(), folder / "pytorch_model.bin")
    handle = load_model(str(folder), pretrained=True, allow_pickle=True)
    expected = made.network.state_dict()
    assert all(value.equal(expected[key]) for key, value in handle.network.state_dict().items())
    assert handle.origin.revision == "a1b2"


def test_a_pickle_of_more_than_tensors_is_never_unpickled(tmp_path):
    save_student(vit(), tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").unlink()
    torch.save({"weight": json.JSONDecoder}, tmp_path / "student" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no plain state dict of tensors"):
        load_model(str(tmp_path), pretrained=True, allow_pickle=True)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("{}", "has neither `architecture`")])
def test_broken_folders(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2},
            (48, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, "squash"),
        ),
        (
            {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56}},
            (56, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875, "center"),
        ),
        (
            {"size": {"shortest_edge": 32}, "crop_pct": 0.9, "do_normalize": False},
            (32, (0.0,) * 3, (1.0,) * 3, "bicubic", 0.9, "center"),
        ),
        ({"size": 40}, (40, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 1.0, "squash")),
    ],
)
def test_image_processors_are_understood(tmp_path, processor, expected):
    save_student(load_model("transformers/vit", image_size=32, kwargs=HF_VIT), tmp_path / "student")
    (tmp_path / "student" / "preprocessor_config.json").write_text(json.dumps(processor))
    facts = load_model(str(tmp_path)).info.preprocessing
    found = (facts.image_size, facts.mean, facts.std, facts.interpolation, facts.crop_pct, facts.crop_mode)
    assert found == expected


def test_class_names_come_with_the_weights(tmp_path):
    made = vit()
    made.label_names = ("ant", "bee", "cat", "dog", "eel")
    save_student(made, tmp_path / "student")
    assert load_model(str(tmp_path), pretrained=True).label_names == made.label_names
    names = load_model("resnet18", pretrained=True, device="meta").label_names
    assert len(names) == 1000 and names[0] == "n01440764"


def test_several_classes_of_one_model_type():
    assert type(load_model("transformers/deit", device="meta").network).__name__ == "DeiTForImageClassification"
    handle = load_model("transformers/deit", kwargs=HF_TWO_HEADS, image_size=32)
    assert handle.info.dist_head == "distillation_classifier" and handle.info.prefix == ("cls", "dist")
