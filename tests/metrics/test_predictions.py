"""Logits gathered over batches and ranks."""

import numpy as np
import torch

from kd_hf.data.batch import Batch
from kd_hf.metrics.predictions import Predictions
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import TrainConfig


class Ranks:
    """Stands for an accelerator of ranks that hold these batches."""

    def __init__(self, *others):
        self.others = others

    def gather(self, tensor):
        return torch.cat([tensor, *(other.pop(0) for other in self.others)])


def batch(rows, valid):
    row = torch.tensor(rows)
    return Batch({}, row % 10, row, row, torch.tensor(valid), {})


def logits_of(rows):
    return torch.tensor(rows)[:, None] + torch.linspace(0, 0.5, 3)


def test_every_image_is_there_once_in_the_order_of_the_set():
    found = Predictions()
    for rows, valid in (([4, 2, 9], [True, False, True]), ([0, 7, -1], [True, True, False])):
        found.add(batch(rows, valid), logits_of(rows))
    predictions, labels = found.gather(build_accelerator(TrainConfig(output_dir=".", use_cpu=True)))
    assert labels.tolist() == [0, 4, 7, 9]
    assert np.allclose(predictions, logits_of([0, 4, 7, 9]).numpy())
    assert predictions.dtype == np.float32


def test_images_of_other_ranks_take_their_places():
    mine, rows = Predictions(), [1, 3]
    mine.add(batch(rows, [True, True]), logits_of(rows))
    other = [torch.tensor([0, 2]), torch.tensor([0, 2]), logits_of([0, 2])]
    predictions, labels = mine.gather(Ranks(other))
    assert labels.tolist() == [0, 1, 2, 3]
    assert np.allclose(predictions[:, 0], [0, 1, 2, 3])
