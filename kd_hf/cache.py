"""Store what teachers say about every training image: ``python -m kd_hf.cache RECIPE [key=value …] -o FOLDER``.

``teacher.store: FOLDER`` then trains from it without the teacher. Under ``accelerate launch -m`` the processes take
files in turn; what is written does not depend on their number. A command that was killed continues where it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, is_main_process, run_command

if TYPE_CHECKING:
    from kd_hf.config import Recipe
    from kd_hf.store import Manifest, Store
    from kd_hf.store.writer import Part, Speakers

SHARD_ROWS, TOP_K, VERIFIED = 100_000, 100, 64
_LARGE_TAPS = 2000  # bytes an image and epoch that nobody is asked about
_CARD = "README.md"


def write_store(
    recipe: Recipe,
    folder: Path,
    *,
    epochs: int | None = None,
    top_k: int = TOP_K,
    taps: bool = False,
    processes: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> Manifest:
    """Write a store, or what is missing of it; a call of all processes.

    Args:
        recipe: the run that will read it.
        folder: where it goes.
        epochs: how many; by default those of the run. A finished store grows.
        top_k: classes that are kept of an image; all of them where there are fewer.
        taps: write tapped tensors however large they are.
        processes: that will train; by default as many as write.
        shard_rows: rows of a file, about.

    Raises:
        UserError: outputs that cannot stand for the teacher, another store in `folder`, a full disk.
    """
    from kd_hf.store.writer import Speakers, parts_of

    speakers = Speakers(recipe, processes)
    manifest = speakers.manifest(epochs, top_k, shard_rows, speakers.measure(_say))
    _check_taps(manifest, taps)
    manifest = _begin(folder, manifest)
    columns = ["key", *manifest.column_widths()]
    missing = [part for part in parts_of(manifest) if not part.is_whole(folder, columns)]
    speakers.accelerator.wait_for_everyone()  # nobody writes before all have seen the same
    if missing:
        _say(*_forecast(speakers, manifest, missing, folder))
        _write(speakers, manifest, folder, missing)
    if speakers.accelerator.is_main_process:
        _finish(folder, manifest, columns)
    speakers.accelerator.wait_for_everyone()  # the store is whole for whoever reads it next
    return manifest


def _check_taps(manifest: Manifest, wanted: bool) -> None:
    columns = {f"{name}_{tap}" for name, teacher in manifest.teachers.items() for tap in teacher.taps}
    widths = {key: width for key, width in manifest.column_widths().items() if key in columns}
    if sum(widths.values()) > _LARGE_TAPS and not wanted:
        total = manifest.row_bytes * manifest.positions * manifest.epochs
        named = ", ".join(f"{key} {width / 1000:.1f} kB" for key, width in widths.items())
        raise UserError(
            f"--taps: the methods read tensors of the teacher, which make the store up to {_size(total)}, "
            f"{manifest.row_bytes / 1000:.1f} kB an image and epoch ({named}); give --taps to write them"
        )


def _begin(folder: Path, manifest: Manifest) -> Manifest:
    """Compare with what lies in the folder, and note what is being written; a longer store stays as long as it is."""
    from kd_hf.files import write_text
    from kd_hf.store import MANIFEST, UNFINISHED, Manifest, first_difference

    notes = [folder / name for name in (UNFINISHED, MANIFEST) if (folder / name).is_file()]
    if not notes and is_main_process() and folder.is_dir() and any(path.name != _CARD for path in folder.iterdir()):
        raise UserError(f"-o: {folder} holds other things than a store; choose another folder")
    for path in notes:
        try:
            before = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"-o: {path} is damaged, or of another version; choose another folder") from None
        if found := first_difference(_facts(before), _facts(manifest)):
            key, there, here = found
            raise UserError(
                f"-o: {folder} holds another store: {key} is {there!r} there and {here!r} here; choose another folder, "
                "or delete that one"
            )
        if path.name == MANIFEST and before.epochs >= manifest.epochs:
            return before
    if is_main_process():
        write_text(folder / UNFINISHED, manifest.model_dump_json(indent=1))
    return manifest


def _facts(manifest: Manifest) -> dict[str, Any]:
    """All that must not change while a store is written, under dotted names."""
    found: dict[str, Any] = {}
    for name, teacher in manifest.teachers.items():
        values = teacher.model_dump(mode="json", exclude={"gate", "info", "shown_hash"})
        found |= {f"{name}.{key}": value for key, value in values.pop("asked").items()}
        found |= {f"{name}: {key}": value for key, value in values.pop("shown").items()}
        found |= {f"{name}.{key}": value for key, value in values.items()}
    return found | manifest.model_dump(mode="json", include={"positions", "group_rows", "shard_rows"})


def _forecast(speakers: Speakers, manifest: Manifest, missing: Sequence[Part], folder: Path) -> list[str]:
    """Lines about what will be written: how much, how long."""
    from kd_hf.store.writer import free_bytes

    images = sum(len(part.rows) for part in missing)
    size = images * manifest.row_bytes
    lines = [f"{name:8} {teacher.info.name}" for name, teacher in speakers.teachers.items()]
    lines += [
        f"images   {speakers.source.describe()}",
        f"for      {manifest.epochs} epochs of {manifest.positions:,} images, {speakers.length.global_batch} a step",
        f"store    {folder}: {len(missing)} files of {len(manifest.shards)} to write, at most {_size(size)} "
        f"({manifest.row_bytes} bytes an image and epoch)",
    ]
    processes = speakers.accelerator.num_processes
    seconds = speakers.seconds_per_image() * images / min(processes, len(missing))
    lines.append(f"time     about {_duration(seconds)} on {processes} process(es) on {speakers.accelerator.device}")
    if size > free_bytes(folder):
        lines.append(f"warning: only {_size(free_bytes(folder))} are free there")
    return lines


def _write(speakers: Speakers, manifest: Manifest, folder: Path, missing: Sequence[Part]) -> None:
    """Write this process's share, with a bar over all of it; the main process then waits for the others."""
    from tqdm import tqdm

    from kd_hf.callbacks import watched
    from kd_hf.store.writer import write_parts

    accelerator = speakers.accelerator
    total, world = sum(len(part.rows) for part in missing), accelerator.num_processes
    mine = missing[accelerator.process_index :: world]
    done = manifest.positions * manifest.epochs - total
    hidden = not (accelerator.is_main_process and watched())
    with tqdm(desc="store", total=done + total, initial=done, unit="image", unit_scale=True, disable=hidden) as bar:
        for count in write_parts(speakers, manifest, folder, mine):
            bar.update(min(count * world, done + total - int(bar.n)))
    while accelerator.is_main_process and not all((folder / part.file).is_file() for part in missing):
        time.sleep(0.2)  # no collective call: one file may take longer than its timeout


def _finish(folder: Path, manifest: Manifest, columns: Sequence[str]) -> None:
    """Write card and manifest: now it is a store."""
    from kd_hf.files import write_text
    from kd_hf.store import MANIFEST, UNFINISHED

    size = sum((folder / shard.file).stat().st_size for shard in manifest.shards)
    rows = manifest.positions * manifest.epochs
    write_text(folder / _CARD, _card(manifest, size))
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)
    _say(f"{folder}: {rows:,} rows, {_size(size)}, {size / rows:.0f} bytes an image and epoch")


# --- the Hub --------------------------------------------------------------------------------------------------------


def push_store(store: Store, repo_id: str) -> str:
    """Upload a store as a data set, the manifest last; repeating it continues, and what is there is not sent again.

    Returns:
        Its address.

    Raises:
        UserError: no token, no network, no such account.
    """
    from huggingface_hub import HfApi

    from kd_hf.data.reading import plain_reason
    from kd_hf.store import MANIFEST

    api, folder = HfApi(library_name="kd_hf", token=True), Path(store.root)
    try:
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[_CARD, *(shard.file for shard in store.manifest.shards)],
            commit_message="Stored teacher outputs",
        )
        api.upload_file(
            repo_id=repo_id,
            repo_type="dataset",
            path_or_fileobj=folder / MANIFEST,
            path_in_repo=MANIFEST,
            commit_message="The store is whole",
        )
    except Exception as error:  # the client lets through whatever its HTTP library raises
        raise UserError(
            f"--push: '{repo_id}': {plain_reason(error)[:300]}; check the id and the token (`hf auth login`, "
            "HF_TOKEN); the same command continues"
        ) from None
    return f"{api.endpoint}/datasets/{repo_id}"


def _card(manifest: Manifest, size: int) -> str:
    """The data set's card."""
    import yaml

    rows = manifest.positions * manifest.epochs
    models = [str(teacher.asked["model"]) for teacher in manifest.teachers.values()]
    front = {
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
        "size_categories": [_size_category(rows)],
        "tags": ["knowledge-distillation", "teacher-outputs", "kd_hf"],
        "task_categories": ["image-classification"],
        "viewer": False,  # its columns are packed numbers
    }
    data = manifest.data
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", "# Stored teacher outputs", ""]
    lines += [
        f"What {' and '.join(f'`{model}`' for model in models)} says about every training image of `{data['path']}` "
        f"({data['train_split']}) in {manifest.epochs} epochs, as each was cropped, augmented and mixed: "
        f"{rows:,} rows, {_size(size)}.",
        "",
        "Train from it, without the teacher's weights, by a recipe that shows the same images:",
        "",
        "```yaml",
        f"teacher: {{model: {models[0]}, store: USER/NAME}}",
        "```",
        "",
        "| teacher | commit | classes kept | taps | top-1 on held-out images |",
        "|---|---|---|---|---|",
    ]
    for name, teacher in manifest.teachers.items():
        gate = f"{teacher.gate['top1']:.1f} % of {teacher.gate['samples']:.0f}" if teacher.gate else "not measured"
        kept = f"{teacher.top_k} of {teacher.num_classes}"
        taps = ", ".join(f"`{tap}`" for tap in teacher.taps) or "none"
        lines.append(
            f"| {name}: `{teacher.asked['model']}` | {teacher.commit or 'unknown'} | {kept} | {taps} | {gate} |"
        )
    lines += [
        "",
        "Row p of epoch e is what the teacher says at position p of epoch e; files are in this order. Columns: `key` "
        "names the image's random numbers; `…_values` are float16 log-probabilities, `…_classes` their classes "
        "(uint16, or uint32 above 65,536 classes), both packed as bytes; without `…_classes` all classes in order. "
        f"{manifest.rounding}. `manifest.json` says what decided the images.",
    ]
    return "\n".join(lines) + "\n"


def _size_category(rows: int) -> str:
    limits = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"),
              (1e8, "10M<n<100M"), (1e9, "100M<n<1B"))  # fmt: skip
    return next((name for limit, name in limits if rows < limit), "n>1B")


# --- the command ----------------------------------------------------------------------------------------------------


def _say(*lines: str) -> None:
    if is_main_process():
        for line in lines:
            print(line, flush=True)


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more (got {number})")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.cache",
        description="Write what a recipe's teachers say about every training image, so that training needs no teacher.",
    )
    add = parser.add_argument
    add("recipe", help="a recipe file, e.g. recipes/quickstart.yaml")
    add("overrides", nargs="*", metavar="key=value", help="e.g. train.num_train_epochs=10")
    add("-o", "--output", metavar="FOLDER", help="where the store goes; by default the recipe's teacher.store")
    add("--epochs", type=_positive, help="how many; by default those of the recipe")
    add("--top-k", type=_positive, default=TOP_K, help="classes kept of an image; all where there are fewer (100)")
    add("--taps", action="store_true", help="write tensors that methods read, also where they make the store large")
    add("--processes", type=_positive, help="how many processes will train; by default as many as write")
    add("--shard-rows", type=_positive, default=SHARD_ROWS, help="rows of a file, about (100000)")
    add("--verify", type=_positive, nargs="?", const=VERIFIED, metavar="N",
        help="instead of writing, compare N random images of a finished store with the teacher (64)")  # fmt: skip
    add("--push", metavar="USER/NAME", help="instead of writing, upload a finished store to the Hub")
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse the command line, and write, verify or push."""
    args = _parser().parse_intermixed_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a busy machine

    from kd_hf.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    stores = {cfg.store for cfg in recipe.all_teachers().values() if cfg.store}
    place = args.output or (stores.pop() if len(stores) == 1 else None)
    if place is None:
        raise UserError("-o: where is the store? Give -o FOLDER, or teacher.store in the recipe")
    if args.verify is None and args.push is None:
        write_store(
            recipe,
            Path(place).expanduser(),
            epochs=args.epochs,
            top_k=args.top_k,
            taps=args.taps,
            processes=args.processes,
            shard_rows=args.shard_rows,
        )
    if args.verify is not None:
        from kd_hf.store.verify import verify_store

        if found := verify_store(recipe, place, args.verify, args.processes):
            _say(f"{place} differs from the teacher: {found}")
            return 1
        _say(f"{place}: {args.verify} random images agree with the teacher")
    if args.push is not None and is_main_process():
        from kd_hf.store import open_store

        _say(f"pushed to {push_store(open_store(place), args.push)}")
    return 0


if __name__ == "__main__":
    run_command(main)
