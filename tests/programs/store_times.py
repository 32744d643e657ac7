"""What a stored teacher saves: ``python -m tests.programs.store_times FOLDER [ROW …]``.

FOLDER holds photographs, as for :mod:`tests.programs.data_times`. Each row writes a store of the teacher's outputs, K =
100 of 1000 classes, and then trains with and without it in turn: whole steps of the trainer, reading, decoding and
augmenting in the same process and thread. Times are processor time, so that the turns of other programs do not count;
the ratio is the median over rounds, in brackets its quartiles; `bytes` are those of an image and epoch on disk.
Networks have random weights.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

import pyarrow
import pyarrow.parquet

from kd_hf.cache.write import write_store
from kd_hf.recipe.read import load_recipe
from kd_hf.train.trainer import DistillTrainer
from tests.programs.data_times import Row, compare, encoded, judged
from tests.runs import ROOT

CLASSES, BATCH, STEPS = 1000, 8, 4  # of a turn
DEIT = ("student.model=deit_tiny_patch16_224", "teacher.model=timm/deit_base_patch16_224.fb_in1k")


@dataclass(frozen=True)
class Case:
    """A recipe trained from a store, and the same student otherwise: plain, or with its teacher live."""

    recipe: str
    overrides: Sequence[str]
    other: str
    bound: float
    networks: str


ROWS = {
    "over_plain_cnn": Case("nkd_resnet34_resnet18", ("teacher.mode=eval",), "plain", 1.05, "ResNet-18"),
    "over_plain_vit": Case("nkd_deit3_small_deit_tiny", DEIT, "plain", 1.05, "DeiT-T"),
    "live": Case("nkd_deit3_small_deit_tiny", DEIT, "live", 4.0, "DeiT-B → DeiT-T"),
}


def write_images(images: list[bytes], folder: Path) -> None:
    """A Parquet file of training images, labels in turn."""
    import datasets

    names = [str(label) for label in range(CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    cells = [{"bytes": data, "path": None} for data in images]
    columns = {"image": cells, "label": [number % CLASSES for number in range(len(images))]}
    folder.mkdir()
    for split in ("train", "validation"):
        table = pyarrow.table(columns, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"{split}-0.parquet", row_group_size=100)


def trainer_of(case: Case, data: Path, folder: Path, steps: int, extra: Sequence[str]) -> DistillTrainer:
    """A trainer of the row's recipe for so many steps on these images, in this process alone."""
    fixed = [f"data.path={data}", "data.augment.mix_group=null", "baseline=null", f"train.output_dir={folder}"]
    fixed += [f"train.per_device_train_batch_size={BATCH}", f"train.max_steps={steps}", "train.warmup_steps=0 steps"]
    fixed += ["train.dataloader_num_workers=0", "train.cpu_threads=1", "train.use_cpu=true"]
    return DistillTrainer(load_recipe(ROOT / "recipes" / f"{case.recipe}.yaml", [*fixed, *case.overrides, *extra]))


def turn_of(trainer: DistillTrainer) -> Callable[[], None]:
    """A function that takes some steps of the run, from the reading of images on."""
    feed = trainer.feed()

    def turn() -> None:
        for _ in range(STEPS):
            trainer.step(feed)
            trainer.state.global_step += 1

    return turn


def measure(name: str, data: Path, folder: Path, rounds: int) -> str:
    """The line of a row."""
    case, steps, store = ROWS[name], STEPS * (rounds + 1), folder / "store"
    untrained, plain = ("teacher.pretrained=false", "teacher.gate.enabled=false"), ("teacher=null", "methods.nkd=false")
    live = trainer_of(case, data, folder / "live", steps, untrained)
    with redirect_stdout(io.StringIO()):
        write_store(live.recipe, store, epochs=1)
    size = sum(file.stat().st_size for file in store.rglob("*.parquet")) / (steps * BATCH)
    stored = trainer_of(case, data, folder / "stored", steps, (*untrained, f"teacher.store={store}"))
    other = live if case.other == "live" else trainer_of(case, data, folder / "plain", steps, plain)
    sides = Row(turn_of(stored), turn_of(other), case.bound, speed=case.other == "live")
    found = compare(sides, rounds)
    seconds = f"{found.ours / STEPS:9.3f} {found.theirs / STEPS:8.3f}"
    return f"{name:15} {case.networks:16} {seconds} {judged(sides, found):43} {size:5.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.store_times", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of Parquet or JPEG files")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all by default")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for name in set(args.rows) - set(ROWS):
        parser.error(f"unknown row '{name}'; known: {', '.join(ROWS)}")
    needed = BATCH * STEPS * (args.rounds + 1)
    images = list(itertools.islice(encoded(args.folder), needed))
    if len(images) < needed:
        parser.error(f"{args.folder} has {len(images)} images; {needed} are needed for {args.rounds} rounds")
    columns = f"{'stored, s':>9} {'other, s':>8} {'ratio':>7}  {'quartiles':16} {'bound':16} bytes"
    print(f"{'row':15} {'student':16} {columns}", flush=True)
    for name in args.rows or ROWS:
        with tempfile.TemporaryDirectory() as root:
            write_images(images, Path(root) / "data")
            print(measure(name, Path(root) / "data", Path(root), args.rounds), flush=True)


if __name__ == "__main__":
    main()
