"""What a run is, so that what lies in a folder can be told from another run, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kd_hf.errors import UserError
from kd_hf.layout import RESOLVED
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe, make_recipe
from kd_hf.recipe.resolved import decisive, flat, recipe_hash, resolved, trained_hash

_SHOWN = 5  # keys that differ; the others are counted
_LONGEST = 40  # characters of a value


class Images(Protocol):
    """What is asked of a source of any kind."""

    class_names: tuple[str, ...]
    revision: str | None

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A hash of what is known of the rows without reading an image."""


@dataclass(frozen=True)
class DataFacts:
    """What a split was."""

    images: int
    classes: tuple[str, ...]
    revision: str | None
    """The commit, of a Hub data set."""
    rows: str
    """Hash of labels and names of the rows, in order."""

    @classmethod
    def of(cls, source: Images) -> DataFacts:
        """Those of images as they are now."""
        return cls(len(source), tuple(source.class_names), source.revision, source.fingerprint())

    def differences(self, other: DataFacts, split: str) -> Iterator[str]:
        """How another set of images differs, in words."""
        here = f"the {split} images"
        if self.images != other.images:
            yield f"{here} were {self.images} and are {other.images}"
        if self.classes != other.classes:
            gone, new = (set(a) - set(b) for a, b in ((self.classes, other.classes), (other.classes, self.classes)))
            words = [f"'{name}' is {how}" for how, names in (("gone", gone), ("new", new)) for name in sorted(names)]
            yield f"the classes of {here} differ ({listed(words, ', ') if words else 'in their order'})"
        if self.revision != other.revision:
            yield f"the revision of {here} was {self.revision} and is {other.revision}"
        elif self.rows != other.rows and self.images == other.images and self.classes == other.classes:
            yield f"{here} have other labels or another order"


@dataclass(frozen=True)
class Identity:
    """What decides the result of a run. None where a version before this one did not keep it."""

    recipe_hash: str
    global_batch: int
    recipe: dict[str, Any] | None = None
    """Resolved, as a recipe file has it."""
    data: dict[str, DataFacts] | None = None
    """By split, ``train`` and ``eval``."""
    teachers: dict[str, str] | None = None
    """Hash of the weights, by name; stored teachers are compared by their stores."""

    @classmethod
    def of(cls, recipe: Recipe, global_batch: int, data: Mapping[str, Images], teachers: Mapping[str, str]) -> Identity:
        """That of a run that begins now."""
        return cls(
            recipe_hash(recipe),
            global_batch,
            resolved(recipe),
            {split: DataFacts.of(source) for split, source in data.items()},
            dict(teachers),
        )

    @classmethod
    def of_older(cls, folder: Path, noted: str, global_batch: int) -> Identity:
        """What can be known of a run whose checkpoint only noted the hash of its recipe."""
        try:
            recipe = load_recipe(folder / RESOLVED) if (folder / RESOLVED).is_file() else None
        except UserError:  # of a version whose keys are gone
            recipe = None
        return cls(trained_hash(folder) or noted, global_batch, resolved(recipe) if recipe else None)

    def differences(self, now: Identity) -> list[str]:
        """How the run that begins `now` differs from this one, in words; nothing where it is the same."""
        found = _recipe_differences(self, now)
        if self.global_batch != now.global_batch:
            found.append(
                f"a step took {self.global_batch} images and takes {now.global_batch} (processes × "
                "train.per_device_train_batch_size × train.gradient_accumulation_steps)"
            )
        for split, facts in (self.data or {}).items():
            if now.data and split in now.data:
                found += facts.differences(now.data[split], {"train": "training", "eval": "evaluation"}[split])
        for name, weights in (self.teachers or {}).items():
            if now.teachers and now.teachers.get(name, weights) != weights:
                found.append(f"the teacher '{name}' has other weights")
        return found


def recipes_differ(before: Identity, recipe: Recipe) -> list[str]:
    """The part of :meth:`Identity.differences` that a recipe alone decides."""
    return _recipe_differences(before, Identity(recipe_hash(recipe), before.global_batch, resolved(recipe)))


def _recipe_differences(before: Identity, now: Identity) -> list[str]:
    if before.recipe is None or now.recipe is None:
        same = before.recipe_hash == now.recipe_hash
        return [] if same else [f"the recipe's hash was {before.recipe_hash} and is {now.recipe_hash}"]
    old, new = (flat(_decisive(values)) for values in (before.recipe, now.recipe))
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    return [f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}" for key in keys]


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decides of a resolved recipe, with the defaults of keys that were added since."""
    try:
        return decisive(make_recipe(values, RESOLVED))
    except UserError:  # of a version whose keys are gone: as it was written
        return dict(values)


def _shown(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def listed(words: list[str], between: str = "; ") -> str:
    """The first of them as a part of a sentence."""
    more = f"{between}and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return between.join(words[:_SHOWN]) + more
