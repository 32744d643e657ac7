"""The network: sizes, what it depends on, gradients, precision, and life as a model of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from kd_hf.detection.networks.auto import register_auto_classes
from kd_hf.detection.networks.vidt import ViDTForObjectDetection
from kd_hf.detection.networks.vidt_body import RamBlock, from_windows, region_mask, relative_index, to_windows
from kd_hf.detection.networks.vidt_config import BODIES, ViDTConfig, body_sizes
from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor
from kd_hf.models.recompute import enable_checkpointing
from tests.detection.tiny import PLUS, batch, objects, tiny_config, tiny_network


def gradients(network, **options):
    network.zero_grad()
    pixels, mask = batch()
    out = network(pixels.to(network.dtype), mask, objects(), **options)
    out.loss.backward()
    return out, {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin_nano", 15_728_677),
        ("swin_tiny", 37_962_901),
        ("swin_small", 60_465_061),
        ("swin_base", 99_959_635),
        ("swin_large", 211_647_151),
    ],
)
def test_sizes_are_the_published_ones(name, parameters):
    config = ViDTConfig(**body_sizes(name))
    with torch.device("meta"):
        network = ViDTForObjectDetection(config)
    widths = config.stage_widths
    merged = [*widths[1:], 256]
    never_used = 4 * 256 + sum(2 * width for width in widths[1:])
    never_used += sum(width * (out + 2) for width, out in zip(widths, merged, strict=True))
    assert sum(p.numel() for p in network.parameters()) == parameters - never_used
    assert config.level_widths == merged


def test_an_unknown_body_is_named():
    with pytest.raises(ValueError, match=r"'swin_micro'; it has swin_nano, "):
        body_sizes("swin_micro")
    assert set(BODIES) == {"swin_nano", "swin_tiny", "swin_small", "swin_base", "swin_large"}


@pytest.mark.parametrize("options", [{}, {"with_box_refine": False}, PLUS, {"cross_stages": (2, 3)}])
def test_shapes(options):
    network = tiny_network(**options)
    pixels, mask = batch()
    out = network(pixels, mask)
    assert out.loss is None
    assert out.logits.shape == (2, 6, 5)
    assert out.pred_boxes.shape == (2, 6, 4)
    assert out.pred_boxes.min() > 0 and out.pred_boxes.max() < 1
    assert len(out.auxiliary_outputs) == 2
    assert out.neck_tokens.shape == (2, 3, 6, 64)
    assert torch.equal(out.neck_tokens[:, 0], out.body_tokens)
    sizes = [(8, 9), (4, 5), (2, 3), (1, 2)]  # of 64 × 70 pixels
    sizes = sizes[::-1] if options.get("fusion") else sizes
    assert [tuple(level.shape) for level in out.patch_tokens] == [(2, 64, *size) for size in sizes]
    assert [tuple(level.shape) for level in out.patch_masks] == [(2, *size) for size in sizes]
    if options is PLUS:
        assert out.pred_ious.shape == (2, 6, 1)
        assert out.pred_vectors.shape == (2, 6, 12)
        assert [tuple(level.shape) for level in out.token_logits] == [(2, *size, 5) for size in sizes]
        assert set(out.auxiliary_outputs[0]) == {"logits", "pred_boxes", "pred_ious", "pred_vectors"}


def test_images_of_a_batch_do_not_see_each_other():
    network, (pixels, mask) = tiny_network(), batch()
    together = network(pixels, mask)
    for index in range(2):
        alone = network(pixels[index : index + 1], mask[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index])
        torch.testing.assert_close(alone.pred_boxes[0], together.pred_boxes[index])


def test_the_mask_tells_padding_from_black_pixels():
    network, (pixels, mask) = tiny_network(), batch()
    whole = network(pixels)
    torch.testing.assert_close(whole.logits, network(pixels, torch.ones_like(mask)).logits, rtol=0, atol=0)
    assert all(level.all() for level in whole.patch_masks)
    masked = network(pixels, mask)
    assert (masked.logits - whole.logits).abs().max() > 1e-3
    assert not masked.patch_masks[0][0].all() and not masked.patch_masks[0][1].all()
    # what a decoder reads at a masked place counts as 0, so its memory there makes no difference
    for level, valid in zip(masked.patch_tokens, masked.patch_masks, strict=True):
        assert valid[:, 0, 0].all() and level.isfinite().all()


def test_images_smaller_than_a_window_work():
    assert tiny_network()(torch.randn(2, 3, 9, 5, dtype=torch.float64)).logits.isfinite().all()


def test_tokens_are_computed_once_until_they_see_the_image():
    network, (pixels, mask) = tiny_network(), batch()
    sizes = []
    for block in network.backbone.modules():
        if isinstance(block, RamBlock):
            block.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[1])))
    expected = network(pixels, mask)
    assert sizes == [1] * 5 + [2] * 2
    # a sample that may skip branches has tokens of its own from the start; the rate makes no skip happen here
    slow = ViDTForObjectDetection(tiny_config(drop_path_rate=1e-12)).double().train()
    slow.load_state_dict(network.state_dict())
    torch.testing.assert_close(slow(pixels, mask).logits, expected.logits)


def test_stochastic_depth_skips_a_branch_for_patches_and_tokens_alike():
    torch.manual_seed(0)
    network = tiny_network(drop_path_rate=0.5).train()
    block = network.backbone.layers[1].blocks[1]
    assert 0 < block.drop_path < 0.5
    assert network.backbone.layers[3].blocks[1].drop_path == 0.5
    block.drop_path = 0.5
    torch.nn.init.constant_(block.mlp.fc2.weight, 0)
    torch.nn.init.constant_(block.mlp.fc2.bias, 0)
    torch.nn.init.constant_(block.attn.proj.weight, 0)
    torch.nn.init.constant_(block.attn.proj.bias, 1)
    seen = {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, output=output))
    pixels, mask = batch()
    network(pixels.repeat(8, 1, 1, 1), mask.repeat(8, 1, 1))
    patches, det = (after - before for after, before in zip(seen["output"], seen["inputs"][:2], strict=True))
    torch.testing.assert_close(patches.amax((1, 2, 3)), det.amax((1, 2)))
    assert set(det.amax((1, 2)).round(decimals=6).tolist()) == {0.0, 2.0}


def test_windows_and_their_neighbours():
    tokens = torch.arange(2 * 6 * 9).view(2, 6, 9, 1)
    windows = to_windows(tokens, 3)
    assert windows.shape == (2, 6, 9, 1)
    assert windows[0, 1, :, 0].tolist() == [3, 4, 5, 12, 13, 14, 21, 22, 23]
    assert torch.equal(from_windows(windows, 6, 3), tokens)
    index = relative_index(2, torch.device("cpu"))
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]
    regions = region_mask(6, 6, 3, torch.device("cpu"))
    assert regions[0].abs().max() == 0  # inside the map nothing is cut
    assert (regions[3] == 0).sum() == 2 * 2 * 2 * 2 + 2 * (2 * 1) ** 2 + 1


def test_gradient_is_the_derivative():
    """Along a random direction; boxes are refined without gradient, so this is without refinement.

    The step is so short because samples that move to another pixel change the slope.
    """
    network = tiny_network(**PLUS, with_box_refine=False)
    _, found = gradients(network)
    torch.manual_seed(3)
    directions = {name: torch.randn_like(value) for name, value in network.state_dict().items()}
    slope = sum((found[name] * directions[name]).sum() for name in found)
    start, step = {name: value.clone() for name, value in network.state_dict().items()}, 1e-8
    ends = []
    for sign in (1, -1):
        network.load_state_dict({name: value + sign * step * directions[name] for name, value in start.items()})
        with torch.no_grad():
            pixels, mask = batch()
            ends.append(network(pixels, mask, objects()).loss)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, PLUS, {"with_box_refine": False}])
def test_every_parameter_learns(options):
    _, found = gradients(tiny_network(**options))
    assert [name for name, grad in found.items() if grad is None or not grad.isfinite().all()] == []
    # all biases of keys cancel in the softmax; nothing else may be without effect
    still = {name for name, grad in found.items() if grad.abs().max() < 1e-12}
    assert {name for name in still if not name.endswith("k_proj.bias")} == set()


def test_refined_references_carry_no_gradient():
    network = tiny_network()
    pixels, mask = batch()
    network(pixels, mask).pred_boxes.sum().backward()
    assert network.bbox_embed[0].layers[2].weight.grad is None
    assert network.reference_points.weight.grad is None
    assert network.bbox_embed[2].layers[2].weight.grad.abs().max() > 0


def test_checkpointing_changes_nothing():
    network = tiny_network().train()
    plain, wanted = gradients(network)
    enable_checkpointing(network)
    again, found = gradients(network)
    torch.testing.assert_close(again.loss, plain.loss)
    torch.testing.assert_close(found, wanted)


def test_without_auxiliary_loss_the_last_prediction_counts_alone():
    network = tiny_network(auxiliary_loss=False)
    out, _ = gradients(network)
    assert {"loss_ce", "loss_bbox", "loss_giou"} <= set(out.loss_dict)
    assert not any(name.endswith(("_0", "_1")) for name in out.loss_dict)
    assert len(out.auxiliary_outputs) == 2


def test_half_precision():
    pixels, mask = batch()
    double = tiny_network(**PLUS)
    exact = double(pixels, mask)
    half = double.to(torch.bfloat16)(pixels, mask)
    assert half.logits.dtype == torch.bfloat16 and half.pred_boxes.dtype == torch.float32
    assert (half.pred_boxes - exact.pred_boxes).abs().max() < 0.05
    out = tiny_network(**PLUS).to(torch.bfloat16)(pixels, mask, objects())
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()


def test_mixed_precision_training():
    network = tiny_network(**PLUS).float().train()
    exact, wanted = gradients(network)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = gradients(network)
    assert out.pred_boxes.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact.loss, rtol=0.05, atol=0)
    assert all(grad.isfinite().all() for grad in found.values())
    flat, reference = (torch.cat([grads[name].flatten() for name in wanted]) for grads in (found, wanted))
    assert torch.cosine_similarity(flat, reference, dim=0) > 0.9


def test_initial_weights():
    torch.manual_seed(0)
    network = ViDTForObjectDetection(tiny_config(**PLUS)).eval()
    pixels, mask = batch()
    with torch.no_grad():
        out = network(pixels, mask)
    assert out.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    assert torch.cat([one["pred_boxes"] for one in out.auxiliary_outputs]).isfinite().all()
    torch.testing.assert_close(out.pred_boxes[..., 2:].mean().item(), torch.tensor(-2.0).sigmoid().item())
    offsets = network.decoder[0].encoder_attn.sampling_offsets.bias.view(4, 4, 2, 2)
    assert offsets[:, 0, 0].round().tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]
    torch.testing.assert_close(offsets[:, :, 1], 2 * offsets[:, :, 0])


def test_a_compiled_kernel_can_take_the_samplings_place():
    cores = [module for module in tiny_network().modules() if type(module) is MultiScaleDeformableAttention]
    assert len(cores) == 2


LOAD_ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection
network = AutoModelForObjectDetection.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__name__ == "ViDTImageProcessor"
given = load_file(sys.argv[2])
out = network(given["pixels"], given["mask"])
torch.testing.assert_close(out.logits, given["logits"], rtol=1e-5, atol=1e-5)
assert "kd_hf" not in sys.modules
"""


def test_a_folder_loads_without_this_package(tmp_path):
    network = tiny_network(**PLUS).float()
    pixels, mask = batch()
    network.save_pretrained(tmp_path / "model")
    ViDTImageProcessor().save_pretrained(tmp_path / "model")
    pixels = pixels.float()
    given = {"pixels": pixels, "mask": mask, "logits": network(pixels, mask).logits.detach()}
    save_file(given, tmp_path / "given.safetensors")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / "model"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_auto_classes_know_it(tmp_path):
    register_auto_classes()
    register_auto_classes()
    network = tiny_network(loss_weights={"loss_ce": 1.0}, id2label={0: "cat", 1: "dog"}).float()
    network.save_pretrained(tmp_path)
    ViDTImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "kd_hf_vidt"
    assert type(AutoConfig.from_pretrained(tmp_path)) is ViDTConfig
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(loaded) is ViDTForObjectDetection
    assert loaded.config.id2label == {0: "cat", 1: "dog"} and loaded.config.num_labels == 2
    assert loaded.config.loss_weights == {"loss_ce": 1.0}
    torch.testing.assert_close(loaded.state_dict(), network.state_dict(), rtol=0, atol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is ViDTImageProcessor and processor.size["shortest_edge"] == 64
    detect = pipeline("object-detection", model=loaded, image_processor=processor, threshold=0.0)
    found = detect(Image.new("RGB", (60, 40), "teal"))
    assert {one["label"] for one in found} == {"cat", "dog"} and set(found[0]["box"]) == {
        "xmin",
        "ymin",
        "xmax",
        "ymax",
    }
