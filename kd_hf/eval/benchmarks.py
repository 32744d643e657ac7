"""Sets that networks are measured on: ImageNet and its variants by name, and how classes of data and network match.

============================  ==================================  ====================================================
name                          on the Hub                          protocol
============================  ==================================  ====================================================
``imagenet-1k``               ILSVRC/imagenet-1k                  50,000 validation images, 1000 classes
``imagenet-real``             the same                            right if among the reassessed labels; images without
                                                                  one are left out (https://arxiv.org/abs/2006.07159)
``imagenet-v2``               clip-benchmark/wds_imagenetv2       matched frequency, 10,000 images, 1000 classes
                                                                  (https://arxiv.org/abs/1902.10811)
``imagenet-a``                clip-benchmark/wds_imagenet-a       7,500 images; the choice is among its 200 classes
                                                                  (https://arxiv.org/abs/1907.07174)
``imagenet-r``                clip-benchmark/wds_imagenet-r       30,000 images; the choice is among its 200 classes
                                                                  (https://arxiv.org/abs/2006.16241)
``imagenet-sketch``           clip-benchmark/wds_imagenet_sketch  50,889 images, 1000 classes
                                                                  (https://arxiv.org/abs/1905.13549)
============================  ==================================  ====================================================

``imagenet-a=/path`` reads a folder instead: class folders as the authors' archives have them (synset ids; plain
numbers in V2), Parquet or tar files. The lists of classes and the reassessed labels are those that timm ships.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_hf.data.opening import open_source
from kd_hf.data.source import EVAL_NAMES, TABLE_PATTERNS, Source
from kd_hf.errors import UserError, nearest
from kd_hf.info import ModelInfo
from kd_hf.metrics.classes import ClassMap
from kd_hf.recipe.config import DataConfig

if TYPE_CHECKING:
    from kd_hf.data.folders import FolderSource

IMAGENET = "imagenet_synsets.txt"
_SYNSET = re.compile(r"n\d{8}")
_VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Benchmark:
    """A set with a protocol of its own."""

    hub: str
    split: str
    protocol: str
    """In words, for the table."""
    classes: str = IMAGENET
    """File of timm's with the synset ids a network chooses among, in the order of the set's labels."""
    streaming: bool = False
    """Read Parquet files as needed: they hold the training images too. Tar files are downloaded whole."""
    real: bool = False
    """Whether the reassessed labels count."""


_VALIDATION = Benchmark("ILSVRC/imagenet-1k", "validation", "choice among 1000 classes", streaming=True)
BENCHMARKS: Mapping[str, Benchmark] = {
    "imagenet-1k": _VALIDATION,
    "imagenet-real": replace(
        _VALIDATION, real=True, protocol="right if among the reassessed labels; images without one are left out"
    ),
    "imagenet-v2": Benchmark("clip-benchmark/wds_imagenetv2", "test", "choice among 1000 classes"),
    "imagenet-a": Benchmark(
        "clip-benchmark/wds_imagenet-a", "test", "choice among its 200 classes", "imagenet_a_synsets.txt"
    ),
    "imagenet-r": Benchmark(
        "clip-benchmark/wds_imagenet-r", "test", "choice among its 200 classes", "imagenet_r_synsets.txt"
    ),
    "imagenet-sketch": Benchmark("clip-benchmark/wds_imagenet_sketch", "test", "choice among 1000 classes"),
}


@dataclass(frozen=True)
class EvalSet:
    """A set of images with what decides which choice is right."""

    name: str
    source: Source
    synsets: tuple[str, ...] = ()
    """What is chosen among, for ImageNet's relatives; empty: whatever classes the network has."""
    answers: Tensor | None = None
    """int64 ``[rows, M]`` of indices into `synsets`, padded with -1, where several may be right."""
    protocol: str = ""


def open_eval_set(cfg: DataConfig) -> EvalSet:
    """Open what ``data.path`` names: a benchmark, ``benchmark=folder``, or any data set a recipe can have.

    Raises:
        UserError: it cannot be found or read, or is not what the benchmark's protocol asks for.
    """
    name, equals, folder = cfg.path.partition("=")
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        if equals and not Path(cfg.path).expanduser().exists():
            raise UserError(f"data.path: no benchmark '{name}' in '{cfg.path}'.{nearest(name, BENCHMARKS)}")
        return EvalSet(cfg.path, open_source(cfg, "eval"))
    if equals or Path(name).is_dir():
        cfg = cfg.model_copy(update={"path": folder or name})
        source = _open_folder(cfg, benchmark)
    else:
        splits = {"eval_split": benchmark.split, "train_split": benchmark.split}
        cfg = cfg.model_copy(update={"path": benchmark.hub, "streaming": benchmark.streaming, **splits})
        source = open_source(cfg, "eval")
    answers = real_answers(file_names(source, cfg), source.describe()) if benchmark.real else None
    return EvalSet(name, source, _listed(benchmark.classes), answers, benchmark.protocol)


def _open_folder(cfg: DataConfig, benchmark: Benchmark) -> Source:
    """Files of Parquet or tar, class folders, or one folder down from `cfg.path` class folders."""
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else [])
        raise UserError(f"data.path: the folder '{cfg.path}' does not exist.{near}")
    if any(any(folder.glob(pattern)) for pattern in TABLE_PATTERNS):
        return open_source(cfg.model_copy(update={"eval_split": benchmark.split}), "eval")
    inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not any(_SYNSET.fullmatch(name) or name.isdecimal() for name in inside):
        below = next((name for name in EVAL_NAMES if name in inside), inside[0] if len(inside) == 1 else None)
        if below is None:
            raise UserError(f"data.path: '{cfg.path}' has no class folders; expected {folder}/n01440764/<image>.JPEG")
        folder = folder / below
    return _class_folders(folder, cfg)


def _class_folders(folder: Path, cfg: DataConfig) -> FolderSource:
    from kd_hf.data.folders import FolderSource

    folder = folder.resolve()
    # it is a split of its own: neighbouring folders need not have the same classes
    splits = {"eval_split": folder.name, "train_split": folder.name}
    return FolderSource(folder.parent, cfg.model_copy(update=splits), "eval")


@cache
def _listed(file: str) -> tuple[str, ...]:
    """The lines of a list that timm ships."""
    return tuple((files("timm.data") / "_info" / file).read_text(encoding="utf-8").split())


def real_answers(names: Sequence[str], where: str) -> Tensor:
    """Reassessed labels of validation images, int64 ``[rows, M]``, padded with -1.

    Args:
        names: file names, ``ILSVRC2012_val_00000001.JPEG`` and so on, by row; folders and endings do not matter.
        where: what the images are, for people.

    Raises:
        UserError: a name that is not one of the 50,000, so that nobody can say which labels belong to the image.
    """
    lists: list[list[int]] = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    found = [_VALIDATION_FILE.search(name) for name in names]
    numbers = [int(match[1]) if match else 0 for match in found]
    odd = next((row for row, number in enumerate(numbers) if not 1 <= number <= len(lists)), None)
    if not names or odd is not None:
        shown = f"row {odd} is '{names[odd]}'" if odd is not None else "they have none"
        raise UserError(
            f"data.path: imagenet-real goes by the file names ILSVRC2012_val_00000001.JPEG, … of the images, and of "
            f"{where} {shown}"
        )
    answers = torch.full((len(names), max(map(len, lists))), -1)
    for row, number in enumerate(numbers):
        answers[row, : len(lists[number - 1])] = torch.tensor(lists[number - 1], dtype=torch.int64)
    return answers


def file_names(source: Source, cfg: DataConfig) -> list[str]:
    """The images' file names by row; empty when the files they came from do not tell."""
    from kd_hf.data.folders import FolderSource
    from kd_hf.data.tables import StreamedSource, TableSource

    if isinstance(source, FolderSource):
        return [Path(file).name for file in source._files]
    if isinstance(source, (TableSource, StreamedSource)):
        return _parquet_names(source.columns.image, cfg)
    return []


def _parquet_names(column: str, cfg: DataConfig) -> list[str]:
    """What `datasets` stored as the path of each image, read without the images."""
    import datasets

    from kd_hf.data.parquet import THREADS, ParquetFiles
    from kd_hf.data.reading import library_errors
    from kd_hf.data.source import choose_split

    folder = Path(cfg.path).expanduser()
    with library_errors(cfg):
        builder = datasets.load_dataset_builder(str(folder) if folder.is_dir() else cfg.path, revision=cfg.revision)
    listed = builder.config.data_files or {}
    parquet = ParquetFiles(listed[choose_split(cfg, "eval", list(listed))])
    field = parquet.footers[0].schema.to_arrow_schema().field(column).type
    if "path" not in {field.field(index).name for index in range(field.num_fields)}:
        return []
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda group: parquet.read(group, [f"{column}.path"])[column], range(len(parquet.groups)))
        return [Path(cell["path"] or "").name for cell in chain.from_iterable(part.to_pylist() for part in parts)]


def match_classes(info: ModelInfo, names: Sequence[str], data: EvalSet, indices: bool = False) -> ClassMap:
    """Find out which class of a network each class of the data is.

    By name where the network knows the names; else as many classes are taken for the same in the same order.

    Args:
        info: of the network.
        names: its classes, empty when unknown.
        data: the images.
        indices: take labels that are only numbers for indices into the network's classes.

    Raises:
        UserError: they do not fit.
    """
    if data.synsets:
        return _among_synsets(info, names, data)
    known, wanted = _lower(names), _lower(data.source.class_names)
    index = {name: position for position, name in enumerate(known)}
    if len(index) == len(known) and set(wanted) <= index.keys():
        order = torch.tensor([index[name] for name in wanted])
        if known == wanted:
            return ClassMap()
        return ClassMap(choices=order) if len(known) == len(wanted) else ClassMap(label=order)
    if info.num_classes == len(wanted):
        return ClassMap()
    if all(_SYNSET.fullmatch(name) for name in wanted) and _is_imagenet(info, names):
        return ClassMap(label=_positions(data.source.class_names, _listed(IMAGENET), data.name))
    numbers = all(name.isdecimal() for name in wanted) and len(wanted) <= info.num_classes
    if numbers and indices:
        return ClassMap(label=torch.tensor([int(name) for name in wanted]))
    hint = "; if these are indices into the network's classes, add --label-indices" if numbers else ""
    raise UserError(f"{info.name} has {info.num_classes} classes, {data.source.describe()} has {len(wanted)}{hint}")


def _among_synsets(info: ModelInfo, names: Sequence[str], data: EvalSet) -> ClassMap:
    label = _positions(data.source.class_names, data.synsets, data.name)
    known = {name: position for position, name in enumerate(_lower(names))}
    if not known.keys() >= set(data.synsets):
        if not _is_imagenet(info, names):
            raise UserError(
                f"{data.name} needs a network that knows ImageNet's classes; {info.name} has {info.num_classes} others"
            )
        known = {name: position for position, name in enumerate(_listed(IMAGENET))}
    choices = [known[synset] for synset in data.synsets]
    same = choices == list(range(info.num_classes))
    return ClassMap(label, None if same else torch.tensor(choices))


def _is_imagenet(info: ModelInfo, names: Sequence[str]) -> bool:
    """Whether a network has ImageNet's 1000 classes in the usual order, as far as can be told."""
    return info.num_classes == len(_listed(IMAGENET)) and (not names or _in_imagenet_order(names))


def _in_imagenet_order(names: Sequence[str]) -> bool:
    """Whether class names are ImageNet's, as synset ids or in words (the wording of a few differs between sources)."""
    from timm.data import ImageNetInfo

    synsets = _listed(IMAGENET)
    if len(names) != len(synsets):
        return False
    described = [{name, *_words(text)} for name, text in zip(synsets, ImageNetInfo().label_descriptions(), strict=True)]
    return sum(bool(_words(name) & right) for name, right in zip(names, described, strict=True)) >= 0.9 * len(names)


def _words(text: str) -> set[str]:
    return {word.strip().lower().replace("_", " ") for word in text.split(",")}


def _positions(names: Sequence[str], synsets: tuple[str, ...], where: str) -> Tensor:
    """Index among `synsets` of each class of the data, given as synset id, as number, or in words for all of them."""
    index = {synset: position for position, synset in enumerate(synsets)}
    if all(_SYNSET.fullmatch(name) for name in names):
        odd = next((name for name in names if name not in index), None)
        if odd is not None:
            raise UserError(f"data.path: '{odd}' is not one of the {len(synsets)} classes of {where}")
        return torch.tensor([index[name] for name in names])
    if all(name.isdecimal() for name in names):
        largest = max(map(int, names))  # by value: folders named by numbers come in the order of strings
        if largest >= len(synsets):
            raise UserError(f"data.path: {where} has the classes 0 to {len(synsets) - 1}, and the data has {largest}")
        return torch.tensor([int(name) for name in names])
    if len(synsets) == len(_listed(IMAGENET)) and _in_imagenet_order(names):
        return torch.arange(len(names))
    shown = ", ".join(f"'{name}'" for name in names[:3])
    raise UserError(
        f"data.path: cannot tell which classes of {where} {shown}, … are; expected synset ids, numbers from 0 on, or "
        "the 1000 names of ILSVRC/imagenet-1k in their order"
    )


def _lower(names: Sequence[str]) -> list[str]:
    return [name.lower() for name in names]
