"""Every known architecture: what its taps are, in which frame its boxes are, and how shapes are found."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kd_hf.detection.data.stage import Images
from kd_hf.detection.networks.detector import TappedDetector, pretend, tap_shapes
from kd_hf.detection.networks.families import FAMILIES
from kd_hf.detection.networks.info import available_taps, check_tap
from kd_hf.errors import UserError
from tests.detection.detectors import CLASSES, QUERIES, TINY, detector, handle, images, objects

KINDS = sorted(TINY)
# levels and the size of their maps for 64 × 96 pixels
MAPS = {
    **dict.fromkeys(("detr", "table-transformer", "conditional_detr", "dab-detr"), ((2, 3),)),
    **dict.fromkeys(("deformable_detr", "kd_hf_vidt"), ((8, 12), (4, 6), (2, 3), (1, 2))),
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine"), ((8, 12), (4, 6), (2, 3))),
    "lw_detr": ((16, 24), (4, 6)),
    "rf_detr": ((8, 12),),
    "yolos": ((4, 6),),
}
WIDTH = {"deformable_detr": 32, "kd_hf_vidt": 64}


def test_every_known_architecture_is_tried():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_taps_mean_the_same(kind):
    """In training, with further queries, and in evaluation; on a network without values as well."""
    made = handle(kind)
    taps = available_taps(made.info)
    model = TappedDetector(made, made.info, taps)
    width, stages = WIDTH.get(kind, 16), 1 if kind == "yolos" else 3
    expected = {f"map:{level}": (width, *size) for level, size in enumerate(MAPS[kind])}
    expected |= {f"valid:{level}": size for level, size in enumerate(MAPS[kind])}
    expected |= {f"queries:{stage}": (QUERIES, width) for stage in range(stages)}
    expected |= {"neck": (stages, QUERIES, width)}
    expected |= {"body": (QUERIES, width)} if kind in ("yolos", "kd_hf_vidt") else {}
    assert set(taps) == set(expected)
    for training in (True, False):
        model.train(training)
        seen = model(images(), objects())
        assert {tap: tuple(value.shape[1:]) for tap, value in seen.taps.items()} == expected
        assert seen.logits.shape == (3, QUERIES, CLASSES + seen.softmax) and seen.boxes.shape == (3, QUERIES, 4)
        assert {tap for tap, value in seen.taps.items() if value.dtype == torch.bool} == {
            tap for tap in taps if tap.startswith("valid")
        }
        torch.testing.assert_close(seen.taps["neck"][:, -1], seen.taps[f"queries:{stages - 1}"], rtol=0, atol=0)
        for logits, boxes in seen.auxiliary:
            assert logits.shape == seen.logits.shape and boxes.shape == seen.boxes.shape
    assert tap_shapes(model, (64, 96)) == expected
    model(images())  # of a size that it was shown without values
    planned = handle(kind, device="meta")
    empty = TappedDetector(planned, planned.info, taps)
    assert next(empty.parameters()).is_meta
    assert tap_shapes(empty, (64, 96)) == expected


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("detr", "class_labels_classifier"),
        ("deformable_detr", "class_embed.2"),
        ("rt_detr_v2", "class_embed.2"),
        ("lw_detr", "class_embed"),
        ("yolos", "class_labels_classifier"),
        ("kd_hf_vidt", "class_embed.2"),
    ],
)
def test_states_are_those_the_heads_read(kind, head):
    """The last state, through the class head, is the logits; of the network's own queries, not those with noise."""
    model = detector(kind, ("neck",)).train()
    seen = model(images(), objects())
    logits = model.network.get_submodule(head)(seen.taps["neck"][:, -1])
    torch.testing.assert_close(logits, seen.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["detr", "table-transformer", "conditional_detr", "dab-detr"])
def test_states_of_detr_need_no_auxiliary_loss(kind):
    """With it, transformers normalises what a layer hands on as well: only the first state stays the same."""
    taps = {}
    for auxiliary in (True, False):
        model = detector(kind, ("neck",), auxiliary_loss=auxiliary).eval()
        seen = model(images())
        taps[auxiliary] = seen.taps["neck"]
        assert len(seen.auxiliary) == 2 * auxiliary
        head = "class_embed" if kind == "dab-detr" else "class_labels_classifier"
        for stage, (logits, _) in enumerate(seen.auxiliary):
            again = model.network.get_submodule(head)(taps[auxiliary][:, stage])
            torch.testing.assert_close(again, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(taps[True][:, 0], taps[False][:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_tap_is_refused(kind):
    info = handle(kind, device="meta").info
    for tap in ("map:9", "map", "queries:-4" if kind != "yolos" else "queries:1", "stage:1", "neck:0", "module:nope"):
        with pytest.raises(UserError, match=f"tap '{tap}'"):
            check_tap(info, tap)
    with pytest.raises(UserError, match=r"It has: map:0 … map:\d, valid:0 … .*queries:0 … queries:\d, .*neck, module"):
        check_tap(info, "patch:0")
    check_tap(info, "map:-1")
    check_tap(info, f"module:{info.modules[0]}")


def test_a_module_tap_and_one_that_does_not_fire():
    made = handle("detr")
    model = TappedDetector(made, made.info, ["module:model.input_projection", "map:0"])
    seen = model(images())
    assert seen.taps["module:model.input_projection"].shape == (3, 16, 2, 3)
    made.network.unused = torch.nn.Linear(2, 2)
    info = dataclasses.replace(made.info, modules=(*made.info.modules, "unused"))
    with pytest.raises(UserError, match=r"'module:unused' did not fire.*never called its module 'unused'"):
        TappedDetector(made, info, ["module:unused"])(images())


@pytest.mark.parametrize("kind", KINDS)
def test_valid_is_where_the_image_is(kind):
    taps = [tap for tap in available_taps(handle(kind, device="meta").info) if tap.startswith("valid")]
    seen = detector(kind, taps)(images())
    for mask in seen.taps.values():
        height, width = mask.shape[1:]
        assert mask[0].all()
        # a token is of the image if the pixel at its upper left corner is
        assert mask[2].any(0).sum() == max(1, -(-width // 3)) and mask[2].any(1).all()
        assert mask[1].any(1).sum() == -(-height * 3 // 4)


@pytest.mark.parametrize("kind", ["deformable_detr", "lw_detr", "rf_detr", "rt_detr", "rt_detr_v2", "d_fine"])
def test_boxes_are_relative_to_the_image_without_padding(kind):
    """With box heads that change nothing, boxes lie on the centres of the image's tokens, whatever surrounds it."""
    more = {"num_queries": 90}
    if kind == "deformable_detr":
        more = {"two_stage": True, "two_stage_num_proposals": 90}
    model = detector(kind, ("valid:0",), **more).eval()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "bbox" in name or "reference_point" in name:
                parameter.zero_()
    seen = model(images(sizes=((64, 96),), frame=(128, 128)))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    places = [[(torch.arange(side) + 0.5) / side for side in size[::-1]] for size in sizes]
    grid = torch.cat([torch.cartesian_prod(*pair) for pair in places])
    centres = seen.boxes[0, :, :2]
    inside = centres[(centres < 0.99).all(1)]
    assert len(inside) > 5
    assert torch.cdist(inside, grid, p=1).amin(1).median() < 5e-3
    wrong = inside * torch.tensor([0.75, 0.5])
    assert torch.cdist(wrong, grid, p=1).amin(1).median() > 1e-2


@pytest.mark.parametrize("kind", ["detr", "table-transformer", "conditional_detr", "dab-detr"])
def test_positions_are_relative_to_the_image_without_padding(kind):
    """What the decoder is told of places does not change with the padding, so that boxes cannot either."""
    model = detector(kind).eval()
    told = {}
    names = ("spatial_position_embeddings", "object_queries")
    decoder = model.network.model.decoder
    decoder.register_forward_pre_hook(lambda module, args, kwargs: told.update(kwargs), with_kwargs=True)
    positions = []
    for frame in ((64, 96), (128, 160)):
        model(images(sizes=((64, 96),), frame=frame))
        grid = next(told[name] for name in names if name in told)[0].unflatten(0, (frame[0] // 32, -1))
        positions.append(grid[:2, :3])
    torch.testing.assert_close(*positions, rtol=0, atol=1e-5)


def test_yolos_knows_the_frame_only():
    model = detector("yolos").eval()
    one, other = images(), images()
    unpadded = Images(other.pixels, torch.zeros_like(other.mask))
    ratios = torch.tensor([[1.0, 1.0], [64 / 96, 48 / 64], [32 / 96, 1.0]]).repeat(1, 2)
    torch.testing.assert_close(model(one).boxes * ratios[:, None], model(unpadded).boxes)


def test_only_what_was_asked_for_is_kept_and_copies_keep_their_own():
    model = detector("rt_detr_v2", ("map:1",))
    twin = copy.deepcopy(model)
    assert set(model(images()).taps) == {"map:1"} == set(twin(images()).taps)
    assert not model._recorder.calls and twin._recorder is not model._recorder
    plain = detector("rt_detr_v2")
    assert not plain(images()).taps
    assert [key for key in model.state_dict() if not key.startswith("network.")] == []


def test_the_networks_own_loss_is_as_before():
    """Listening to the call of the loss leaves nothing behind."""
    model = detector("detr")
    labels = [
        {"class_labels": classes, "boxes": boxes} for classes, boxes in zip(*vars(objects()).values(), strict=True)
    ]
    given = images()
    before = model.network(given.pixels, pixel_mask=(~given.mask).long(), labels=labels).loss
    model(given, objects())
    torch.testing.assert_close(model.network(given.pixels, pixel_mask=(~given.mask).long(), labels=labels).loss, before)
    model.network.loss_function = lambda *args: (torch.tensor(3.0), {}, None)
    model(given)
    assert model.network(given.pixels, labels=labels).loss == 3


def test_operations_are_counted_without_values():
    counted = []
    for device in ("cpu", "meta"):
        made = handle("kd_hf_vidt", device=device)
        model = TappedDetector(made, made.info, ["map:0"]).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            seen = pretend(model, (64, 96), 2)
        assert seen.logits.shape == (2, QUERIES, CLASSES)
        counted.append(counter.get_total_flops())
    model = detector("kd_hf_vidt", ("map:0",)).eval().requires_grad_(False)
    # attention as matrix products: fused kernels are not counted by every torch
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(sizes=((64, 96),) * 2))
    assert counted == [counter.get_total_flops()] * 2 and counted[0] > 0
