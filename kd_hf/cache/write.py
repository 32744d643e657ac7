"""Writing a store: what is missing of it, in files that processes take in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_hf.cache import SHARD_ROWS, TOP_K
from kd_hf.cache.files import PartFile
from kd_hf.cache.publish import CARD, card
from kd_hf.errors import UserError, is_main_process
from kd_hf.store.format import KEY, KEY_MASK, Manifest
from kd_hf.text.terminal import bytes_text, duration_text, say

if TYPE_CHECKING:
    from kd_hf.cache.files import Part
    from kd_hf.cache.speakers import Speakers
    from kd_hf.recipe.config import Recipe

_LARGE_TAPS = 2000  # bytes an image and epoch that nobody is asked about


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
    from kd_hf.cache.files import parts_of
    from kd_hf.cache.speakers import Speakers

    speakers = Speakers(recipe, processes)
    manifest = speakers.manifest(epochs, top_k, shard_rows, speakers.measure(say))
    _check_taps(manifest, taps)
    manifest = _begin(folder, manifest)
    columns = ["key", *manifest.column_widths()]
    missing = [part for part in parts_of(manifest) if not part.is_whole(folder, columns)]
    speakers.accelerator.wait_for_everyone()  # nobody writes before all have seen the same
    if missing:
        say(*_forecast(speakers, manifest, missing, folder))
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
            f"--taps: the methods read tensors of the teacher, which make the store up to {bytes_text(total)}, "
            f"{manifest.row_bytes / 1000:.1f} kB an image and epoch ({named}); give --taps to write them"
        )


def _begin(folder: Path, manifest: Manifest) -> Manifest:
    """Compare with what lies in the folder, and note what is being written; a longer store stays as long as it is."""
    from kd_hf.files import write_text
    from kd_hf.store.format import MANIFEST, UNFINISHED, Manifest, first_difference

    notes = [folder / name for name in (UNFINISHED, MANIFEST) if (folder / name).is_file()]
    if not notes and is_main_process() and folder.is_dir() and any(path.name != CARD for path in folder.iterdir()):
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
    from kd_hf.cache.files import free_bytes

    images = sum(len(part.rows) for part in missing)
    size = images * manifest.row_bytes
    lines = [f"{name:8} {teacher.info.name}" for name, teacher in speakers.teachers.items()]
    lines += [
        f"images   {speakers.source.describe()}",
        f"for      {manifest.epochs} epochs of {manifest.positions:,} images, {speakers.length.global_batch} a step",
        f"store    {folder}: {len(missing)} files of {len(manifest.shards)} to write, at most {bytes_text(size)} "
        f"({manifest.row_bytes} bytes an image and epoch)",
    ]
    processes = speakers.accelerator.num_processes
    seconds = speakers.seconds_per_image() * images / min(processes, len(missing))
    lines.append(f"time     about {duration_text(seconds)} on {processes} process(es) on {speakers.accelerator.device}")
    if size > free_bytes(folder):
        lines.append(f"warning: only {bytes_text(free_bytes(folder))} are free there")
    return lines


def _write(speakers: Speakers, manifest: Manifest, folder: Path, missing: Sequence[Part]) -> None:
    """Write this process's share, with a bar over all of it; the main process then waits for the others."""
    from tqdm import tqdm

    from kd_hf.text.terminal import watched

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
    from kd_hf.store.format import MANIFEST, UNFINISHED

    size = sum((folder / shard.file).stat().st_size for shard in manifest.shards)
    rows = manifest.positions * manifest.epochs
    write_text(folder / CARD, card(manifest, size))
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1))
    (folder / UNFINISHED).unlink(missing_ok=True)
    say(f"{folder}: {rows:,} rows, {bytes_text(size)}, {size / rows:.0f} bytes an image and epoch")


def write_parts(speakers: Speakers, manifest: Manifest, folder: Path, parts: Sequence[Part]) -> Iterator[int]:
    """Write files one after the other; yields the number of images after each batch."""
    size, positions = speakers.layout.per_device, manifest.positions
    pieces = [part.starts(size, positions) for part in parts]
    batches = speakers.batches([start for starts in pieces for start in starts])
    top_k = {name: teacher.top_k for name, teacher in manifest.teachers.items()}
    for part, starts in zip(parts, pieces, strict=True):
        written = part.rows.start
        with PartFile(folder / part.file, manifest.group_rows) as file:
            for (_, start), batch in zip(starts, islice(batches, len(starts)), strict=True):
                wanted = slice(written - start, min(size, part.rows.stop - start))
                columns = speakers.rows(speakers.ask(batch), top_k)
                keys = (batch.key.numpy() & KEY_MASK).astype(np.uint32)
                file.add({KEY: keys[wanted], **{key: values[wanted] for key, values in columns.items()}})
                written = start + wanted.stop
                yield wanted.stop - wanted.start
