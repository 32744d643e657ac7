"""A table of runs in one recipe: each of its `cells` is a block of changes to it, and `cell` chooses one.

A pair of networks is a recipe, and every method that may be trained on it a cell, with what was published for it::

    cells:
      kd: {published: {score: 70.66, source: RepDistiller}, methods: {kd: {weight: 0.9, temperature: 4.0}}}

Cells come from fragments as all other keys do, so that what a method needs on every pair is written once. Several
cells are laid over each other in the order given (``cell=wttm+crd``); where their combination has a cell of its own
name, that is laid over them. ``name: false`` leaves a fragment's cell out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from kd_hf.errors import UserError, nearest
from kd_hf.recipe.tree import Tree

CELL, CELLS, PUBLISHED = "cell", "cells", "published"


def with_cell(written: Tree, overrides: Tree) -> Tree:
    """What is written, with the chosen cell laid over it and the overrides over both.

    The run's folder gets the cell's name, unless an override names the folder.

    Raises:
        UserError: there are cells and none, or an unknown one, is chosen.
    """
    merged = Tree(copy.deepcopy(written.values), dict(written.places))
    merged.merge(overrides)
    cells = merged.values.pop(CELLS, None)
    if cells is None:
        return merged
    place = merged.place((CELLS,))
    if isinstance(cells, dict):
        cells = {name: cell for name, cell in cells.items() if cell is not False}  # a fragment's, left out here
    if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
        raise UserError(f"{place}: `cells` is a block of blocks: the changes that each cell makes, by its name")
    chosen = merged.values.get(CELL)
    if chosen is None:
        raise UserError(f"{place}: this recipe is a table of runs; choose one, cell=NAME: {listed(cells)}")
    names = _names(str(chosen), cells, merged.place((CELL,)))
    result = Tree(copy.deepcopy(written.values), dict(written.places))
    del result.values[CELLS]
    for name in names:
        result.merge(_block(cells[name], name, merged))
    if names[-1] != chosen:
        result.values.pop(PUBLISHED, None)  # of one of several cells
    folder = result.values.get("train", {}).get("output_dir")
    if isinstance(folder, str):
        result.values["train"]["output_dir"] = f"{folder}/{chosen}"
    result.merge(overrides)
    result.values.pop(CELLS, None)
    return result


def listed(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Cells with their published scores, in one line."""
    scores = {name: (cell.get(PUBLISHED) or {}).get("score") for name, cell in cells.items()}
    return ", ".join(name if score is None else f"{name} ({score})" for name, score in scores.items())


def _names(chosen: str, cells: Mapping[str, Any], place: str) -> list[str]:
    """The cells to lay over the recipe, in order."""
    parts = [chosen] if chosen in cells and "+" not in chosen else chosen.split("+")
    for part in parts:
        if part not in cells:
            raise UserError(f"{place}: cell: there is no cell '{part}'.{nearest(part, cells)}")
    return [*parts, chosen] if chosen in cells and len(parts) > 1 else parts


def _block(cell: Mapping[str, Any], name: str, tree: Tree) -> Tree:
    """A cell as a tree of its own, whose keys are still where they were written."""
    places = {keys[2:]: place for keys, place in tree.places.items() if keys[:2] == (CELLS, name) and len(keys) > 2}
    return Tree(copy.deepcopy(dict(cell)), places)
