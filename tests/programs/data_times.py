"""What the image pipeline costs, against timm's and against itself.

``python -m tests.programs.data_times FOLDER [ROW …]``.

FOLDER holds Parquet files with images, or JPEG files at any depth; real photographs, for ratios that mean something.
Both sides of a row take turns in one process, one thread each; the ratio is the median over rounds, in brackets its
quartiles. Times are processor time of this process and of its workers, so that the turns of other programs do not
count; only the row `resume` counts seconds. Images are read from the page cache.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.loader import fast_collate
from torch import Tensor

from kd_hf.data.loader import train_loader
from kd_hf.data.opening import open_source
from kd_hf.data.pixels import decode
from kd_hf.data.rows import RowSource
from kd_hf.data.views import DeviceStage, TrainTransform, augment_policy, plan_views
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, CropConfig, DataConfig

SPEC = Preprocessing()
POLICY = "rand-m9-mstd0.5-inc1"
DEIT = AugmentConfig(auto_augment=POLICY, erasing=0.25)
PLAIN = AugmentConfig()
BATCH, GROUP, CLASSES = 50, 100, 10
SMALL, SMALL_BATCH, SMALL_COUNT = 32, 64, 3000  # pixels, and images of a batch and of an epoch
EPOCHS = 2  # of a loader, so that the start of its workers weighs less
VIEWS = {"student": SPEC}
TWO_VIEWS = {"student": SPEC, "teacher": Preprocessing(image_size=256)}
CPU = torch.device("cpu")


# --- clocks -------------------------------------------------------------------------------------------------------


def processor_seconds(side: Callable[[], object]) -> float:
    """Processor time of a call in this process and in those that end with it."""

    def now() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = now()
    side()
    return now() - start


def wall_seconds(side: Callable[[], object]) -> float:
    """Time of a call."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def exhaust(batches: Iterable[object]) -> None:
    """Take everything and keep nothing."""
    for _ in batches:
        pass


@dataclass(frozen=True)
class Row:
    """Two sides that do equal work; the ratio is seconds of `theirs` ÷ `ours`, or its inverse for times."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    bound: float | None = None
    speed: bool = True
    """Whether the ratio is one of speeds (bound: at least), not of times (at most)."""
    seconds: Callable[[Callable[[], object]], float] = processor_seconds


# --- images -------------------------------------------------------------------------------------------------------


def encoded(folder: Path) -> Iterator[bytes]:
    """The images of a folder, encoded."""
    for file in sorted(folder.rglob("*.parquet")):
        parquet = pyarrow.parquet.ParquetFile(file)
        for batch in parquet.iter_batches(64, columns=["image"]):
            yield from (cell["bytes"] for cell in batch.column(0).to_pylist())
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (".jpg", ".jpeg"):
            yield file.read_bytes()


def store(images: list[bytes], root: Path) -> tuple[DataConfig, DataConfig]:
    """The same images as class folders and as Parquet in row groups; recipes for both."""
    import datasets

    files, table = root / "files", root / "table"
    table.mkdir()
    for number, data in enumerate(images):
        path = files / "train" / str(number % CLASSES) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(CLASSES)])}
    )
    labels = [number % CLASSES for number in range(len(images))]
    cells = [{"bytes": data, "path": None} for data in images]
    whole = pyarrow.table({"image": cells, "label": labels}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(whole, table / "train-0.parquet", row_group_size=GROUP)
    return DataConfig(path=str(files)), DataConfig(path=str(table), streaming=True)


# --- the transforms -----------------------------------------------------------------------------------------------


def timm_transform(policy: str | None, prefetcher: bool) -> Callable[[Image.Image], Tensor]:
    """timm's own training transform, with a posterize that survives 0 bits."""
    options: dict[str, Any] = {"auto_augment": policy, "color_jitter": None, "interpolation": SPEC.interpolation}
    transform = create_transform(SPEC.image_size, is_training=True, use_prefetcher=prefetcher, **options)
    if policy:
        place = [type(step).__name__ for step in transform.transforms].index("RandAugment")
        transform.transforms[place] = augment_policy(policy, SPEC)
    return transform


def as_timm_reads(data: bytes) -> Image.Image:
    """An image as timm's data sets open it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def chunks(images: list[bytes]) -> Iterator[list[bytes]]:
    """Batches."""
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def transform_rows(images: list[bytes]) -> dict[str, Row]:
    """Batches of transformed images: uint8 with RandAugment as timm's prefetcher takes them; float32 without."""
    deit, plain = (TrainTransform(plan_views(VIEWS, training=True), augment) for augment in (DEIT, PLAIN))
    timm_deit, timm_plain = timm_transform(POLICY, prefetcher=True), timm_transform(None, prefetcher=False)
    mean, std = (255 * torch.tensor(value).view(1, 3, 1, 1) for value in (SPEC.mean, SPEC.std))

    keys = itertools.count()  # never the same operations again, as on timm's side

    def uint8() -> None:
        for batch in chunks(images):
            torch.stack([deit(data, next(keys))["student"] for data in batch])

    def timm_uint8() -> None:
        for batch in chunks(images):
            fast_collate([(timm_deit(as_timm_reads(data)), 0) for data in batch])

    def float32() -> None:
        for batch in chunks(images):
            views = torch.stack([plain(data, next(keys))["student"] for data in batch])
            views.to(torch.float32).sub_(mean).div_(std)

    def timm_float32() -> None:
        for batch in chunks(images):
            torch.stack([timm_plain(as_timm_reads(data)) for data in batch])

    return {
        "randaugment": Row(uint8, timm_uint8, 1.15),
        "crop": Row(float32, timm_float32, 1.8),
    }


def view_rows(images: list[bytes]) -> dict[str, Row]:
    """Two views of 224 and 256 pixels from one decode, against a pass for each."""
    rows = {}
    for name, augment, bound in (("two_views", PLAIN, 0.7), ("two_views_randaugment", DEIT, None)):
        both = TrainTransform(plan_views(TWO_VIEWS, training=True), augment)
        alone = [TrainTransform(plan_views({one: spec}, training=True), augment) for one, spec in TWO_VIEWS.items()]

        def passes(transforms: list[TrainTransform]) -> None:
            for transform, (key, data) in itertools.product(transforms, enumerate(images)):
                transform(data, key)

        rows[name] = Row(partial(passes, [both]), partial(passes, alone), bound, speed=False)
    return rows


# --- the loaders --------------------------------------------------------------------------------------------------


def loader_rows(cfg: DataConfig, count: int, workers: int) -> dict[str, Row]:
    """Epochs of worker processes that read files, against timm's loader: uint8 batches, as a device is given them,
    then float32 batches, normalised and erased on the CPU."""
    stage = DeviceStage(VIEWS, CLASSES)

    def ours(augment: AugmentConfig, on_cpu: bool) -> None:
        recipe = cfg.model_copy(update={"augment": augment})
        steps = EPOCHS * (count // BATCH)
        source = open_source(recipe, "train")
        loader = train_loader(source, recipe, VIEWS, per_device=BATCH, total_steps=steps, workers=workers)
        exhaust((stage(batch) for batch in loader) if on_cpu else loader)

    def theirs(augment: AugmentConfig, on_cpu: bool) -> None:
        loader = create_loader(
            ImageDataset(str(Path(cfg.path) / "train")),
            (3, SPEC.image_size, SPEC.image_size),
            BATCH,
            is_training=True,
            re_prob=augment.erasing,
            re_mode="pixel",
            num_workers=workers,
            device=CPU,
        )
        loader.dataset.transform = timm_transform(augment.auto_augment, prefetcher=True)
        for _ in range(EPOCHS):
            exhaust(loader if on_cpu else loader.loader)

    cases = {
        "loader_randaugment": (DEIT, False, 1.3),
        "loader_crop": (PLAIN, False, 1.3),
        "on_cpu_randaugment": (DEIT, True, None),
        "on_cpu_crop": (PLAIN, True, None),
    }
    return {
        name: Row(partial(ours, augment, on_cpu), partial(theirs, augment, on_cpu), bound)
        for name, (augment, on_cpu, bound) in cases.items()
    }


def stream_rows(files: DataConfig, table: DataConfig, count: int, workers: int) -> dict[str, Row]:
    """An epoch of decoded batches from streamed Parquet, against files; a first batch in mid-epoch, against the
    very first."""
    opened = {cfg.path: pickle.dumps(open_source(cfg, "train")) for cfg in (files, table)}

    def batches(cfg: DataConfig, start: int = 0, workers: int = 0) -> Iterator[object]:
        source = pickle.loads(opened[cfg.path])  # with nothing in memory yet
        options: dict[str, Any] = {"start_step": start, "total_steps": count // BATCH, "workers": workers}
        return iter(train_loader(source, cfg, VIEWS, per_device=BATCH, **options))

    def first(start: int) -> object:
        return next(batches(table, start, workers))

    return {
        "parquet": Row(lambda: exhaust(batches(table)), lambda: exhaust(batches(files)), 0.95),
        "resume": Row(partial(first, count // BATCH // 2), partial(first, 0), 1.2, speed=False, seconds=wall_seconds),
    }


def held_rows(images: list[bytes]) -> dict[str, Row]:
    """An epoch of float32 batches of the images at 32 pixels, padded, cropped and flipped: held, against decoded from
    PNG as CIFAR's are; and the epoch in which they are decoded to be held, against the same."""
    encoded_small = []
    for data in images:
        with io.BytesIO() as file:
            as_timm_reads(data).resize((SMALL, SMALL)).save(file, "PNG")
            encoded_small.append({"image": file.getvalue()})
    count = SMALL_COUNT // len(images) * len(images)
    rows = encoded_small * (count // len(images))
    cfg = DataConfig(path="in memory", augment=AugmentConfig(crop=CropConfig(kind="pad")))
    views = {"student": Preprocessing(image_size=SMALL)}
    stage = DeviceStage(views, CLASSES)

    def opened(hold: bool) -> RowSource:
        source = RowSource(rows, "image", np.arange(count) % CLASSES, None, "memory")
        source.hold = hold
        return source

    def epoch(source: RowSource) -> None:
        loader = train_loader(source, cfg, views, per_device=SMALL_BATCH, total_steps=count // SMALL_BATCH)
        exhaust(stage(batch) for batch in loader)

    held, decoded = opened(True), opened(False)
    return {
        "held": Row(lambda: epoch(held), lambda: epoch(decoded), 8.0),
        "held_first_epoch": Row(lambda: epoch(opened(True)), lambda: epoch(decoded)),
    }


# --- the table ----------------------------------------------------------------------------------------------------


def crop_psnr(images: list[bytes]) -> float:
    """The smallest PSNR in dB, over the images' random crops, of both decoders."""
    plan = plan_views(VIEWS, training=True)
    fast, slow = (TrainTransform(plan, PLAIN, decoder) for decoder in ("torchvision", "pil"))
    errors = [
        (fast(data, key)["student"].double() - slow(data, key)["student"]).square().mean().item()
        for key, data in enumerate(images)
    ]
    return 10 * float(np.log10(255**2 / max(errors)))


@dataclass(frozen=True)
class Found:
    """Medians of both sides in seconds, and quartiles of their ratio."""

    ours: float
    theirs: float
    quartiles: tuple[float, float, float]


def compare(row: Row, rounds: int) -> Found:
    """Let both sides take turns, in reversed order every other time, once untimed."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        order = -1 if turn % 2 else 1
        taken = [row.seconds(side) for side in (row.ours, row.theirs)[::order]][::order]
        times += [(taken[0], taken[1])] if turn else []  # the first one warms up
    ratios = sorted(theirs / ours if row.speed else ours / theirs for ours, theirs in times)
    low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    return Found(ours, theirs, (low, middle, high))


def judged(row: Row, found: Found) -> str:
    """The ratio, its quartiles, and whether the bound is kept."""
    low, middle, high = found.quartiles
    verdict = ""
    if row.bound is not None:
        reached = middle >= row.bound if row.speed else middle <= row.bound
        verdict = f"{'≥' if row.speed else '≤'} {row.bound:.2f}  {'reached' if reached else 'MISSED'}"
    return f"{middle:7.3f}  {f'[{low:.3f}–{high:.3f}]':16} {verdict}"


def measure(name: str, row: Row, rounds: int) -> str:
    """The line of a row."""
    found = compare(row, rounds)
    return f"{name:22} {1e3 * found.ours:9.1f} {1e3 * found.theirs:9.1f} {judged(row, found)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.data_times", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of Parquet or JPEG files")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all by default")
    parser.add_argument("--images", type=int, default=1000, help="at most so many; 100 at least")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = list(itertools.islice(encoded(args.folder), args.images))
    if len(images) < 2 * BATCH:
        parser.error(f"{args.folder} has {len(images)} images; {2 * BATCH} or more are needed")
    few = images[:: max(1, len(images) // 200)]
    pixels = statistics.mean(width * height for width, height in (decode(data).size for data in few))
    print(f"{len(images)} images of {sum(map(len, images)) / len(images) / 1e3:.0f} kB, {pixels / 1e6:.2f} MP")
    print(f"crops against PIL: PSNR {crop_psnr(images):.1f} dB or more")
    print(f"{'row':22} {'ours, ms':>9} {'other, ms':>9} {'ratio':>7}  {'quartiles':16} bound")
    with tempfile.TemporaryDirectory() as root:
        files, table = store(images, Path(root))
        rows: Mapping[str, Row] = {
            **transform_rows(few),
            **view_rows(few),
            **loader_rows(files, len(images), args.workers),
            **stream_rows(files, table, len(images), args.workers),
            **held_rows(few),
        }
        for name in set(args.rows) - set(rows):
            parser.error(f"unknown row '{name}'; known: {', '.join(rows)}")
        for name in args.rows or rows:
            print(measure(name, rows[name], args.rounds), flush=True)


if __name__ == "__main__":
    main()
