"""A store as a data set of the Hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kd_hf.errors import UserError
from kd_hf.text.terminal import bytes_text

if TYPE_CHECKING:
    from kd_hf.store.format import Manifest, Store

CARD = "README.md"


def push_store(store: Store, repo_id: str) -> str:
    """Upload a store as a data set, the manifest last; repeating it continues, and what is there is not sent again.

    Returns:
        Its address.

    Raises:
        UserError: no token, no network, no such account.
    """
    from huggingface_hub import HfApi

    from kd_hf.data.reading import plain_reason
    from kd_hf.store.format import MANIFEST

    api, folder = HfApi(library_name="kd_hf", token=True), Path(store.root)
    try:
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[CARD, *(shard.file for shard in store.manifest.shards)],
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


def card(manifest: Manifest, size: int) -> str:
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
        f"{rows:,} rows, {bytes_text(size)}.",
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
