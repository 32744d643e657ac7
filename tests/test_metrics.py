import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from kd_hf.metrics import ClassificationMeter

CPU = torch.device("cpu")


def batch(rows=257, classes=13, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=draws)
    return logits, torch.randint(classes, (rows,), generator=draws), torch.randint(classes, (rows,), generator=draws)


def measure(*batches):
    meter = ClassificationMeter(CPU)
    for logits, label, valid, *teacher in batches:
        meter.update(logits, label, valid, *teacher)
    return meter.compute()


def everything(label):
    return torch.ones(len(label), dtype=torch.bool)


def test_agrees_with_scikit_learn():
    logits, label, teacher = batch()
    values = measure((logits, label, everything(label), teacher))
    assert values == {
        "top1": pytest.approx(100 * accuracy_score(label, logits.argmax(1))),
        "top5": pytest.approx(100 * top_k_accuracy_score(label, logits, k=5)),
        "agreement": pytest.approx(100 * accuracy_score(teacher, logits.argmax(1))),
        "samples": 257,
    }


@pytest.mark.parametrize("size", [1, 16, 100, 257])
def test_does_not_depend_on_the_batch_size(size):
    logits, label, teacher = batch()
    parts = [tensor.split(size) for tensor in (logits, label, everything(label), teacher)]
    assert measure(*zip(*parts, strict=True)) == measure((logits, label, everything(label), teacher))


def test_padding_counts_for_nothing():
    logits, label, teacher = batch()
    valid = everything(label)
    valid[200:] = False
    padded = measure((logits, label, valid, teacher))
    assert padded == measure((logits[:200], label[:200], valid[:200], teacher[:200]))


def test_images_without_a_label_count_for_agreement_only():
    logits, label, teacher = batch()
    known = measure((logits[:100], label[:100], everything(label[:100]), teacher[:100]))
    label[100:] = -1
    values = measure((logits, label, everything(label), teacher))
    assert (values["top1"], values["top5"]) == (known["top1"], known["top5"])
    assert values["samples"] == 257
    assert values["agreement"] == pytest.approx(100 * accuracy_score(teacher, logits.argmax(1)))


def test_what_was_not_measured_is_left_out():
    logits, label, _ = batch()
    assert measure((logits, label, everything(label))).keys() == {"top1", "top5", "samples"}
    assert measure((logits, torch.full_like(label, -1), everything(label))) == {"samples": 0}


def test_few_classes():
    logits, label, _ = batch(classes=3)
    assert measure((logits, label, everything(label)))["top5"] == 100.0


def test_ranks_add_up():
    logits, label, teacher = batch()
    halves = [ClassificationMeter(CPU) for _ in range(2)]
    for index, meter in enumerate(halves):
        mine = slice(index, None, 2)
        meter.update(logits[mine], label[mine], everything(label[mine]), teacher[mine])
    total = halves[0].compute(lambda sums: sums + halves[1].sums)
    assert total == measure((logits, label, everything(label), teacher))


def test_counts_stay_exact_beyond_what_float32_holds():
    meter = ClassificationMeter(CPU)
    logits, label = torch.eye(10)[:1], torch.tensor([0])
    meter.sums += 2**24
    meter.update(logits, label, everything(label))
    assert meter.compute()["samples"] == 2**24 + 1
