"""The machine-readable half of a model card: its front matter, and results for leaderboards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.recipe.resolved import recipe_hash
from kd_hf.run.lineage import (
    commit_of,
    dataset_id,
    dataset_kind,
    distilling,
    exported_metrics,
    hub_id,
    losses_of,
    network_name,
    shown_path,
    weight_text,
)
from kd_hf.run.record import RunRecord
from kd_hf.tasks.score import label_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_ACCURACIES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
_HUB_METRICS = {**dict.fromkeys(_ACCURACIES, "accuracy"), "ap": "mean_average_precision"}  # the others: their own key
BESIDE = {"raw": "its weights without averaging", "ema": "its averaged weights"}


def card_data(record: RunRecord, repo_id: str | None = None) -> ModelCardData:
    """The front matter, as ``huggingface_hub.ModelCardData``."""
    from huggingface_hub import ModelCardData

    recipe, methods, task = record.recipe, distilling(record.recipe), record.task.pipeline_tag
    dataset, results = dataset_id(record), _eval_results(record)
    bases = dict.fromkeys(hub_id(record, name) for name in ("student", *recipe.all_teachers()))
    measured = {result.metric_type for result in results}
    distilled = ["knowledge-distillation"] if recipe.all_teachers() or methods else []
    return ModelCardData(
        library_name=_library(record.student),
        pipeline_tag=task,
        license=recipe.hub.license,
        datasets=[dataset] if dataset else None,
        base_model=[base for base in bases if base] or None,
        tags=[task, *distilled, "kd_hf", *methods, *recipe.hub.tags],
        metrics=[kind for kind in dict.fromkeys(_HUB_METRICS.values()) if kind in measured] or None,
        model_name=(repo_id or record.name).rpartition("/")[2],
        eval_results=results or None,
        distillation=_distillation(record),
    )


def _distillation(record: RunRecord) -> dict[str, Any]:
    """The front matter's own block: which teachers and data at which commits, by which methods and recipe."""
    teachers = []
    for name in record.recipe.all_teachers():
        trained = record.trained_teacher(name)
        facts = {
            "name": name,
            "model": hub_id(record, name) or network_name(record, name),
            "revision": commit_of(record, name),
            "recipe": recipe_hash(trained.recipe) if trained else None,
        }
        teachers.append({key: value for key, value in facts.items() if value})
    weights = {name: weight for name, (_, weight) in losses_of(record.recipe).items()}
    commit = record.data_commit("train")
    return {
        "teachers": teachers,
        "methods": {name: value if isinstance(value, float) else weight_text(value) for name, value in weights.items()},
        **({"data_revision": commit} if commit else {}),
        "recipe": recipe_hash(record.recipe),
        "versions": dict(record.start.get("versions", {})),
    }


def _eval_results(record: RunRecord) -> list[EvalResult]:
    """Results for the front matter's ``model-index``; accuracies from 0 to 1, as the Hub's metric of that name."""
    from huggingface_hub import EvalResult

    data, hub = record.recipe.data, dataset_id(record)
    results = []
    for key, value in student_metrics(record, exported_metrics(record)).items():
        accuracy = key in _ACCURACIES
        results.append(
            EvalResult(
                task_type=record.task.pipeline_tag,
                dataset_type=dataset_kind(record),
                dataset_name=shown_path(data.path),
                dataset_config=data.name if hub else None,
                dataset_split=data.eval_split,
                dataset_revision=(record.data_commit("eval") or data.revision) if hub else None,
                metric_type=_HUB_METRICS.get(key, key),
                metric_name=_ACCURACIES.get(key) or label_of(key),
                metric_value=round(value / 100 if accuracy else value, 6),
            )
        )
    return results


def result_entries(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """Files of ``.eval_results/`` by name, for leaderboards: only of a whole split of a data set on the Hub."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    data, metrics, dataset = record.recipe.data, exported_metrics(record), dataset_id(record)
    key = record.score.key
    if dataset is None or key not in metrics or record.recipe.eval.max_samples is not None:
        return {}
    name = _ACCURACIES.get(key) or label_of(key)
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=data.name or "default",
        value=round(metrics[key], 4),
        dataset_revision=record.data_commit("eval") or data.revision,
        notes=f"{name} in percent, split {data.eval_split}, {metrics.get('samples', 0):.0f} images",
    )
    return {f"{dataset.rpartition('/')[2]}.yaml": eval_result_entries_to_yaml([entry])}


def _library(student: Path) -> str:
    """The library that the Hub names for a layout; both read timm's."""
    config = read_config(student)
    return "timm" if "pretrained_cfg" in config else "transformers" if "model_type" in config else "pytorch"


def read_config(student: Path) -> dict[str, Any]:
    """The artefact's config.json."""
    return json.loads((student / "config.json").read_text(encoding="utf-8"))


def student_metrics(record: RunRecord, metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of the metrics that are the student's own, without the number of samples."""
    others = tuple(f"{name}_" for name in (*record.recipe.all_teachers(), *BESIDE))
    return {key: value for key, value in metrics.items() if not key.startswith(others) and key != "samples"}


def in_billions(macs: int | None) -> str:
    """Multiply–accumulates for people, in billions; empty where they are not known."""
    if not macs:
        return ""
    return f"{macs / 1e9:,.0f}" if macs >= 1e11 else f"{macs / 1e9:.3g}"
