"""Distilling tokens and predictions of any detector: against their formulas, the contract, and between networks."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from kd_hf.detection.methods.detection import DetectionLoss
from kd_hf.detection.methods.detr_kd import DetrKd
from kd_hf.detection.methods.detr_tokens import DetrTokens
from kd_hf.detection.methods.matching import MatchConfig, pair_queries, paired_giou
from kd_hf.detection.methods.token_matching import ViDTTokens, VkDTokens
from kd_hf.detection.networks.detector import TappedDetector, tap_shapes
from kd_hf.detection.networks.info import BoxOutputs, DetectorInfo
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing, Shapes
from kd_hf.outputs import Target
from kd_hf.testing import check_method
from tests.detection.detectors import handle, images, objects

B, K = 3, 4
TARGET = Target(torch.zeros(B))
LEVELS = ((3, 4), (2, 2))


def info(name="detector", queries=5, levels=2, softmax=False, **facts):
    return DetectorInfo(
        name, "transformers", K, Preprocessing(), levels=levels, states=3, queries=queries, softmax=softmax, **facts
    )


def outputs(queries=5, width=8, seed=0, softmax=False):
    torch.manual_seed(seed)
    taps = {f"map_{level}": torch.randn(B, width, *size) for level, size in enumerate(LEVELS)}
    taps["queries_2"] = torch.randn(B, queries, width)
    taps["neck_3"] = torch.randn(B, 3, queries, width)
    boxes = torch.cat([torch.rand(B, queries, 2), 0.1 + 0.3 * torch.rand(B, queries, 2)], -1)
    logits = 2 * torch.randn(B, queries, K + softmax)
    taps = {role: tap.double() for role, tap in taps.items()}
    return BoxOutputs(logits=logits.double(), boxes=boxes.double(), softmax=softmax, taps=taps)


def with_roles(seen, *roles):
    return dataclasses.replace(seen, taps={role: seen.taps[role] for role in roles})


def build(student, teacher, roles=("map_0", "map_1"), **options):
    taps = [{"student": role.replace("_", ":") if role != "neck_3" else "neck"} for role in roles]
    cfg = DetrTokens.Config.model_validate({"taps": taps, "masked": False, **options})
    shapes = [Shapes(K, {role: tuple(seen.taps[role].shape[1:]) for role in roles}) for seen in (student, teacher)]
    return DetrTokens(cfg, *shapes, {}).double(), with_roles(student, *roles), with_roles(teacher, *roles)


# pairing


def cost_of(one, other, image, ours, theirs):
    p, q = (seen.logits[image].sigmoid() for seen in (one, other))
    a, b = one.boxes[image, ours], other.boxes[image, theirs]
    return 2 * (p[ours] - q[theirs]).abs().sum() + 5 * (a - b).abs().sum() + 2 * (1 - paired_giou(a, b))


def test_pairs_are_the_cheapest():
    one, other = outputs(4), outputs(5, seed=1)
    rows, columns = pair_queries(MatchConfig(), one, other)
    assert rows.shape == columns.shape == (B, 4)
    for image in range(B):
        found = sum(cost_of(one, other, image, *pair) for pair in zip(rows[image], columns[image], strict=True))
        all_costs = [
            sum(cost_of(one, other, image, ours, theirs) for ours, theirs in enumerate(order))
            for order in permutations(range(5), 4)
        ]
        torch.testing.assert_close(found, min(all_costs))


@pytest.mark.parametrize("softmax", [False, True])
def test_a_permutation_is_undone(softmax):
    one = outputs(6, softmax=softmax)
    order = torch.stack([torch.randperm(6) for _ in range(B)])
    picked = {name: torch.stack([getattr(one, name)[i, order[i]] for i in range(B)]) for name in ("logits", "boxes")}
    rows, columns = pair_queries(MatchConfig(), one, dataclasses.replace(one, **picked))
    torch.testing.assert_close(torch.gather(order, 1, columns), rows)
    torch.testing.assert_close(rows, torch.arange(6).expand(B, -1))
    by_index = pair_queries(MatchConfig(match="index"), one, dataclasses.replace(one, **picked))
    assert all(torch.equal(index, torch.arange(6).expand(B, -1)) for index in by_index)


def test_broken_predictions_are_paired_last():
    one, other = outputs(3), outputs(3, seed=1)
    one.boxes[0, 1] = float("nan")
    rows, columns = pair_queries(MatchConfig(), one, other)
    assert sorted(columns[0].tolist()) == [0, 1, 2] and rows.shape == (B, 3)


# tokens


def standardised(rows):
    return (rows - rows.mean(0)) / rows.std(0)


@pytest.mark.parametrize(
    ("normalise", "distance"), [("channels", "smooth_l1"), ("token", "mse"), ("none", "l2"), ("none", "smooth_l1")]
)
def test_maps_against_the_formula(normalise, distance):
    student, teacher = outputs(width=6), outputs(seed=1)
    method, ours, theirs = build(student, teacher, normalise=normalise, distance=distance, projector="linear")
    found = method(ours, theirs, TARGET, {})
    assert set(found) == {"map_0", "map_1"}
    norms = {
        "channels": standardised,
        "token": lambda rows: F.layer_norm(rows, rows.shape[-1:]),
        "none": lambda rows: rows,
    }
    for role, value in found.items():
        projector = method.projectors[role]
        one = norms[normalise](projector(student.taps[role].permute(0, 2, 3, 1).flatten(0, 2)))
        two = norms[normalise](teacher.taps[role].permute(0, 2, 3, 1).flatten(0, 2))
        wanted = {
            "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b),
            "mse": lambda a, b: F.mse_loss(a, b),
            "l2": lambda a, b: (a - b).norm(dim=-1).mean(),
        }[distance](one, two)
        torch.testing.assert_close(value, wanted)


def test_it_is_vkd_on_the_same_taps():
    """With its defaults and nothing masked, as VkD compares the memory and the decoder's states."""
    student, teacher = outputs(width=6), outputs(seed=1)
    method, ours, theirs = build(student, teacher, ("map_0", "map_1", "queries_2", "neck_3"), match="index")
    names = {"map_0": "patch_0", "map_1": "patch_1", "queries_2": "body", "neck_3": "neck"}
    renamed = [
        dataclasses.replace(seen, taps={names[role]: tap for role, tap in seen.taps.items()}) for seen in (ours, theirs)
    ]
    shapes = [Shapes(K, {role: tuple(tap.shape[1:]) for role, tap in seen.taps.items()}) for seen in renamed]
    vkd = VkDTokens(VkDTokens.Config(levels=2), *shapes, {}).double()
    vkd.load_state_dict({_renamed(key, names): value for key, value in method.state_dict().items()})
    parts = vkd(*renamed, TARGET, {})
    found = method(ours, theirs, TARGET, {})
    torch.testing.assert_close(found["map_0"] + found["map_1"], parts["patch"])
    torch.testing.assert_close(found["queries_2"], parts["body"])
    torch.testing.assert_close(found["neck_3"], parts["neck"])


def _renamed(key, names):
    head, role, *rest = key.split(".")
    return ".".join([head, names[role], *rest])


def test_weights_and_projectors():
    student, teacher = outputs(width=6), outputs(seed=1)
    taps = [{"student": "map:0", "weight": 0.5}, {"student": "map:1"}]
    torch.manual_seed(0)
    half, ours, theirs = build(student, teacher, taps=taps)
    torch.manual_seed(0)
    whole, *_ = build(student, teacher)
    one, two = half(ours, theirs, TARGET, {}), whole(ours, theirs, TARGET, {})
    torch.testing.assert_close(one["map_0"] * 2, two["map_0"])
    torch.testing.assert_close(one["map_1"], two["map_1"])
    weight = whole.projectors["map_0"].projection.weight()
    torch.testing.assert_close(weight.T @ weight, torch.eye(6).double(), rtol=0, atol=1e-6)
    assert whole.cost().macs == (12 + 4) * 6 * 8 and whole.cost().parameters == 2 * 6 * 8
    plain, *_ = build(outputs(), teacher, projector="none")
    assert plain.cost().macs == 0 == plain.cost().parameters


def test_matched_queries_follow_the_teachers_order():
    """A teacher with other numbers of the same queries is no other teacher, unless queries are paired by index."""
    student, teacher = outputs(width=6), outputs(seed=1)
    order = torch.randperm(5)
    shuffled = dataclasses.replace(
        teacher,
        logits=teacher.logits[:, order],
        boxes=teacher.boxes[:, order],
        taps={role: tap if role.startswith("map") else tap[..., order, :] for role, tap in teacher.taps.items()},
    )
    for match, same in (("hungarian", True), ("index", False)):
        method, ours, theirs = build(student, teacher, ("queries_2", "neck_3"), match=match)
        one = method(ours, theirs, TARGET, {})
        two = method(ours, with_roles(shuffled, "queries_2", "neck_3"), TARGET, {})
        for role, value in one.items():
            assert torch.allclose(value, two[role], rtol=1e-9) == same
    fewer, ours, theirs = build(outputs(3, width=6), teacher, ("queries_2",))
    assert fewer(ours, theirs, TARGET, {})["queries_2"].isfinite()


def test_padding_is_left_out():
    student, teacher = outputs(width=6), outputs(seed=1)
    method, ours, theirs = build(student, teacher, ("map_0",), normalise="token")
    mask = torch.ones(B, *LEVELS[0], dtype=torch.bool)
    mask[1, :, 2:] = False
    masked = dataclasses.replace(ours, taps={**ours.taps, "valid_0": mask})
    before = method(masked, theirs, TARGET, {})["map_0"]
    ours.taps["map_0"][1, :, :, 2:] = 1e3
    masked = dataclasses.replace(ours, taps={**ours.taps, "valid_0": mask})
    torch.testing.assert_close(method(masked, theirs, TARGET, {})["map_0"], before)
    assert (method(ours, theirs, TARGET, {})["map_0"] - before).abs() > 1e-3
    needs = DetrTokens.needs(DetrTokens.Config(), info(), info())
    assert needs.student == {"map_0": "map:0", "map_1": "map:1", "valid_0": "valid:0", "valid_1": "valid:1"}
    assert needs.teacher == {"map_0": "map:0", "map_1": "map:1"} and not needs.teacher_logits and needs.cacheable


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalise": "token", "projector": "linear", "distance": "mse"},
        {
            "match": "index",
            "taps": [{"student": "queries:0", "teacher": "queries:2"}, {"student": "neck"}, {"student": "body"}],
        },
    ],
)
def test_the_contract(options):
    shapes = {}
    for side, width in (("student", 6), ("teacher", 8)):
        for number, (kind, shape) in enumerate([("map", (width, 3, 4)), ("map", (width, 2, 2))]):
            shapes[f"{side}.{kind}_{number}"] = shape
        shapes |= {f"{side}.queries_0": (5, width), f"{side}.neck_1": (3, 5, width), f"{side}.body_2": (5, width)}
    pair = info(body=True), info("teacher", body=True)
    check_method(DetrTokens, {"masked": False, **options}, *pair, shapes=shapes)


def test_the_contract_of_token_matching():
    shapes = {}
    for side in ("student", "teacher"):
        shapes |= {f"{side}.patch_{level}": (8, 3, 4) for level in range(2)}
        shapes |= {f"{side}.body": (5, 8), f"{side}.neck": (3, 5, 8)}
    for method in (ViDTTokens, VkDTokens):
        check_method(method, {"levels": 2}, info(body=True), info("teacher", body=True), shapes=shapes)


# predictions


def prediction_loss(student, teacher, **options):
    return DetrKd(DetrKd.Config(**options), None, None, {})(student, teacher, TARGET, {})


@pytest.mark.parametrize("softmax", [False, True])
def test_predictions_against_the_formula(softmax):
    student, teacher = outputs(softmax=softmax), outputs(seed=1, softmax=softmax)
    found = prediction_loss(student, teacher, match="index", temperature=2.0, class_weight=0.7)
    wanted = dict.fromkeys(("class", "bbox", "giou"), 0.0)
    for image in range(B):
        p = teacher.logits[image].softmax(-1)[:, :-1] if softmax else teacher.logits[image].sigmoid()
        weights = p.max(-1).values / p.max(-1).values.sum()
        for query, weight in enumerate(weights):
            said, told = student.logits[image, query] / 2, teacher.logits[image, query] / 2
            if softmax:
                kl = F.kl_div(said.log_softmax(-1), told.softmax(-1), reduction="sum")
            else:
                one = F.binary_cross_entropy_with_logits(said, told.sigmoid(), reduction="sum")
                kl = one - F.binary_cross_entropy_with_logits(told, told.sigmoid(), reduction="sum")
            a, b = student.boxes[image, query], teacher.boxes[image, query]
            wanted["class"] += 0.7 * 4 * weight * kl / B
            wanted["bbox"] += 5 * weight * (a - b).abs().sum() / B
            wanted["giou"] += 2 * weight * (1 - paired_giou(a, b)) / B
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("softmax", [False, True])
def test_equal_predictions_in_any_order_cost_nothing(softmax):
    teacher = outputs(7, softmax=softmax)
    order = torch.randperm(7)
    student = dataclasses.replace(teacher, logits=teacher.logits[:, order], boxes=teacher.boxes[:, order])
    leaves = student.logits.requires_grad_(), student.boxes.requires_grad_()
    losses = prediction_loss(student, teacher)
    assert all(abs(value) < 1e-4 for value in losses.values())
    sum(losses.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert sum(prediction_loss(student, teacher, match="index").values()) > 1


def test_all_stages_learn_from_the_last():
    student, teacher, earlier = outputs(), outputs(seed=1), outputs(seed=2)
    staged = dataclasses.replace(student, auxiliary=((earlier.logits, earlier.boxes),))
    last, every = prediction_loss(staged, teacher), prediction_loss(staged, teacher, stages="all")
    alone = prediction_loss(earlier, teacher)
    for name, value in prediction_loss(student, teacher).items():
        torch.testing.assert_close(last[name], value)
        torch.testing.assert_close(every[name], value + alone[name])


def test_predictions_keep_the_contract():
    """As `check_method` has it for other methods: gradients, halves of a batch, half precision."""
    student, teacher = outputs(7), outputs(5, seed=1)
    whole = prediction_loss(student, teacher)
    halves = []
    for rows in (slice(0, 1), slice(1, 3)):
        cut = [
            dataclasses.replace(seen, logits=seen.logits[rows], boxes=seen.boxes[rows]) for seen in (student, teacher)
        ]
        halves.append(prediction_loss(*cut))
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + 2 * halves[1][name]) / 3, value)
    leaves = [student.logits, student.boxes, teacher.logits, teacher.boxes]
    for leaf in leaves:
        leaf.requires_grad_()
    sum(prediction_loss(student, teacher).values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves[:2]) and all(leaf.grad is None for leaf in leaves[2:])
    rough = [
        dataclasses.replace(seen, logits=seen.logits.detach().bfloat16(), boxes=seen.boxes.detach().float())
        for seen in (student, teacher)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in prediction_loss(*rough).items():
            assert abs(value - whole[name]) < 0.05 * whole[name] and value.dtype == torch.float32


# what is refused


@pytest.mark.parametrize(
    ("method", "options", "pair", "message"),
    [
        (DetrTokens, {}, (info(), None), "needs a teacher"),
        (DetrTokens, {}, (info(), info("big", levels=3)), r"taps: 'detector' has 2 maps and 'big' 3; say which"),
        (
            DetrTokens,
            {"taps": [{"student": "body"}]},
            (info(), info()),
            r"'body' does not exist in detector. It has: map:0",
        ),
        (DetrTokens, {"taps": [{"student": "valid:0"}]}, (info(), info()), "'valid:0' is no tap of tokens"),
        (
            DetrTokens,
            {"taps": [{"student": "neck"}], "match": "index"},
            (info(), info("big", 9)),
            "5 queries and 'big' 9; only as many can be paired by index, others by `hungarian`",
        ),
        (DetrKd, {"match": "index"}, (info(), info("big", 9)), "methods.detr_kd.match"),
        (DetrKd, {}, (info(), info("soft", softmax=True)), "a sigmoid for each class and 'soft' a softmax"),
        (DetrKd, {}, (info(), dataclasses.replace(info("many"), num_classes=9)), "'many' has 9 classes"),
        (DetrTokens, {"taps": [{"student": "queries:0"}]}, (info(), info("soft", softmax=True)), "cannot be compared"),
    ],
)
def test_messages(method, options, pair, message):
    with pytest.raises(UserError, match=message):
        method.needs(method.Config.model_validate(options), *pair)


def test_messages_about_shapes():
    with pytest.raises(UserError, match="map is 8×3×4, the teacher's 8×4×4; maps need the same height"):
        big = outputs()
        big.taps["map_0"] = torch.zeros(B, 8, 4, 4)
        build(outputs(), big)
    with pytest.raises(UserError, match="projector: tokens are 6 wide in the student and 8 in the teacher"):
        build(outputs(width=6), outputs(), projector="none")
    with pytest.raises(UserError, match=r"neck is 3×5×8, the teacher's 2×5×8.*queries:-1"):
        big = outputs()
        big.taps["neck_3"] = torch.zeros(B, 2, 5, 8)
        build(outputs(), big, ("neck_3",))


# between networks

PAIRS = [
    ("rt_detr_v2", {"decoder_layers": 2}, {}, {"detr_tokens": {}, "detr_kd": {}}),
    (
        "yolos",
        {},
        {"hidden_size": 32},
        {"detr_tokens": {"taps": [{"student": "map:0"}, {"student": "body"}]}, "detr_kd": {"match": "index"}},
    ),
    ("detr", {"auxiliary_loss": False}, {}, {"detr_tokens": {"taps": [{"student": "neck"}], "normalise": "token"}}),
    ("lw_detr", {}, {}, {"detr_kd": {"stages": "all"}}),
    ("kd_hf_vidt", {}, {"embed_dim": 16}, {"vidt_tokens": {}, "vkd_tokens": {"masked": True}}),
]
METHODS = {method.name: method for method in (DetrTokens, DetrKd, ViDTTokens, VkDTokens, DetectionLoss)}


@pytest.mark.parametrize(("kind", "small", "large", "blocks"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_from_images_to_gradients(kind, small, large, blocks):
    """All that a run does: taps that methods need, shapes without values, one pass each, and a step that only the
    student and the methods feel."""
    student, teacher = handle(kind, **small), handle(kind, seed=5, **large)
    configs = {name: METHODS[name].Config.model_validate(options) for name, options in blocks.items()}
    needs = {name: METHODS[name].needs(cfg, student.info, teacher.info) for name, cfg in configs.items()}
    ours = TappedDetector(
        student, student.info, [tap for need in needs.values() for tap in need.student.values()]
    ).train()
    theirs = TappedDetector(
        teacher, teacher.info, [tap for need in needs.values() for tap in need.teacher.values()]
    ).eval()
    shapes = [tap_shapes(model, (64, 96)) for model in (ours, theirs)]
    methods = {}
    for name, need in needs.items():
        sides = zip(shapes, (need.student, need.teacher), strict=True)
        methods[name] = METHODS[name](configs[name], *(_shapes(*side) for side in sides), {})
    target = objects()
    with torch.no_grad():
        taught = theirs(images())
    seen = ours(images(), target)
    losses = DetectionLoss(DetectionLoss.Config(), None, None, {})(seen, None, target, {})
    for name, method in methods.items():
        roles = _by_role(seen, needs[name].student), _by_role(taught, needs[name].teacher)
        losses |= {f"{name}/{part}": value for part, value in method(*roles, target, {}).items()}
    assert all(value.isfinite() and value.shape == () for value in losses.values())
    sum(value for name, value in losses.items() if "/" in name).backward()
    assert all(parameter.grad is None for parameter in theirs.parameters())
    felt = [parameter for parameter in ours.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert felt
    assert all(parameter.grad is not None for method in methods.values() for parameter in method.parameters())


def _shapes(shapes, roles):
    return Shapes(K, {role: shapes[tap] for role, tap in roles.items()})


def _by_role(seen, roles):
    return dataclasses.replace(seen, taps={role: seen.taps[tap] for role, tap in roles.items()})


def test_a_student_follows_its_teacher():
    """A few steps of both methods bring a small network's predictions to those of a teacher."""
    torch.manual_seed(0)
    student, teacher = handle("rt_detr_v2", num_queries=4), handle("rt_detr_v2", seed=5, num_queries=4)
    ours, theirs = (TappedDetector(made, made.info).eval() for made in (student, teacher))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        taught = theirs(images())
    optimiser = torch.optim.Adam(ours.parameters(), 1e-2)
    history = []
    for _ in range(25):
        loss = sum(prediction_loss(ours(images()), taught).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert history[-1] < 0.75 * history[0]
