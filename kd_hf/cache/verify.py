"""Asking the teachers again about images whose answers are stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kd_hf.cache.speakers import Speakers
from kd_hf.outputs import Outputs
from kd_hf.recipe.config import Recipe
from kd_hf.store.format import KEY, KEY_MASK, open_store, rounding
from kd_hf.store.reader import Reader, StoredTeacher

# how far outputs of one network may lie apart from one batch size or machine to another, relative to 1 + |x|
_NOISE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_store(recipe: Recipe, place: str, count: int, processes: int | None = None) -> str | None:
    """Compare images at random positions with what their teachers say now.

    Args:
        recipe: the run that the store was written for.
        place: of the store.
        count: how many images.
        processes: that will train; by default as many as run now.

    Returns:
        The first difference that rounding does not explain; None when there is none.

    Raises:
        UserError: the store does not fit the recipe.
    """
    store, speakers = open_store(place), Speakers(recipe, processes)
    draws = np.random.default_rng()  # other positions every time
    size = min(2, speakers.positions)  # mixed images come in pairs
    pairs = speakers.positions // size
    starts = [
        (int(draws.integers(store.manifest.epochs)), int(draws.integers(pairs)) * size)
        for _ in range(-(-count // size))
    ]
    readers = {}
    for name, teacher in speakers.teachers.items():
        stored = StoredTeacher.of(name, teacher.cfg, store)
        stored.check(speakers.recipe, speakers.source, speakers.views, speakers.length.global_batch, 0)
        readers[name] = Reader(stored, speakers.layout, 0, speakers.taps[name], ahead=0)
    for (epoch, start), batch in zip(starts, speakers.batches(starts, size), strict=True):
        for name, said in speakers.ask(batch).items():
            rows, noise = readers[name].rows(epoch, start, size), _NOISE[speakers.teachers[name].dtype]
            if found := _difference(readers[name], rows, batch.key, said, noise):
                return f"epoch {epoch}, positions {start} to {start + size - 1}, {name}: {found}"
    return None


def _difference(
    reader: Reader, rows: Mapping[str, np.ndarray], keys: Tensor, said: Outputs, noise: float
) -> str | None:
    """What differs between stored rows and what the teacher says, beyond rounding and `noise`."""
    if not np.array_equal(rows[KEY], keys.numpy() & KEY_MASK):
        return "the key is another image's"
    name, facts = reader.teacher.column, reader.teacher.facts
    live = torch.log_softmax(said.logits.float().cpu(), 1)
    values = torch.from_numpy(rows[f"{name}_values"]).float()
    pairs = {"a log-probability": (values, live)}
    if f"{name}_classes" in rows:
        classes = torch.from_numpy(rows[f"{name}_classes"].astype(np.int64))
        least = live.topk(facts.top_k, dim=1).values[:, -1:]
        pairs = {
            "a log-probability": (values, live.gather(1, classes)),
            "the least log-probability kept": (values[:, -1:], least),
        }
    taps = reader.decode(rows, torch.device("cpu")).taps
    pairs |= {f"the tap {tap}": (kept, said.taps[tap].float().cpu()) for tap, kept in taps.items()}
    for what, (stored, now) in pairs.items():
        over = (stored - now).abs() - rounding(now) - noise * (1 + now.abs())
        if over.max() > 0:
            at = over.flatten().argmax()
            return f"{what} is {stored.flatten()[at]:.5g} in the store and {now.flatten()[at]:.5g} from the teacher"
    return None
