"""What the image pipeline costs, against timm's and against itself: ``python -m tests.data_times FOLDER [ROW …]``.

FOLDER holds Parquet files with images, or JPEG files at any depth; real photographs, for ratios that mean something.
Both sides of a row take turns in one process, one thread each; the ratio is the median over rounds, in brackets its
quartiles. One-process rows count the processor time of this process, so that the turns of other programs do not
count; rows with workers count seconds. Images are read from the page cache.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.loader import fast_collate
from torch import Tensor

from kd_hf.config import AugmentConfig, DataConfig
from kd_hf.data.loader import train_loader
from kd_hf.data.pixels import decode
from kd_hf.data.source import open_source
from kd_hf.data.views import DeviceStage, TrainTransform, augment_policy, draw_geometry, plan_views
from kd_hf.models.info import Preprocessing

SPEC = Preprocessing()
POLICY = "rand-m9-mstd0.5-inc1"
DEIT = AugmentConfig(auto_augment=POLICY, erasing=0.25)
PLAIN = AugmentConfig()
BATCH, GROUP, CLASSES = 50, 100, 10
VIEWS = {"student": SPEC}
TWO_VIEWS = {"student": SPEC, "teacher": Preprocessing(image_size=256)}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Two sides that do equal work; the ratio is seconds of `theirs` ÷ `ours`, or its inverse for times."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    bound: float
    seconds: Callable[[Callable[[], object]], float]
    speed: bool = True
    """Whether the ratio is one of speeds (bound: at least), not of times (at most)."""


# --- clocks -------------------------------------------------------------------------------------------------------


def processor_seconds(side: Callable[[], object]) -> float:
    """Processor time of a call in this process."""
    start = time.process_time()
    side()
    return time.process_time() - start


def wall_seconds(side: Callable[[], object]) -> float:
    """Time of a call."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def seconds_after_first(side: Callable[[], object]) -> float:
    """Time from the first batch of an iterator to its end, without the start of its workers."""
    batches = side()
    assert isinstance(batches, Iterator)
    next(batches)
    return wall_seconds(lambda: [None for _ in batches])


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
    transform = create_transform(
        SPEC.image_size,
        is_training=True,
        auto_augment=policy,
        color_jitter=None,
        interpolation=SPEC.interpolation,
        use_prefetcher=prefetcher,
    )
    if policy:
        place = [type(step).__name__ for step in transform.transforms].index("RandAugment")
        transform.transforms[place] = augment_policy(policy, SPEC)
    return transform


def as_timm_reads(data: bytes) -> Image.Image:
    """An image as timm's data sets open it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def chunks(images: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """Batches, each with the number of its first image."""
    return ((start, images[start : start + BATCH]) for start in range(0, len(images), BATCH))


def transform_rows(images: list[bytes]) -> dict[str, Row]:
    """Batches of transformed images: uint8 with RandAugment as timm's prefetcher takes them; float32 without."""
    deit, plain = (TrainTransform(plan_views(VIEWS, training=True), augment) for augment in (DEIT, PLAIN))
    timm_deit, timm_plain = timm_transform(POLICY, prefetcher=True), timm_transform(None, prefetcher=False)
    mean, std = (255 * torch.tensor(value).view(1, 3, 1, 1) for value in (SPEC.mean, SPEC.std))

    def uint8() -> None:
        for start, batch in chunks(images):
            torch.stack([deit(data, start + i)["student"] for i, data in enumerate(batch)])

    def timm_uint8() -> None:
        for _, batch in chunks(images):
            fast_collate([(timm_deit(as_timm_reads(data)), 0) for data in batch])

    def float32() -> None:
        for start, batch in chunks(images):
            views = torch.stack([plain(data, start + i)["student"] for i, data in enumerate(batch)])
            views.to(torch.float32).sub_(mean).div_(std)

    def timm_float32() -> None:
        for _, batch in chunks(images):
            torch.stack([timm_plain(as_timm_reads(data)) for data in batch])

    return {
        "randaugment": Row(uint8, timm_uint8, 1.15, processor_seconds),
        "crop": Row(float32, timm_float32, 1.8, processor_seconds),
    }


def view_rows(images: list[bytes]) -> dict[str, Row]:
    """Two views of 224 and 256 pixels from one decode, against a pass for each."""
    rows = {}
    for name, augment, bound in (("two_views", PLAIN, 0.7), ("two_views_randaugment", DEIT, 1.0)):
        both = TrainTransform(plan_views(TWO_VIEWS, training=True), augment)
        alone = [TrainTransform(plan_views({one: spec}, training=True), augment) for one, spec in TWO_VIEWS.items()]

        def one_pass(both: TrainTransform = both) -> None:
            for key, data in enumerate(images):
                both(data, key)

        def two_passes(alone: list[TrainTransform] = alone) -> None:
            for transform, (key, data) in itertools.product(alone, enumerate(images)):
                transform(data, key)

        rows[name] = Row(one_pass, two_passes, bound, processor_seconds, speed=False)
    return rows


# --- the loaders --------------------------------------------------------------------------------------------------


def loader_rows(cfg: DataConfig, count: int, workers: int) -> dict[str, Row]:
    """Normalised and erased float32 batches from worker processes, from files, to timm's loader with its prefetcher."""

    def ours(augment: AugmentConfig) -> Iterator[object]:
        recipe = cfg.model_copy(update={"augment": augment})
        source, stage = open_source(recipe, "train"), DeviceStage(VIEWS, CLASSES)
        loader = train_loader(
            source, recipe, VIEWS, per_device=BATCH, total_steps=count // BATCH, workers=workers, prefetch_factor=2
        )
        return (stage(batch) for batch in loader)

    def theirs(augment: AugmentConfig) -> Iterator[object]:
        loader = create_loader(
            ImageDataset(str(Path(cfg.path) / "train")),
            (3, SPEC.image_size, SPEC.image_size),
            BATCH,
            is_training=True,
            re_prob=augment.erasing,
            re_mode="pixel",
            auto_augment=augment.auto_augment,
            color_jitter=None,
            interpolation=SPEC.interpolation,
            num_workers=workers,
            persistent_workers=False,
            pin_memory=False,
            device=CPU,
        )
        loader.dataset.transform = timm_transform(augment.auto_augment, prefetcher=True)
        return iter(loader)

    return {
        name: Row(lambda a=augment: ours(a), lambda a=augment: theirs(a), bound, seconds_after_first)
        for name, augment, bound in (("loader_randaugment", DEIT, 1.3), ("loader_crop", PLAIN, 1.3))
    }


def stream_rows(files: DataConfig, table: DataConfig, count: int, workers: int) -> dict[str, Row]:
    """An epoch of decoded batches from streamed Parquet, against files; a first batch in mid-epoch, against the start."""

    def epoch(cfg: DataConfig) -> None:
        source = open_source(cfg, "train")
        for _ in train_loader(source, cfg, VIEWS, per_device=BATCH, total_steps=count // BATCH):
            pass

    source = open_source(table, "train")

    def first(step: int) -> None:
        loader = train_loader(
            source, table, VIEWS, per_device=BATCH, start_step=step, total_steps=count // BATCH, workers=workers
        )
        next(iter(loader))

    return {
        "parquet": Row(lambda: epoch(table), lambda: epoch(files), 0.95, processor_seconds),
        "resume": Row(lambda: first(count // BATCH // 2), lambda: first(0), 1.2, wall_seconds, speed=False),
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


def measure(name: str, row: Row, rounds: int) -> str:
    """The line of a row."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        order = -1 if turn % 2 else 1
        taken = [row.seconds(side) for side in (row.ours, row.theirs)[::order]][::order]
        times += [(taken[0], taken[1])] if turn else []  # the first one warms up
    ratios = sorted(theirs / ours if row.speed else ours / theirs for ours, theirs in times)
    low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    ours, theirs = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
    reached = middle >= row.bound if row.speed else middle <= row.bound
    bound = f"{'≥' if row.speed else '≤'} {row.bound:.2f}"
    spread = f"[{low:.3f}–{high:.3f}]"
    return f"{name:22} {ours:9.1f} {theirs:9.1f} {middle:7.3f}  {spread:16} {bound:>7}  {'reached' if reached else 'MISSED'}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.data_times", description=__doc__)
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
    print(f"{'row':22} {'ours, ms':>9} {'other, ms':>9} {'ratio':>7}  {'quartiles':16} {'bound':>7}")
    with tempfile.TemporaryDirectory() as root:
        files, table = store(images, Path(root))
        rows: Mapping[str, Row] = {
            **transform_rows(few),
            **view_rows(few),
            **loader_rows(files, len(images), args.workers),
            **stream_rows(files, table, len(images), args.workers),
        }
        for name in set(args.rows) - set(rows):
            parser.error(f"unknown row '{name}'; known: {', '.join(rows)}")
        for name in args.rows or rows:
            print(measure(name, rows[name], args.rounds), flush=True)


if __name__ == "__main__":
    main()
