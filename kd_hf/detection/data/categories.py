"""Numbers of classes: those of COCO have gaps, many copies of it do not, and networks are built for either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from kd_hf.errors import UserError

UNUSED = "N/A"  # the name of a number that is no class
LARGEST = 9999  # above it, a network with an output for each number would be a mistake


@cache
def coco_ids() -> Mapping[str, int]:
    """COCO's 80 classes and their official numbers, of which 12, 26, 29, … up to 90 are unused; torchvision knows."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return {name: number for number, name in enumerate(names) if number > 0 and name != UNUSED}


def numbered_names(names: Mapping[int, str], where: str) -> tuple[str, ...]:
    """Names by number, with :data:`UNUSED` in the gaps.

    Raises:
        UserError: numbers below 0, or so large that they are no classes.
    """
    odd = next((number for number in names if not 0 <= number <= LARGEST), None)
    if odd is not None:
        raise UserError(f"data.path: {where} has the category id {odd}; expected 0, 1, 2, …, at most {LARGEST}")
    return tuple(names.get(number, UNUSED) for number in range(max(names, default=-1) + 1))


def category_ids(names: Sequence[str]) -> tuple[int, ...]:
    """The numbers that are classes."""
    return tuple(number for number, name in enumerate(names) if name != UNUSED)


def is_matched(names: Sequence[str], outputs: int) -> bool:
    """Whether a network's classes are the data's; see :func:`outputs_of_classes`."""
    try:
        outputs_of_classes(names, outputs)
    except UserError:
        return False
    return True


def outputs_of_classes(names: Sequence[str], outputs: int) -> np.ndarray:
    """Which output of a network stands for each class of the data.

    The same number, where the network has as many outputs as the data has numbers. Otherwise both are COCO's classes
    (or some of them), once by official number (91 outputs) and once without gaps (80 outputs).

    Args:
        names: of the data's classes, by number.
        outputs: of the network, without the one for "no object".

    Returns:
        int64 ``[len(names)]``, -1 for a number that is no class.

    Raises:
        UserError: another number of outputs.
    """
    used = category_ids(names)
    found = np.full(len(names), -1, np.int64)
    if outputs == len(names):
        found[list(used)] = used
        return found
    official = coco_ids()
    tables = {max(official.values()) + 1: official, len(official): {name: n for n, name in enumerate(official)}}
    if outputs not in tables or not {names[number] for number in used} <= official.keys():
        raise UserError(
            f"the network has {outputs} classes, the data {len(names)}; they are matched by number, or by name where "
            f"both are COCO's ({' or '.join(map(str, sorted(tables)))} outputs)"
        )
    found[list(used)] = [tables[outputs][names[number]] for number in used]
    return found
