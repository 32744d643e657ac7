"""Weights of ViDT's authors in our network: every one finds its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from transformers import AutoModelForObjectDetection

from kd_hf.convert.__main__ import main as convert
from kd_hf.convert.layouts import find_student
from kd_hf.convert.reading import read_checkpoint
from kd_hf.convert.vidt import config_of, convert_vidt, fit_vidt, is_vidt
from kd_hf.detection.networks.auto import register_auto_classes
from kd_hf.detection.networks.load import load_detector
from kd_hf.detection.networks.vidt import ViDTForObjectDetection
from kd_hf.detection.networks.vidt_body_weights import body_from_swin
from kd_hf.detection.networks.vidt_config import ViDTConfig
from kd_hf.errors import UserError
from tests.detection.official import Sizes, shapes, state_dict

SMALL = Sizes(
    embed_dim=8,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 8),
    window_size=3,
    det_token_num=6,
    d_model=32,
    dec_layers=2,
    dim_feedforward=16,
    dec_n_points=2,
    num_classes=5,
)
PLUS = replace(SMALL, epff=True, iou_aware=True, token_label=True, n_keep=12)


def test_the_authors_layout_has_the_published_size():
    entries = (shape for name, shape in shapes(Sizes()) if not name.startswith("transformer.decoder.bbox_embed."))
    assert sum(torch.Size(shape).numel() for shape in entries) == 15_728_677


@pytest.mark.parametrize("sizes", [SMALL, PLUS, replace(SMALL, with_box_refine=False), replace(PLUS, dec_layers=1)])
def test_sizes_are_read_off_the_shapes(sizes):
    config = config_of(state_dict(sizes))
    assert tuple(config.depths) == sizes.depths and tuple(config.num_heads) == sizes.num_heads
    found = (config.embed_dim, config.window_size, config.num_queries, config.d_model, config.num_labels)
    assert found == (8, 3, 6, 32, 5)
    assert (config.decoder_layers, config.decoder_ffn_dim, config.decoder_n_points) == (sizes.dec_layers, 16, 2)
    options = (config.with_box_refine, config.fusion, config.iou_aware, config.token_label, config.mask_vector)
    assert options == (sizes.with_box_refine, sizes.epff, sizes.iou_aware, sizes.token_label, sizes.n_keep)


def test_what_no_weight_shows_is_told():
    """Four heads of four samples have the weights of eight heads of two."""
    four = config_of(state_dict(replace(SMALL, nheads=4, dec_n_points=4)), {"decoder_attention_heads": 4})
    assert (four.decoder_attention_heads, four.decoder_n_points, tuple(four.cross_stages)) == (4, 4, (3,))
    assert tuple(config_of(state_dict(SMALL), {"cross_stages": (2, 3)}).cross_stages) == (2, 3)
    with pytest.raises(UserError, match=r"cross_attn.attention_weights.weight for 3 heads \(--kwargs decoder_att"):
        config_of(state_dict(SMALL), {"decoder_attention_heads": 3})
    with pytest.raises(UserError, match=r"'attention_heads'.*Did you mean 'decoder_attention_heads'"):
        config_of(state_dict(SMALL), {"attention_heads": 4})


def test_the_command_takes_what_no_weight_shows(tmp_path, capsys):
    torch.save({"model": state_dict(replace(SMALL, nheads=4))}, tmp_path / "four.pth")
    options = ["-o", str(tmp_path / "four"), "--kwargs", "decoder_attention_heads=4"]
    assert convert([str(tmp_path / "four.pth"), *options]) == 0
    assert "no weight shows, so check: decoder_attention_heads=4, cross_stages=" in capsys.readouterr().out
    assert ViDTConfig.from_pretrained(tmp_path / "four").decoder_attention_heads == 4


def test_known_bodies_get_their_stochastic_depth():
    tiny = Sizes(embed_dim=96, det_token_num=2, dec_layers=1)
    with torch.device("meta"):
        tensors = {name: torch.empty(shape) for name, shape in shapes(tiny)}
    config = config_of(tensors)
    assert config.drop_path_rate == 0.2 and config.decoder_attention_heads == 8 and config.decoder_n_points == 4


@pytest.mark.parametrize("sizes", [SMALL, PLUS, replace(SMALL, with_box_refine=False)])
def test_every_weight_finds_its_place(sizes):
    official = state_dict(sizes)
    assert is_vidt(frozenset(official))
    config, found = fit_vidt(official)
    ViDTForObjectDetection(config).double().load_state_dict(found)
    layer, ours = "transformer.decoder.layers.1.", "decoder.1."
    query, key, value = official[f"{layer}self_attn.in_proj_weight"].chunk(3)
    pairs = {
        f"{ours}self_attn.q_proj.weight": query,
        f"{ours}self_attn.k_proj.weight": key,
        f"{ours}self_attn.v_proj.weight": value,
        f"{ours}self_attn_layer_norm.weight": official[f"{layer}norm2.weight"],
        f"{ours}encoder_attn_layer_norm.bias": official[f"{layer}norm1.bias"],
        f"{ours}final_layer_norm.bias": official[f"{layer}norm3.bias"],
        f"{ours}mlp.fc2.weight": official[f"{layer}linear2.weight"],
        "class_embed.0.bias": official["class_embed.0.bias"],
        "bbox_embed.0.layers.2.weight": official["bbox_embed.0.layers.2.weight"],
        "backbone.layers.3.downsample.reduction.weight": official["backbone.layers.3.downsample.reduction.weight"],
    }
    if sizes.epff:
        fusion = "fusion.multi_scaler."
        pairs |= {
            "fusion.proj.2.0.weight": official[f"{fusion}layer_2_rn.weight"],
            "fusion.proj.3.1.bias": official[f"{fusion}p_norm_3.bias"],
            "fusion.merge.0.side.conv2.weight": official[f"{fusion}refinenet_0.resConfUnit1.conv2.weight"],
            "fusion.merge.3.out.conv3.bias": official[f"{fusion}refinenet_3.resConfUnit2.conv3.bias"],
            "token_head.enc_output_norm.weight": official["transformer.enc_output_norm.weight"],
            "vector_embed.layers.0.bias": official["vector_embed.2.layers.0.bias"],
        }
    for name, tensor in pairs.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    if sizes.with_box_refine:
        torch.testing.assert_close(found["class_embed.2.bias"], official["class_embed.2.bias"], rtol=0, atol=0)


def test_what_a_student_of_vkd_learned_with_is_left_out(tmp_path):
    tensors = state_dict(SMALL)
    for name in ("patch_projector_1", "patch_projector_4", "body_det_projector", "neck_det_projector"):
        tensors[f"{name}.weight"] = torch.ones(32)
        tensors[f"{name}.projector.parametrizations.weight.original"] = torch.eye(32)
        tensors[f"{name}.projector.parametrizations.weight.0.base"] = torch.eye(32)
    file = tmp_path / "checkpoint.pth"
    torch.save({"model": tensors, "epoch": 49, "args": {"lr": 1e-4}}, file)
    student = find_student(read_checkpoint(file))
    assert student.entry == "model"
    _, found = fit_vidt(student.tensors)
    _, expected = fit_vidt(state_dict(SMALL))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("class_embed.1.weight"), "1 missing: class_embed.1.weight"),
        (lambda t: t.update({"neck.gate": torch.ones(1)}), "1 not known to the network: neck.gate"),
        (lambda t: t.update({"tgt_proj.1.bias": torch.ones(3)}), "1 of another shape: tgt_proj.1.bias"),
        (lambda t: t.pop("tgt_proj.0.weight"), "no whole ViDT"),
        (lambda t: t.update({"tgt_proj.0.weight": torch.ones(32, 9, 1, 1)}), "no whole ViDT"),
        (lambda t: t.pop("backbone.layers.2.blocks.0.attn.relative_position_bias_table"), "no whole ViDT"),
    ],
)
def test_what_does_not_fit_is_said_in_one_message(change, message):
    tensors = state_dict(SMALL)
    change(tensors)
    with pytest.raises(UserError, match=message):
        fit_vidt(tensors, "x.pth")
    assert not is_vidt(frozenset({"backbone.conv1.weight"}))


def test_a_folder_of_a_checkpoint(tmp_path):
    register_auto_classes()
    official = {name: value.float() for name, value in state_dict(PLUS).items()}
    lines = convert_vidt(official, tmp_path / "model")
    assert "6 boxes, 5 classes" in lines[0] and "left out" in lines[1]
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "model").eval()
    config, weights = fit_vidt(official)
    network = ViDTForObjectDetection(config).eval()
    network.load_state_dict(weights)
    pixels = torch.randn(2, 3, 70, 50)
    assert torch.equal(loaded(pixels).logits, network(pixels).logits)
    assert (tmp_path / "model" / "vidt.py").is_file() and (tmp_path / "model" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("late", [True, False])
def test_body_starts_from_an_imagenet_swin(late):
    """Maps equal those of timm's Swin, whose merging starts a stage; in Microsoft's files it ends the one before."""
    torch.manual_seed(0)
    swin = SwinTransformer(img_size=96, window_size=3, embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8))
    swin = swin.double().eval()
    for parameter in swin.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tensors = dict(swin.state_dict())
    if not late:
        for name in [name for name in tensors if ".downsample." in name]:
            _, stage, rest = name.split(".", 2)
            tensors[f"microsoft.{int(stage) - 1}.{rest}"] = tensors.pop(name)
        tensors = {name.replace("microsoft.", "layers."): value for name, value in tensors.items()}
    config = ViDTConfig(
        embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), window_size=3, d_model=32, num_queries=4
    )
    network = ViDTForObjectDetection(config).double().eval()
    missing, unexpected = network.load_state_dict(body_from_swin(tensors), strict=False)
    assert not unexpected
    body = {name for name in missing if name.startswith("backbone.")}
    assert all("det_" in name or name.startswith("backbone.layers.3.downsample.") for name in body)
    pixels = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    maps, _ = network.backbone(pixels, torch.zeros(2, 96, 96, dtype=torch.bool))
    expected = []
    for stage in swin.layers[1:]:
        stage.register_forward_hook(lambda module, inputs, output: expected.append(output.permute(0, 3, 1, 2)))
    swin(pixels)
    assert len(expected) == 3
    for found, wanted in zip(maps, expected, strict=False):
        torch.testing.assert_close(found, wanted)


def test_the_command_needs_no_architecture(tmp_path, capsys):
    torch.save({"model": state_dict(SMALL)}, tmp_path / "vidt.pth")
    assert convert([str(tmp_path / "vidt.pth"), "-o", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert load_detector(str(tmp_path / "out"), pretrained=True).info.queries == 6
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="--arch: name the network"):
        convert([str(tmp_path / "other.pth"), "-o", str(tmp_path / "other")])
