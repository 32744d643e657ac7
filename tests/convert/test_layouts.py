from pathlib import Path

import pytest
import torch

from kd_hf.convert.layouts import find_student
from kd_hf.convert.reading import Checkpoint
from kd_hf.errors import UserError


def weights(value, *names):
    return {name: torch.full((2,), float(value)) for name in names}


def checkpoint(entries):
    return Checkpoint(Path("x.pth"), entries, ("mmengine.HistoryBuffer",))


def found(entries, choice="auto"):
    student = find_student(checkpoint(entries), choice)
    values = {name: tensor[0].item() for name, tensor in student.tensors.items()}
    return values, student


DISTILLER = weights(1, "student.backbone.conv1.weight", "student.head.fc.bias")
COMPANIONS = weights(
    9, "teacher.backbone.conv1.weight", "teacher.head.fc.bias", "distill_losses.loss_kd.fc.bias", "linear.bias"
)
AVERAGE = {f"module.{name}": tensor + 1 for name, tensor in {**DISTILLER, **COMPANIONS}.items()}
OPENMMLAB = {
    "meta": {"epoch": 1},
    "state_dict": {**DISTILLER, **COMPANIONS, "data_preprocessor.mean": torch.zeros(2)},
    "ema_state_dict": {"steps": torch.tensor(4), **AVERAGE},
}
OLD = {
    "state_dict": {
        **DISTILLER,
        **weights(2, "ema_student_backbone_conv1_weight", "ema_student_head_fc_bias", "ema_teacher_head_fc_bias"),
        "student.backbone.bn1.running_mean": torch.full((2,), 5.0),
    }
}
DEIT = {
    "model": weights(1, "cls_token", "projector.fc1.weight"),
    "model_ema": weights(2, "cls_token", "projector.fc1.weight"),
}
VKD = {
    "student": weights(1, "module.cls_token", "module.projector.base", "module.projector.weight"),
    "student_ema": weights(2, "cls_token", "projector.base"),
}
BOTH = {"backbone.conv1.weight": 1.0, "head.fc.bias": 1.0}


@pytest.mark.parametrize(
    ("entries", "auto", "model", "ema"),
    [
        (OPENMMLAB, 1, 2, 1),  # the average is in state_dict, what the optimiser left in ema_state_dict
        (DEIT, 1, 1, 2),
        (VKD, 1, 1, 2),
        ({"state_dict": weights(1, "a"), "state_dict_ema": weights(2, "a")}, 1, 1, 2),
    ],
)
def test_which_weights(entries, auto, model, ema):
    for choice, value in {"auto": auto, "model": model, "ema": ema}.items():
        assert set(found(entries, choice)[0].values()) == {value}


def test_openmmlab():
    values, student = found(OPENMMLAB)
    assert values == BOTH
    assert student.entry == "state_dict"
    assert student.strays == []
    assert student.left_out == {"teacher.*": 2, "distill_losses.*": 1, "linear.*": 1, "data_preprocessor.*": 1}
    values, student = found(OPENMMLAB, "model")
    assert values == {name: 2 * value for name, value in BOTH.items()}
    assert student.entry == "ema_state_dict"
    assert student.left_out["steps"] == 1


def test_openmmlab_before_1_0():
    """Only parameters have a second copy there."""
    averaged, raw = found(OLD, "ema")[0], found(OLD, "model")[0]
    assert averaged == found(OLD)[0] == {**BOTH, "backbone.bn1.running_mean": 5.0}
    assert raw == {"backbone.conv1.weight": 2.0, "head.fc.bias": 2.0, "backbone.bn1.running_mean": 5.0}


@pytest.mark.parametrize("level", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "student.", "module.", "module.student.", "_orig_mod.module.", "network."])
def test_levels_and_prefixes(level, prefix):
    state = {prefix + name: torch.full((2,), value) for name, value in BOTH.items()}
    values, student = found({level: state, "epoch": 3} if level else state)
    assert values == BOTH
    assert student.entry == (level or "")
    assert not student.left_out


def test_a_network_of_that_name_keeps_it():
    """`network.` is taken off only where it wraps everything."""
    state = weights(1, "network.0.weight", "head.bias")
    assert set(found(state)[0]) == state.keys()


def test_projectors_and_their_like_are_left_out():
    assert found(DEIT)[0] == {"cls_token": 1.0}
    values, student = found(VKD)
    assert values == {"cls_token": 1.0}
    assert student.left_out == {"projector.*": 2}


def test_unmarked_names_beside_marked_ones():
    student = found({**DISTILLER, **weights(9, "head.fc.bias", "queue")})[1]
    assert student.strays == ["head.fc.bias", "queue"]
    assert student.tensors["head.fc.bias"][0] == 1


def test_linear_belongs_to_a_distiller_only():
    assert set(found(weights(1, "linear.weight"))[0]) == {"linear.weight"}


@pytest.mark.parametrize("entries", [{"model": DEIT["model"], "model_ema": None}, DEIT["model"]])
def test_no_average(entries):
    with pytest.raises(UserError, match=r"--weights ema: 'x\.pth' holds no moving average; use auto or model"):
        find_student(checkpoint(entries), "ema")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, r"has no weights.*under model, state_dict, student; found mmengine"),
        ({"meta": {}, "model": None}, r"has no weights.*found meta, mmengine\.HistoryBuffer, model"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, r"entry 'state_dict' of 'x\.pth' is not a dict of tensors: b"),
        ({"a": torch.ones(1), "epoch": 3}, r"'x\.pth' is not a dict of tensors: epoch"),
    ],
)
def test_no_weights(entries, message):
    with pytest.raises(UserError, match=message):
        find_student(checkpoint(entries))
