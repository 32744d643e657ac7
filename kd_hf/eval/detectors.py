"""Detectors measured on their own: what ``python -m kd_hf.eval … --boxes`` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError
from transformers.image_processing_utils import get_size_dict

from kd_hf.detection.data.categories import outputs_of_classes
from kd_hf.detection.data.opening import open_boxes
from kd_hf.detection.data.source import BoxSource
from kd_hf.detection.metrics.average_precision import NAMES, Results, found_entries, need_pycocotools
from kd_hf.detection.metrics.evaluator import BoxSubject, box_runner, measure_boxes
from kd_hf.detection.networks.detector import TappedDetector
from kd_hf.detection.networks.load import load_detector
from kd_hf.errors import UserError
from kd_hf.eval.benchmarks import BENCHMARKS
from kd_hf.eval.networks import eval_accelerator
from kd_hf.files import write_text
from kd_hf.metrics.measure import Stopwatch
from kd_hf.models.handle import ModelHandle
from kd_hf.models.load import processor_values
from kd_hf.recipe.config import BoxAugment, BoxData, DataConfig

HEADS = ("AP", "AP50", "AP75", "AP S", "AP M", "AP L", "AR1", "AR10", "AR100", "AR S", "AR M", "AR L")
COLUMNS = (
    *zip(NAMES, HEADS, [".2f"] * len(NAMES), strict=True),
    ("images_per_second", "images/s", ".1f"),
)
"""Key of the values, head of the column, format."""
_EDGES = {"eval_size": "shortest_edge", "max_size": "longest_edge"}
_SQUARES = 32  # networks that are stretched to squares merge maps of 1/8, 1/16 and 1/32: sides have to divide


class Detectors:
    """The detectors that are measured, loaded once.

    Args:
        models: what to measure, by anything that :func:`kd_hf.detection.networks.load.load_detector` takes.
        accelerator: gives device and ranks.
        boxes: a recipe's `data.boxes`, of which the sizes count; what is not set there is each network's own.
        options: further arguments of :func:`kd_hf.detection.networks.load.load_detector`, the same for all.

    Raises:
        UserError: a model that is not there or is no detector, or pycocotools is missing.
    """

    def __init__(
        self, models: Sequence[str], accelerator: Accelerator, boxes: BoxData | None = None, **options: Any
    ) -> None:
        need_pycocotools()
        self.accelerator = accelerator
        self.handles = {name: load_detector(name, pretrained=True, **options) for name in dict.fromkeys(models)}
        self.sizes = {name: own_sizes(handle, (boxes or BoxData()).augment) for name, handle in self.handles.items()}
        self.runs = {name: _runner(handle, accelerator) for name, handle in self.handles.items()}

    def evaluate(
        self,
        source: BoxSource,
        *,
        batch_size: int = 8,
        workers: int = 0,
        max_samples: int | None = None,
        keep: dict[str, Results] | None = None,
        progress: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Measure all of them over the same images; a call of all ranks.

        Args:
            source: the images.
            batch_size: images per process.
            workers: loader processes.
            max_samples: stop after so many images, spread over the set.
            keep: filled with what each network found, by name, on the main process.
            progress: show a bar.

        Returns:
            the numbers of :func:`evaluate_detectors`.

        Raises:
            UserError: a network of other classes than the data's.
        """
        for name, handle in self.handles.items():
            _check_classes(name, handle, source)
        values: dict[str, dict[str, float]] = {}
        for sizes in dict.fromkeys(self.sizes.values()):
            alike = [name for name, own in self.sizes.items() if own == sizes]
            watches = {name: Stopwatch(self.runs[name], self.accelerator.device) for name in alike}
            subjects = {name: _subject(watch, self.handles[name]) for name, watch in watches.items()}
            values |= measure_boxes(
                subjects,
                source,
                self.accelerator,
                batch_size=batch_size,
                augment=sizes,
                workers=workers,
                max_samples=max_samples,
                keep=keep,
                progress=progress and self.accelerator.is_main_process,
            )
            rates = {name: watch.rate() for name, watch in watches.items()}
            values |= {name: values[name] | {"images_per_second": rate} for name, rate in rates.items() if rate}
        return {name: values[name] for name in self.handles}

    def notes(self) -> list[str]:
        """What the images were resized to, for people."""
        told: dict[str, list[str]] = {}
        for name, sizes in self.sizes.items():
            told.setdefault(_told(sizes), []).append(name)
        only = len(told) == 1
        lines = [f"images of {'all models' if only else ', '.join(names)}: {text}" for text, names in told.items()]
        stretched = [name for name, handle in self.handles.items() if "height" in _saved_size(handle)]
        if stretched:
            lines.append(f"{', '.join(stretched)}: made for images stretched to squares; here they keep their shape")
        return lines


def evaluate_detectors(
    models: Sequence[str],
    data: Mapping[str, Any],
    *,
    batch_size: int = 8,
    workers: int = 0,
    max_samples: int | None = None,
    use_cpu: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Measure detectors on one data set.

    Args:
        models: folders, run folders or Hub ids.
        data: keys of a recipe's `data` block. Of `boxes.augment` the sizes count: `eval_size`, `max_size` and
            `multiple_of`; without them an image is resized as each network's own image processor says.
        batch_size: images per process.
        workers: loader processes.
        max_samples: stop after so many images, spread over the set.
        use_cpu: stay on the CPU.
        progress: show a bar.

    Returns:
        by model, COCO's 12 numbers in percent (:data:`kd_hf.detection.metrics.average_precision.NAMES`, without those
        that there are no objects for), ``samples``, and ``images_per_second`` of the network alone on one device.

    Raises:
        UserError: a model or data set that is not there, whose classes do not fit, or pycocotools is missing.
    """
    need_pycocotools()
    cfg = box_config(data)
    source = open_boxes(cfg, "eval", cfg.boxes)
    detectors = Detectors(models, eval_accelerator(use_cpu), cfg.boxes)
    return detectors.evaluate(
        source, batch_size=batch_size, workers=workers, max_samples=max_samples, progress=progress
    )


def box_config(data: Mapping[str, Any]) -> DataConfig:
    """Keys of a recipe's `data` block, checked; `boxes` need not be among them."""
    try:
        cfg = DataConfig.model_validate({"boxes": {}, **data})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"data.{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    if cfg.path.startswith("builtin:") or cfg.path.partition("=")[0] in BENCHMARKS:
        raise UserError(f"data.path: '{cfg.path}' has no boxes; its images have one label each")
    return cfg


def _runner(handle: ModelHandle, accelerator: Accelerator) -> Any:
    info: Any = handle.info
    return box_runner(TappedDetector(handle, info).to(accelerator.device), accelerator)


def _subject(run: Any, handle: ModelHandle) -> BoxSubject:
    return BoxSubject(run, handle.info.preprocessing)


def own_sizes(handle: ModelHandle, given: BoxAugment) -> BoxAugment:
    """Sizes of evaluation images: those that are given, else what the network's saved image processor does."""
    size, asked = _saved_size(handle), given.model_fields_set
    own: dict[str, int] = {}
    if not asked & {"eval_size", "max_size"}:
        own = {key: size[edge] for key, edge in _EDGES.items() if size.get(edge)}
    if "height" in size:
        own |= {} if "eval_size" in asked else {"eval_size": min(size["height"], size["width"])}
        own |= {} if "multiple_of" in asked else {"multiple_of": _SQUARES}
    return given.model_copy(update=own)


def _saved_size(handle: ModelHandle) -> Mapping[str, int]:
    """``shortest_edge`` and ``longest_edge``, or ``height`` and ``width``, of the processor in the model's folder."""
    network: Any = handle.network
    saved = processor_values(Path(network.name_or_path))
    if "size" not in saved:
        return {}
    return dict(get_size_dict(saved["size"], max_size=saved.get("max_size"), default_to_square=False))


def _told(sizes: BoxAugment) -> str:
    return (
        f"shortest side {sizes.eval_size} pixels, longest at most {sizes.max_size}, both rounded down to multiples of "
        f"{sizes.multiple_of}"
    )


def _check_classes(name: str, handle: ModelHandle, source: BoxSource) -> None:
    """Refuse a network whose outputs are not the data's classes, by their number and by the names that both know."""
    try:
        outputs = outputs_of_classes(source.class_names, handle.info.num_classes)
    except UserError as error:
        raise UserError(f"{name} does not fit {source.describe()}: {error}") from None
    known = {label.lower(): number for number, label in enumerate(handle.label_names)}
    for number in source.category_ids:
        label = source.class_names[number]
        if known.get(label.lower(), outputs[number]) != outputs[number]:
            raise UserError(
                f"{name} has the data's classes in another order: '{label}' is number {number} in the data, which "
                f"is '{handle.label_names[outputs[number]]}' for the network"
            )


def is_detector(model: str) -> bool:
    """Whether a name stands for a detector; reads no weights."""
    try:
        load_detector(model, device="meta")
    except UserError:
        return False
    return True


def write_detections(path: Path, results: Results) -> None:
    """Write what was found as COCO's list of results, which pycocotools' ``COCO.loadRes`` reads.

    Images have the numbers that the data gives them in ``image_id``, else those of their rows; boxes are left, top,
    width and height in pixels of the stored image; classes are numbered as in the data.
    """
    numbers = {row: objects.image_id for row, objects in zip(results.rows.tolist(), results.truth, strict=True)}
    found = [
        {"image_id": numbers[entry["image_id"]], **{key: entry[key] for key in ("category_id", "bbox", "score")}}
        for entry in found_entries(results)
    ]
    write_text(path, json.dumps(found) + "\n")
