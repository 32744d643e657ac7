"""SDD: both networks' classifiers on regions of the last map, and which regions count more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kd_hf.errors import UserError
from kd_hf.info import Shapes
from kd_hf.methods.dkd import DKD
from kd_hf.methods.nkd import NKD
from kd_hf.methods.sdd import SDD
from kd_hf.outputs import Outputs, Target
from kd_hf.testing import tiny_stages
from tests.methods import straightforward as plain
from tests.methods.build import build as build_on_logits
from tests.methods.build import run

CLASSES, BATCH = 7, 4
LABEL = torch.tensor([0, 3, 6, 2])
OPTIONS = ({}, {"kind": "kd"}, {"kind": "nkd", "temperature": 2}, {"kind": "nkd", "nontarget": "all"})


def heads(widths=(5, 6), seed=0):
    torch.manual_seed(seed)
    student, teacher = (nn.Linear(width, CLASSES, dtype=torch.float64) for width in widths)
    return {"student:head": student, "head": teacher.requires_grad_(False)}


def maps(size=(8, 8), widths=(5, 6)):
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(BATCH, width, *size, dtype=torch.float64, generator=generator) for width in widths]


def build(parts, size=(8, 8), **config):
    shapes = (Shapes(CLASSES, {"feature": (parts[name].in_features, *size)}) for name in ("student:head", "head"))
    return SDD(SDD.Config(**config), *shapes, parts)


def losses(method, student, teacher, label=LABEL):
    blank = torch.zeros(BATCH, CLASSES)
    return method(*(Outputs(blank, taps={"feature": each}) for each in (student, teacher)), Target(label), {})


def total(parts):
    return torch.stack(list(parts.values())).sum()


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (7, 7), (2, 2), (6, 5)])
@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 4), (1, 2, 4)])
def test_logits_of_larger_regions_are_means_of_smaller_ones(size, scales):
    parts, (student, _) = heads(), maps(size)
    found = build(parts, size, scales=scales).regions("student:head", student)
    torch.testing.assert_close(found, plain.regions(student, parts["student:head"], scales), rtol=1e-12, atol=1e-13)


def test_the_straightforward_form_has_the_same_value_and_gradient():
    parts, (student, teacher) = heads(), maps()
    student.requires_grad_()
    own = parts["student:head"]
    values = [
        total(losses(build(parts), student, teacher)),
        plain.sdd(plain.regions(student, own), plain.regions(teacher, parts["head"]), LABEL),
    ]
    torch.testing.assert_close(*values, rtol=1e-11, atol=0)
    gradients = (torch.autograd.grad(value, [student, own.weight, own.bias]) for value in values)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-14)


def test_the_whole_image_alone_is_the_loss_of_the_networks_own_logits():
    parts, (student, teacher) = heads(), maps()
    pooled = [parts[name](each.mean((2, 3))) for name, each in (("student:head", student), ("head", teacher))]
    for kind, method, options in (("dkd", DKD, {"beta": 8}), ("nkd", NKD, {})):
        expected = run(build_on_logits(method, temperature=4, **options), *pooled, label=LABEL)
        found = losses(build(parts, kind=kind, scales=(1,)), student, teacher)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_a_region_counts_twice_where_it_and_the_whole_disagree_about_the_label():
    parts = heads((1, 1))
    with torch.no_grad():
        parts["head"].weight.zero_(), parts["head"].bias.zero_()
        parts["head"].weight[1], parts["head"].weight[2] = 1.0, -1.0  # class 1 where the map is positive
    teacher = torch.ones(BATCH, 1, 4, 4, dtype=torch.float64)
    teacher[:, :, :2, :2] = -0.5  # one quarter says class 2, the whole class 1
    method = build(parts, (4, 4), kind="kd", scales=(1, 2))
    student = maps((4, 4), (1, 1))[0]
    found = [losses(method, student, teacher, torch.full((BATCH,), label))["soft"] for label in (1, 2, 3, -1)]
    rows = [method.regions(name, each) for name, each in (("student:head", student), ("head", teacher))]
    log_p, log_q = ((each / 4).log_softmax(2) for each in rows)
    each = 16 * (log_q.exp() * (log_q - log_p)).sum(2)
    weights = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(found[2], each.mean())  # never right
    torch.testing.assert_close(found[3], each.mean())  # nothing to be right about
    weights[1] = 2
    torch.testing.assert_close(found[0], (each * weights).mean())
    torch.testing.assert_close(found[1], (each * weights).mean())


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_the_students_classifier_learns_and_the_teachers_does_not(config):
    parts, (student, teacher) = heads(), maps()
    student.requires_grad_(), teacher.requires_grad_()
    method = build(parts, **config)
    total(losses(method, student, teacher)).backward()
    assert student.grad.any() and teacher.grad is None
    assert all(parameter.grad.any() for parameter in parts["student:head"].parameters())
    assert all(parameter.grad is None for parameter in parts["head"].parameters())
    assert not method.state_dict() and not list(method.parameters())


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_a_sample_without_label_adds_nothing_but_to_kd(config):
    parts, (student, teacher) = heads(), maps()
    student.requires_grad_()
    total(losses(build(parts, **config), student, teacher, torch.tensor([-1, 3, 6, 2]))).backward()
    assert bool(student.grad[0].any()) == (config.get("kind") == "kd")
    assert student.grad[1:].flatten(1).any(1).all()


def test_the_label_may_stay_among_the_other_classes():
    parts, pair = heads(), maps()
    one, two = (losses(build(parts, kind="nkd", nontarget=which), *pair) for which in ("others", "all"))
    assert one["target"] == two["target"] and one["nontarget"] != two["nontarget"]


def test_what_cannot_be_classified_is_refused():
    cnn = tiny_stages("cnn")
    with pytest.raises(UserError, match="'bare' has none that could be used apart"):
        SDD.needs(SDD.Config(), cnn, replace(cnn, name="bare", head=None))
    with pytest.raises(
        UserError, match=r"teacher_tap: 'stage:-1' gives shape \(6, 8, 8\), and the teacher's classifier takes"
    ):
        parts = heads((5, 9))
        shapes = (Shapes(CLASSES, {"feature": (width, 8, 8)}) for width in (5, 6))
        SDD(SDD.Config(), *shapes, parts)
    with pytest.raises(UserError, match="the student's classifier is a Sequential"):
        shapes = (Shapes(CLASSES, {"feature": (width, 8, 8)}) for width in (5, 6))
        SDD(SDD.Config(), *shapes, {**heads(), "student:head": nn.Sequential(nn.Linear(5, CLASSES))})
    for scales in ((2, 4), (1, 4, 2), (1, 1), ()):
        with pytest.raises(ValidationError, match=r"expected \[1\], \[1, 2\]"):
            SDD.Config(scales=scales)
