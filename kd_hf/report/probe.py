"""Networks over evaluation images: what they answer, what their features look like, what they look at."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from kd_hf.data.batch import Batch
from kd_hf.data.loader import eval_loader
from kd_hf.data.source import Source
from kd_hf.data.views import DeviceStage
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo
from kd_hf.models.handle import ModelHandle
from kd_hf.models.taps import TappedModel, available_taps
from kd_hf.outputs import Outputs
from kd_hf.text.terminal import watched

STUDENT, PLAIN = "student", "plain student"
CKA_SAMPLES = 512
GALLERY = 8  # images whose attention is drawn
THUMBNAIL = 112  # pixels
BATCH = 32


@dataclass
class Sample:
    """What was seen; arrays of N images in the order of the set, unreadable ones left out.

    `choice` and `confidence` hold networks whose classes are the data's. `features` hold the images that CKA uses;
    the gallery's tensors its few images, as each network was given them.
    """

    classes: tuple[str, ...]
    label: np.ndarray  # int64 [N], -1 where there is none
    choice: dict[str, np.ndarray]  # int64 [N]
    confidence: dict[str, np.ndarray]  # probability of the choice, [N]
    features: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # network → tap → float64 [n, C]
    gallery: np.ndarray = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.uint8))  # uint8 [G, 3, S, S]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # network → [G, 3, S, S], normalised
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # image → uint8 [3, s, s], where opinions differ

    @property
    def reference(self) -> str | None:
        """The network the student is compared with: its first teacher that knows the same classes."""
        return next((name for name in self.choice if name not in (STUDENT, PLAIN)), None)

    def hits(self, name: str) -> np.ndarray:
        """bool [N]: where a network's choice is the label."""
        return self.choice[name] == self.label


def shadow(handle: ModelHandle) -> ModelHandle:
    """The same network in other modules that share its tensors: hooks, modes and switches leave the first alone."""
    network = handle.network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return replace(handle, network=copy.deepcopy(network, shared).eval())


def look(
    networks: Mapping[str, ModelHandle], source: Source, *, samples: int | None = None, progress: bool = False
) -> Sample:
    """Show evaluation images to networks, each in its own preprocessing and where its weights lie.

    Args:
        networks: by name; ``student`` is the student, ``plain student`` its plain twin, all others are teachers.
        source: the images.
        samples: look at this many, spread over the set.
        progress: show a bar.

    Raises:
        UserError: the student's classes are not the data's, or no image can be read.
    """
    own = networks[STUDENT].info.num_classes
    if own != source.num_classes:
        raise UserError(f"the student has {own} classes, {source.describe()} has {source.num_classes}")
    views = {name: handle.info.preprocessing for name, handle in networks.items()}
    loader = eval_loader(source, views, batch_size=BATCH, max_samples=samples)
    stage = DeviceStage(views, source.num_classes)
    collector = _Collector(networks, source, min(samples or len(source), len(source)))
    hidden = not (progress and watched())
    for batch in tqdm(loader, desc="report", unit="batch", leave=False, disable=hidden):
        collector.add(batch, stage(batch)[0])
    return collector.sample()


class _Collector:
    """Gathers a :class:`Sample` batch by batch."""

    def __init__(self, networks: Mapping[str, ModelHandle], source: Source, count: int) -> None:
        self.source = source
        self.models = {name: _Tapped(handle) for name, handle in networks.items() if name != PLAIN}
        self.models |= {PLAIN: _Tapped(networks[PLAIN], taps=False)} if PLAIN in networks else {}
        self.comparable = [name for name, h in networks.items() if h.info.num_classes == source.num_classes]
        self.for_cka, self.for_gallery = _spread(count, CKA_SAMPLES), _spread(count, GALLERY)
        self.view_of: Mapping[str, str] = {}
        self.seen = self.kept = 0
        self.label: list[Tensor] = []
        self.choice: dict[str, list[Tensor]] = {name: [] for name in self.comparable}
        self.confidence: dict[str, list[Tensor]] = {name: [] for name in self.comparable}
        self.features: dict[str, dict[str, list[Tensor]]] = {name: {} for name in self.models}
        self.gallery: list[Tensor] = []
        self.inputs: dict[str, list[Tensor]] = {}
        self.pictures: dict[int, np.ndarray] = {}

    def add(self, batch: Batch, pixels: Mapping[str, Tensor]) -> None:
        places = torch.arange(self.seen, self.seen + len(batch))
        self.seen += len(batch)
        valid = batch.valid
        in_cka = valid & torch.isin(places, self.for_cka)
        in_gallery = valid & torch.isin(places, self.for_gallery)
        for name, model in self.models.items():
            outputs = model(pixels[name])
            self._answer(name, outputs.logits, valid)
            for tap, value in outputs.taps.items() if in_cka.any() else ():
                pooled = _pooled(tap, value, model.info).cpu()[in_cka].double()
                self.features[name].setdefault(tap, []).append(pooled)
            if model.taps:
                self.inputs.setdefault(name, []).append(pixels[name][in_gallery])
        view = batch.views[batch.view_of[STUDENT]]
        self.gallery.append(view[in_gallery])
        self.label.append(batch.label[valid])
        self._keep_pictures(view[valid])
        self.kept += int(valid.sum())

    def _answer(self, name: str, logits: Tensor, valid: Tensor) -> None:
        if name in self.choice:
            best = logits.cpu()[valid].softmax(1).max(1)
            self.choice[name].append(best.indices)
            self.confidence[name].append(best.values)

    def _keep_pictures(self, view: Tensor) -> None:
        """Small copies of the images on which the student differs from its reference, or from the label."""
        reference = next((name for name in self.comparable if name not in (STUDENT, PLAIN)), None)
        other = self.choice[reference][-1] if reference else self.label[-1]
        for index in ((self.choice[STUDENT][-1] != other) & (other >= 0)).nonzero().flatten().tolist():
            self.pictures[self.kept + index] = _thumbnail(view[index])

    def sample(self) -> Sample:
        if not self.kept:
            raise UserError(f"no image of {self.source.describe()} can be read")
        return Sample(
            tuple(self.source.class_names),
            torch.cat(self.label).numpy(),
            {name: torch.cat(parts).numpy() for name, parts in self.choice.items()},
            {name: torch.cat(parts).numpy() for name, parts in self.confidence.items()},
            {name: {tap: torch.cat(p).numpy() for tap, p in taps.items()} for name, taps in self.features.items()},
            torch.cat(self.gallery).numpy(),
            {name: torch.cat(parts) for name, parts in self.inputs.items()},
            self.pictures,
        )


class _Tapped:
    """A shadow of a network with taps at every stage and block, run without gradient where its weights lie."""

    def __init__(self, handle: ModelHandle, taps: bool = True) -> None:
        self.info = handle.info
        self.taps = depth_taps(handle.info) if taps else ()
        self.model = TappedModel(shadow(handle), handle.info, self.taps)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Outputs:
        reference = next(self.model.parameters())
        outputs = self.model(pixels.to(reference.device, reference.dtype))
        return Outputs(outputs.logits.float(), None, outputs.taps)


def depth_taps(info: ModelInfo) -> tuple[str, ...]:
    """Taps from the input to the output: blocks, then stages; a network with neither has only ``pre_logits``."""
    named = available_taps(info)
    depths = [tap for kind in ("block:", "stage:") for tap in named if tap.startswith(kind)]
    return tuple(depths) or tuple(tap for tap in named if tap == "pre_logits")


def _pooled(tap: str, value: Tensor, info: ModelInfo) -> Tensor:
    """Features [B, C]: the mean over a map, or over the patch tokens of a sequence."""
    if tap.startswith("stage:"):
        return value.float().mean((2, 3))
    if tap.startswith("block:"):
        return value[:, len(info.block_prefix) :].float().mean(1)
    return value.float().flatten(1)


def _spread(count: int, wanted: int) -> Tensor:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def _thumbnail(image: Tensor) -> np.ndarray:
    """uint8 [3, S, S] at 112 pixels or less."""
    if image.shape[-1] <= THUMBNAIL:
        return image.numpy().copy()
    small = F.interpolate(image[None].float(), THUMBNAIL, mode="area")[0]
    return small.round().byte().numpy()


def linear_cka(left: Iterable[np.ndarray], right: Iterable[np.ndarray]) -> np.ndarray:
    r"""Linear CKA of every pair of feature matrices (Kornblith et al. 2019), float64 ``[len(left), len(right)]``.

    .. math:: \mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X \rVert_F^2}{\lVert X^\top X \rVert_F \lVert Y^\top Y \rVert_F}

    for features ``[n, C]`` of the same n images, centred per channel. It is computed from the n × n Gram matrices,
    so that widths do not matter. NaN where features are constant or not finite.
    """
    return _grams(left) @ _grams(right).T


def _grams(features: Iterable[np.ndarray]) -> np.ndarray:
    """Centred Gram matrices of unit norm as rows, ``[L, n·n]``."""
    rows = []
    for values in features:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
            gram = (centred @ centred.T).ravel()
            # rounding of a constant is no feature
            constant = np.abs(centred).max(initial=0.0) <= 1e-12 * np.abs(values).max(initial=0.0)
            rows.append(gram / (np.nan if constant else np.linalg.norm(gram)))
    return np.stack(rows)


@dataclass(frozen=True)
class Confusion:
    """Images on which the student says one class and its reference another."""

    student: int
    other: int
    images: tuple[int, ...]  # the surest first


def confusions(sample: Sample) -> list[Confusion]:
    """Pairs of differing choices, the most frequent first; of the student and its teacher, or else the label."""
    name = sample.reference
    other = sample.choice[name] if name else sample.label
    sure = sample.confidence[STUDENT] + (sample.confidence[name] if name else 0.0)
    found: dict[tuple[int, int], list[int]] = {}
    for index in sorted(sample.pictures, key=lambda index: -float(sure[index])):
        found.setdefault((int(sample.choice[STUDENT][index]), int(other[index])), []).append(index)
    pairs = [Confusion(*pair, tuple(images)) for pair, images in found.items()]
    return sorted(pairs, key=lambda pair: -len(pair.images))  # stable: among equals the surest first


@dataclass(frozen=True)
class Gains:
    """Top-1 of classes in percent; classes without a labelled image are left out."""

    names: tuple[str, ...]
    counts: np.ndarray  # labelled images, [K]
    student: np.ndarray  # [K]
    other: np.ndarray | None  # [K] of the network it is compared with
    against: str | None

    @property
    def difference(self) -> np.ndarray:
        """Points of the student above the other network, or its own accuracy where there is none."""
        return self.student if self.other is None else self.student - self.other


def class_gains(sample: Sample) -> Gains | None:
    """Accuracy by class, best gain first, against the plain twin or else the teacher; None without labels."""
    known = sample.label >= 0
    counts = np.bincount(sample.label[known], minlength=len(sample.classes))
    if not known.any():
        return None

    def accuracy(name: str) -> np.ndarray:
        hits = np.bincount(sample.label[known & sample.hits(name)], minlength=len(counts))
        return 100.0 * hits[counts > 0] / counts[counts > 0]

    against = PLAIN if PLAIN in sample.choice else sample.reference
    found = Gains(
        tuple(name for name, count in zip(sample.classes, counts, strict=True) if count),
        counts[counts > 0],
        accuracy(STUDENT),
        accuracy(against) if against else None,
        against,
    )
    order = np.argsort(-found.difference, kind="stable")
    names = tuple(found.names[index] for index in order)
    other = None if found.other is None else found.other[order]
    return replace(found, names=names, counts=found.counts[order], student=found.student[order], other=other)
