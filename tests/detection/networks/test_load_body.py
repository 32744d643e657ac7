"""``student.body``: a detector that begins with a classifier's weights, from folders and from a Hub, and mistakes."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from huggingface_hub import constants

from kd_hf.detection.networks.load import load_detector
from kd_hf.detection.networks.vidt_body_weights import fit_body
from kd_hf.distillation.assembly import assemble, load_network
from kd_hf.distillation.summary import announce
from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.plan.describe import describe, plan_recipe
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.resolved import dump_recipe, recipe_hash
from kd_hf.tasks import open_task
from kd_hf.train.smoke import smoke_recipe
from tests.detection.detectors import TINY
from tests.hub.server import serve
from tests.runs import ROOT, recipe

ARCHITECTURE, ON_HUB = "swin_tiny_patch4_window7_224", "timm/swin_tiny_patch4_window7_224.ms_in1k"
SWIN = {"embed_dim": 8, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
VIDT = {**TINY["kd_hf_vidt"], **SWIN, "window_size": 7}
BOXES = {"data": {"boxes": {}, "augment": {}, "image_size": None}}


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache and no network: what is not in the cache cannot be had."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


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


def write_swin(folder, seed=0, model=ARCHITECTURE, **changes):
    """A classifier's folder, with weights spread so that every one matters; returns its path as text."""
    torch.manual_seed(seed)
    handle = load_model(model, num_classes=3, kwargs={**SWIN, **changes} if model == ARCHITECTURE else changes)
    with torch.no_grad():
        for parameter in handle.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_student(handle, folder)
    return str(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def vidt(body=None, model="kd_hf/vidt_tiny", seed=1, **options):
    torch.manual_seed(seed)
    return load_detector(model, num_classes=5, kwargs=VIDT, body=body, **options)


def same(left, right):
    tensors, others = left.network.state_dict(), right.network.state_dict()
    return {name for name, value in tensors.items() if torch.equal(value, others[name])}


def detection(folder, *blocks) -> Recipe:
    return recipe(folder, BOXES, {"student": {"model": "kd_hf/vidt_tiny", "kwargs": VIDT, "num_classes": 5}}, *blocks)


def stages_of_timm(folder, pixels):
    """What timm's Swin makes of images at every stage but the first, ``[B, C, H, W]``."""
    network = timm.create_model(
        f"local-dir:{folder}", pretrained=True, features_only=True, img_size=tuple(pixels.shape[-2:])
    )
    with torch.no_grad():
        return [stage.permute(0, 3, 1, 2) for stage in network.double().eval()(pixels)][1:]


def maps_of(handle, pixels):
    """The same of a ViDT's body, without the map behind its own last merging."""
    padding = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
    with torch.no_grad():
        return handle.network.double().backbone(pixels, padding)[0][:-1]


def test_the_body_sees_what_timms_swin_sees(tmp_path):
    """Of sides that are multiples of 7 × 32; of 224 pixels timm would not shift the windows of the last stage."""
    folder = write_swin(tmp_path / "swin")
    pixels = torch.randn(1, 3, 448, 672, dtype=torch.float64)
    found, expected = maps_of(vidt(folder), pixels), stages_of_timm(folder, pixels)
    assert [tuple(stage.shape[1:]) for stage in expected] == [(16, 56, 84), (32, 28, 42), (64, 14, 21)]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(maps_of(vidt(), pixels)[0], expected[0], atol=0.1)


def test_all_else_stays_as_it_is_without_a_body(tmp_path):
    handle = vidt(write_swin(tmp_path / "swin"))
    kept = same(handle, vidt())
    begun = [name for name in handle.network.state_dict() if name not in kept]
    assert begun and all(name.startswith("backbone.") for name in begun)
    assert not any("det_" in name or name.startswith("backbone.layers.3.downsample") for name in begun)
    assert handle.note()["name"] == f"kd_hf/vidt_tiny with the body of {tmp_path / 'swin'}"
    assert handle.origin.pretrained and handle.origin.source == str(tmp_path / "swin")
    assert not handle.network.training


def test_a_run_folder_and_a_name_of_transformers_will_do(tmp_path):
    write_swin(tmp_path / "run/student")
    named = vidt(str(tmp_path / "run"))
    typed = vidt(str(tmp_path / "run"), model="transformers/kd_hf_vidt", pretrained=True)
    assert same(named, typed) == set(named.network.state_dict())


def test_the_weights_of_a_whole_detector_come_first(tmp_path):
    """The body, which does not exist here, is not looked for."""
    whole = vidt()
    whole.network.save_pretrained(tmp_path / "whole")
    folder, everything = str(tmp_path / "whole"), set(whole.network.state_dict())
    assert same(load_detector(folder, pretrained=True, body="no/where"), whole) == everything
    for student in ({"weights": folder}, {"model": folder, "kwargs": {}}):
        run = detection(tmp_path, {"student": {"body": "no/where", **student}})
        assert same(load_network(run.student, open_task(run), 5), whole) == everything
        assert "with the body" not in load_network(run.student, open_task(run), 5, "meta").info.name


@pytest.mark.parametrize(
    ("swin", "options", "message"),
    [
        (
            {"embed_dim": 16},
            {},
            r"does not fit this ViDT's body: \d+ of another shape: backbone.patch_embed.proj.weight 16×3×4×4 instead "
            r"of 8×3×4×4, ",
        ),
        (
            {"num_heads": (1, 1, 4, 8)},
            {},
            r"body: 2 of another shape: backbone.layers.1.blocks.0.attn.relative_position_bias_table 169×1 instead of "
            r"169×2, ",
        ),
        ({"depths": (1, 2, 3, 2)}, {}, r"body: 13 not known to the body: backbone.layers.2.blocks.2.norm1.weight, "),
        ({"depths": (1, 1, 2, 2)}, {}, r"body: 13 missing: backbone.layers.1.blocks.1.norm1.weight, "),
        ({"model": "test_vit"}, {}, "is no Swin of timm, and ViDT's body is one; give e.g. timm/swin_tiny_"),
        ({}, {"model": "transformers/detr", "kwargs": None}, "'transformers/detr' takes no weights for its body alone"),
    ],
)
def test_what_does_not_fit(tmp_path, swin, options, message):
    folder = write_swin(tmp_path / "swin", **swin)
    with pytest.raises(UserError, match=message) as caught:
        load_detector(**{"model": "kd_hf/vidt_tiny", "kwargs": VIDT, "body": folder, **options})
    assert str(caught.value).startswith("student.body: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("swin_tinny_patch4_window7_224", "student.body: .*Did you mean 'swin_tiny_patch4_window7_224'"),
        ("./nowhere", "student.body: model './nowhere': there is no config.json in that folder"),
        (ON_HUB, rf"student.body: .*is not in the cache and the Hub cannot be reached .*`hf download {ON_HUB}`"),
    ],
)
def test_what_is_not_there(body, message):
    with pytest.raises(UserError, match=message):
        vidt(body)


def test_a_recipe_reads_it_from_the_hub_at_a_revision(tmp_path, hub):
    """The name, its branch or commit, and the checksum are those of any network."""
    folder = write_swin(tmp_path / "first")
    first = hub.store.write("models", ON_HUB, files(tmp_path / "first"))
    write_swin(tmp_path / "second", seed=7)
    second = hub.store.write("models", ON_HUB, files(tmp_path / "second"))
    newest, older = (
        detection(tmp_path, {"student": {"body": ON_HUB, "revision": revision}}) for revision in (None, first)
    )
    parts = assemble(newest, 5)
    assert parts.student.note()["revision"] == second
    line, *_ = announce(parts, {"train": "", "eval": ""}, {}, "")
    assert f"student  kd_hf/vidt_tiny with the body of {ON_HUB} (" in line
    handle = load_network(older.student, open_task(older), 5)
    assert handle.note()["revision"] == first
    torch.manual_seed(1)
    weights = vidt(folder).network.backbone.state_dict()
    begun = [name for name in weights if "det_" not in name and not name.startswith("layers.3.downsample")]
    assert all(torch.equal(handle.network.backbone.state_dict()[name], weights[name]) for name in begun)
    with pytest.raises(UserError, match=rf"student.body: model '{ON_HUB}' has no revision 'v9'"):
        vidt(ON_HUB, revision="v9")


def test_a_damaged_download_is_fetched_again(tmp_path, hub):
    folder = write_swin(tmp_path / "swin")
    hub.store.write("models", "org/swin", files(tmp_path / "swin"))
    hub.fail("corrupt", "^GET /cdn/")
    handle = vidt("org/swin")
    assert same(handle, vidt(folder)) == set(handle.network.state_dict())
    assert len(hub.requests("^GET /cdn/")) == 2


def test_a_plan_and_a_smoke_run_download_nothing(tmp_path, hub):
    run = detection(tmp_path, {"student": {"body": ON_HUB}, "train": {"optim": "adamw"}})
    plan = plan_recipe(run)
    assert plan["networks"]["student"]["model"] == f"kd_hf/vidt_tiny with the body of {ON_HUB}"
    assert f"kd_hf/vidt_tiny with the body of {ON_HUB} (transformers)" in describe(plan)
    small = assemble(smoke_recipe(run, tmp_path / "small"), 5)
    assert small.student.note()["name"] == "kd_hf/vidt_tiny" and not small.student.origin.pretrained
    assert not hub.log


def test_the_recipe_says_so(tmp_path):
    run = detection(tmp_path, {"student": {"body": ON_HUB}})
    assert run.student.pretrained and recipe_hash(run) != recipe_hash(detection(tmp_path))
    (tmp_path / "resolved.yaml").write_text(dump_recipe(run))
    assert recipe_hash(load_recipe(tmp_path / "resolved.yaml")) == recipe_hash(run)
    without = detection(tmp_path, {"student": {"body": "no/where", "pretrained": False}})
    assert load_network(without.student, open_task(without), 5).note()["name"] == "kd_hf/vidt_tiny"
    with pytest.raises(UserError, match=r"student.body. is for detectors \(`data.boxes`\)"):
        load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"student.body={ON_HUB}"])


@pytest.mark.parametrize(
    ("name", "size"), [("vidt_tokens_tiny", "tiny"), ("vidt_tokens_small", "small"), ("vkd_vidt_tiny", "tiny")]
)
def test_vidts_recipes_begin_with_microsofts_swin(name, size):
    """The body that timm has under the recipe's name is of the student's sizes."""
    run = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert run.student.body == f"timm/swin_{size}_patch4_window7_224.ms_in1k" and run.student.pretrained
    file = timm.get_pretrained_cfg(run.student.body.removeprefix("timm/")).url
    assert file.endswith(f"storage/releases/download/v1.0.0/swin_{size}_patch4_window7_224.pth")
    detector = load_network(run.student, open_task(run), 91, "meta")
    swin = load_model(run.student.body, device="meta")
    assert len(fit_body(swin.network.state_dict(), detector.network.state_dict(), swin.info.name)) > 150


@pytest.mark.parametrize("name", ["vidt_tokens_nano", "vkd_vidt_nano"])
def test_the_authors_swin_nano_by_the_command_in_the_recipe(name, tmp_path, monkeypatch):
    """Their file has Microsoft's layout: merging ends a stage, and buffers are saved too."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    command = re.search(r'python -c "(.*?)"', text, re.DOTALL)[1]
    torch.manual_seed(0)
    tensors = {}
    for key, value in timm.create_model(ARCHITECTURE, embed_dim=48).state_dict().items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        tensors[key.replace("head.fc.", "head.")] = value
    tensors["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": tensors}, "swin_nano_patch4_window7_224.pth")
    exec(re.sub(r"\n#\s*", " ", command), {})
    begun = load_detector("kd_hf/vidt_nano", body="bodies/swin_nano").network.state_dict()
    for key in ("patch_embed.proj.weight", "layers.1.downsample.reduction.weight", "layers.3.blocks.1.mlp.fc2.bias"):
        assert torch.equal(begun[f"backbone.{key}"], tensors[key])
