"""Every meter against scikit-learn, torchmetrics, torch.distributions or the formula on the whole set at once."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch.nn import functional
from torchmetrics.classification import MulticlassCalibrationError

from kd_hf.metrics.meters import Accuracy, ByClass, Calibration, Divergence, FeatureSimilarity, Scored

CPU = torch.device("cpu")
ROWS, CLASSES = 257, 13


@pytest.fixture(scope="module")
def scored():
    draws = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draws)

    def integers(*shape):
        return torch.randint(CLASSES, shape, generator=draws)

    label = integers(ROWS)
    mixed = normal(ROWS, 6)
    return Scored(
        logits=2 * normal(ROWS, CLASSES) + 2 * torch.eye(CLASSES)[label],
        label=label,
        valid=torch.ones(ROWS, dtype=torch.bool),
        teacher_class=integers(ROWS),
        teacher_logits=2 * normal(ROWS, CLASSES),
        features=mixed @ normal(6, 9) + 3,
        teacher_features=mixed @ normal(6, 5) + normal(ROWS, 5) - 2,
        group=label,
    )


def part(scored, rows):
    return Scored(**{key: None if value is None else value[rows] for key, value in vars(scored).items()})


def meters():
    return [Accuracy(CPU), Calibration(CPU), Divergence(CPU), FeatureSimilarity(CPU), ByClass(CPU, CLASSES)]


def measure(*batches, reduce_sum=lambda value: value):
    found = meters()
    for batch in batches:
        for meter in found:
            meter.update(batch)
    return {key: value for meter in found for key, value in meter.compute(reduce_sum).items()}


def close(values, rel=1e-12):
    return pytest.approx(values, rel=rel)


def test_accuracy_agrees_with_scikit_learn(scored):
    values = measure(scored)
    choice = scored.logits.argmax(1)
    assert values["top1"] == close(100 * accuracy_score(scored.label, choice))
    assert values["top5"] == close(100 * top_k_accuracy_score(scored.label, scored.logits, k=5))
    assert values["agreement"] == close(100 * accuracy_score(scored.teacher_class, choice))
    assert values["samples"] == ROWS


def test_calibration_agrees_with_torchmetrics_and_the_formulas(scored):
    values = measure(scored)
    p = scored.logits.double().softmax(1)
    calibration = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    assert values["ece"] == pytest.approx(100 * calibration(p, scored.label).item(), rel=1e-5)  # it sums in float32
    assert values["nll"] == close(functional.cross_entropy(scored.logits.double(), scored.label).item())
    assert values["brier"] == close((p - torch.eye(CLASSES)[scored.label]).square().sum(1).mean().item())


def test_certainty_falls_into_the_last_bin():
    certain = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    values = measure(Scored(certain, torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)))
    assert (values["ece"], values["brier"], values["nll"]) == (50.0, 1.0, 100.0)


def test_divergence_agrees_with_torch(scored):
    student, teacher = (
        torch.distributions.Categorical(logits=x.double()) for x in (scored.logits, scored.teacher_logits)
    )
    expected = torch.distributions.kl_divergence(teacher, student).mean().item()
    assert measure(scored)["kl"] == close(expected)
    same = Scored(scored.logits, scored.label, scored.valid, teacher_logits=scored.logits)
    assert measure(same)["kl"] == 0.0


def test_cka_agrees_with_the_kernel_form(scored):
    """tr(K H L H) / √(tr(K H K H) tr(L H L H)) of the N × N Gram matrices K and L, H = 1 − 1/N."""
    centre = torch.eye(ROWS, dtype=torch.float64) - 1 / ROWS
    grams = [centre @ x @ x.T @ centre for x in (scored.features.double(), scored.teacher_features.double())]
    expected = (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())
    value = measure(scored)["cka"]
    assert value == pytest.approx(expected.item(), rel=1e-9)
    assert 0.05 < value < 0.95
    turned = scored.features @ torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1)))[0]
    same = Scored(scored.logits, scored.label, scored.valid, features=scored.features, teacher_features=7 * turned + 1)
    assert measure(same)["cka"] == pytest.approx(1.0, abs=1e-5)


def test_accuracy_by_class(scored):
    meter = ByClass(CPU, CLASSES)
    meter.update(scored)
    counts = meter.counts()
    choice = scored.logits.argmax(1)
    for index, (right, count) in enumerate(counts):
        mine = scored.label == index
        assert (right, count) == (int((choice[mine] == index).sum()), int(mine.sum()))
    assert meter.compute()["mean_class_top1"] == close(100 * sum(r / n for r, n in counts) / CLASSES)


@pytest.mark.parametrize("size", [1, 16, 100])
def test_does_not_depend_on_the_batch_size(scored, size):
    batches = [part(scored, slice(start, start + size)) for start in range(0, ROWS, size)]
    assert measure(*batches) == close(measure(scored))


def test_padding_counts_for_nothing(scored):
    half = part(scored, slice(0, 200))
    rubbish = {key: torch.full_like(getattr(scored, key), torch.nan) for key in ("logits", "features")}
    padded = Scored(
        **{key: torch.cat([getattr(half, key), rubbish.get(key, value)[200:]]) for key, value in vars(scored).items()}
    )
    padded.valid[200:] = False
    padded.group[200:] = -1
    assert measure(padded) == close(measure(half))


def test_ranks_add_up(scored):
    ranks = [meters(), meters()]
    for index, mine in enumerate(ranks):
        for meter in mine:
            meter.update(part(scored, slice(index, None, 2)))
    whole = measure(scored)
    for ours, theirs in zip(*ranks, strict=True):
        tensors = iter(_tensors(theirs))
        values = ours.compute(lambda value, tensors=tensors: value + next(tensors))
        assert values == close({key: whole[key] for key in values})


def _tensors(meter):
    """A meter's sums in the order in which it reduces them."""
    seen = []
    meter.compute(lambda value: seen.append(value) or value)
    return seen


def test_images_without_a_label_count_for_the_comparison_only(scored):
    known = measure(part(scored, slice(0, 100)))
    label = torch.where(torch.arange(ROWS) < 100, scored.label, -1)
    values = measure(Scored(**{**vars(scored), "label": label, "group": label}))
    for key in ("top1", "top5", "nll", "ece", "brier", "mean_class_top1"):
        assert values[key] == close(known[key])
    assert values["samples"] == ROWS
    for key in ("agreement", "kl", "cka"):
        assert values[key] == close(measure(scored)[key])


def test_several_right_answers(scored):
    answers = torch.stack([scored.label, (scored.label + 1) % CLASSES, torch.full_like(scored.label, -1)], 1)
    values = Accuracy(CPU)
    values.update(Scored(scored.logits, answers, scored.valid))
    ranked = scored.logits.topk(5).indices
    right = (ranked == answers[:, :1]) | (ranked == answers[:, 1:2])
    expected = {"top1": right[:, 0], "top5": right.any(1)}
    assert values.compute() == {
        **{k: close(100 * v.double().mean().item()) for k, v in expected.items()},
        "samples": ROWS,
    }


def test_what_was_not_measured_is_left_out(scored):
    values = measure(Scored(scored.logits, scored.label, scored.valid))
    assert values.keys() == {"top1", "top5", "samples", "nll", "ece", "brier"}
    nothing = measure(Scored(scored.logits, torch.full_like(scored.label, -1), scored.valid))
    assert nothing == {"samples": 0}


def test_few_classes(scored):
    few = Scored(scored.logits[:, :3], scored.label % 3, scored.valid)
    assert measure(few)["top5"] == 100.0


def test_counts_stay_exact_beyond_what_float32_holds():
    meter = Accuracy(CPU)
    meter.sums += 2**24
    meter.update(Scored(torch.eye(10)[:1], torch.tensor([0]), torch.ones(1, dtype=torch.bool)))
    assert meter.compute()["samples"] == 2**24 + 1
