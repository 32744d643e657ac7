"""The recorded numbers of ViDT and VkD count: another value or another setting fails."""

from __future__ import annotations

import pytest

from tests.goldens.check import check_file
from tests.test_goldens import FOLDER, rewrite


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deform_attn/ref2", "out/core_sampling_locations"),
        ("deform_attn/ref4", "grad/in/reference_points"),
        ("vidt_criterion/three_stages", "out/class_error"),
        ("vidt_criterion/three_stages", "out/loss_giou_1"),
        ("vidt_criterion/three_stages", "grad/in/box_logits"),
        ("vidt_kd/original_tokens", "grad/in/student_neck_det"),
        ("vidt_kd/orthogonal_square", "out/loss_distil"),
        ("vidt_kd/orthogonal_square", "grad/param/patch_projector_2.projector.original"),
        ("vidt_kd/orthogonal_square", "grad/param/neck_det_projector.projector.weight_effective"),
        ("vidt/swin_nano_forward", "out/distil_patch_3"),  # stored in float32
    ],
)
def test_a_perturbed_value_fails_and_is_named(tmp_path, name, key):
    file = rewrite(FOLDER / f"{name}.safetensors", tmp_path, {key: lambda value: value * (1 + 1e-6)})
    row = check_file(file)
    assert row.status == f"FAILED {key}"
    assert row.error == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(
    ("name", "hparams"),
    [
        ("deform_attn/ref2", {"n_heads": 4}),
        ("vidt_criterion/three_stages", {"bbox_loss_coef": 4.0}),
        ("vidt_criterion/three_stages", {"focal_alpha": 0.3}),
        ("vidt_criterion/three_stages", {"set_cost_bbox": 0.1}),
        ("vidt_criterion/three_stages", {"iou_aware": True}),
        ("vidt_kd/original_tokens", {"distil_loss_coef": 3.0}),
        ("vidt_kd/orthogonal_square", {"projector": "none"}),
        ("vidt_kd/orthogonal_square", {"orthogonal_map": "householder"}),
        ("vidt/swin_nano_forward", {"with_box_refine": False}),
        ("vidt/swin_nano_forward", {"colour": "blue"}),
    ],
)
def test_every_hyper_parameter_counts(tmp_path, name, hparams):
    assert check_file(rewrite(FOLDER / f"{name}.safetensors", tmp_path, hparams=hparams)).status.startswith("FAILED")
