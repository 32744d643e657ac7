"""A checkpoint of other code as a model folder in safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError

if TYPE_CHECKING:
    from kd_hf.convert.layouts import StudentWeights
    from kd_hf.models.handle import ModelHandle
    from kd_hf.recipe.config import PreprocessingConfig

IMAGENET = "imagenet-1k"


def convert_checkpoint(
    checkpoint: str | Path,
    arch: str | None,
    folder: str | Path,
    *,
    weights: str = "auto",
    num_classes: int | None = None,
    image_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocessing: PreprocessingConfig | None = None,
    label_names: str | Path | None = None,
    bgr: bool = False,
) -> list[str]:
    """Write the student of a released checkpoint as a model folder (see :func:`kd_hf.hub.artefact.save_student`).

    Args:
        checkpoint: the file.
        arch: the network, as in a recipe (``resnet50``, ``kd_hf/conv_stem_deit_tiny``); not for ViDT, whose weights
            tell it, nor where the checkpoint's folder is named as RepDistiller names it.
        folder: where the model goes; it must not exist, or be empty.
        weights: ``auto`` (the published ones), ``model`` (not averaged) or ``ema`` (averaged).
        num_classes: K; by default as many as the checkpoint's classifier has.
        image_size: pixels per side; by default the architecture's.
        kwargs: constructor arguments of the architecture; of ViDT those that no weight shows.
        preprocessing: mean, std, interpolation and crop where they are not the architecture's.
        label_names: a file with one class name per line, or ``imagenet-1k``.
        bgr: the network was trained on images in OpenCV's order; its first convolution is turned to RGB.

    Returns:
        What was done, in lines for a person.

    Raises:
        UserError: no such file or architecture, no checkpoint, or weights that do not fit the network.
    """
    from kd_hf.convert.fitting import count_classes, fit_weights, name_weights, turn_to_rgb
    from kd_hf.convert.layouts import find_student
    from kd_hf.convert.reading import read_checkpoint
    from kd_hf.convert.repdistiller import arch_of_folder
    from kd_hf.convert.vidt import convert_vidt, is_vidt
    from kd_hf.hub.artefact import save_student
    from kd_hf.models.load import load_model

    target = _new_folder(Path(folder))
    source = read_checkpoint(Path(checkpoint))
    student = find_student(source, weights)
    if is_vidt(frozenset(student.tensors)):
        return convert_vidt(student.tensors, target, str(checkpoint), kwargs or {})
    arch = arch or arch_of_folder(Path(checkpoint))
    if arch is None:
        raise UserError(
            "--arch: name the network, as in a recipe's student.model; only ViDT's checkpoints tell it, and folders "
            "called as RepDistiller calls them (resnet32x4_vanilla)"
        )
    options: dict[str, Any] = {"image_size": image_size, "kwargs": kwargs, "preprocessing": preprocessing}
    sketch = load_model(arch, num_classes=num_classes, device="meta", **options)
    named = name_weights(student, sketch)
    handle = load_model(arch, num_classes=num_classes or count_classes(named, sketch), **options)
    handle.network.load_state_dict(fit_weights(named, student, handle, str(checkpoint)))
    if bgr:
        turn_to_rgb(handle.network)
    if label_names is not None:
        handle.label_names = _read_labels(label_names, handle.info.num_classes)
    save_student(handle, target)
    return _describe(target, handle, student, source.foreign)


def _new_folder(target: Path) -> Path:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"-o: '{target}' exists already; name a new folder")
    return target


def _describe(folder: Path, handle: ModelHandle, student: StudentWeights, foreign: Sequence[str]) -> list[str]:
    entry = f"entry '{student.entry}'" if student.entry else "top level"
    lines = [f"{folder}: {handle.info.name}, {handle.info.num_classes} classes, weights of the {entry}"]
    if student.left_out:
        lines.append("left out: " + ", ".join(f"{name} ({count})" for name, count in student.left_out.items()))
    if foreign:
        lines.append(f"not run: {', '.join(foreign)}")
    return lines


def _read_labels(source: str | Path, count: int) -> tuple[str, ...]:
    """Class names of a file, one per line, or ImageNet's."""
    from timm.data import ImageNetInfo

    path = Path(source)
    try:
        names = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        if str(source) != IMAGENET:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"--label-names: cannot read '{source}' ({reason}); give a file with one name per line, or {IMAGENET}"
            ) from error
        names = ImageNetInfo(IMAGENET).label_names()
    names = [name.strip() for name in names if name.strip()]
    if len(names) != count:
        raise UserError(f"--label-names: '{source}' has {len(names)} names for {count} classes")
    twice = next((number for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        first = names.index(names[twice])
        raise UserError(f"--label-names: '{source}' calls the classes {first} and {twice} '{names[twice]}'; rename one")
    return tuple(names)
