"""Convert: ``python -m kd_hf.convert CHECKPOINT --arch ARCH -o DIR`` → a model folder in safetensors.

CHECKPOINT is what the authors' code saved: OpenMMLab's (cls_KD, ScaleKD; 0.x and 1.0, before or after their
``pth_transfer``), DeiT's (soft and hard distillation, manifold, [CLS]-KD), VkD's or timm's, or bare weights. ARCH is
the network it holds, named as in a recipe. Nothing in the file is run, and every weight must find its place.
Images are prepared as timm does for ARCH unless told otherwise; the papers show the central 224 of 256 pixels
(--crop-pct 0.875), to convolutional networks resized bilinearly (--interpolation bilinear), and the images of
CIFAR-100 whole (--crop-pct 1 --mean 0.50707 0.48655 0.44092 --std 0.26733 0.25644 0.27615).

    ResNet-50, also of cls_KD            --arch resnet50
    ResNetV1d-50                         --arch resnet50d
    ResNet-18, -34 of cls_KD for CIFAR   --arch kd_hf/resnet18_cifar, kd_hf/resnet34_cifar
    MobileNetV1                          --arch kd_hf/mobilenetv1_relu
    MobileNetV2                          --arch mobilenetv2_100
    ShuffleNetV2 1×                      --arch kd_hf/shufflenetv2_x1
    RegNetX-1.6GF of cls_KD              --arch regnetx_016 --bgr
    DeiT, DeiT III                       --arch deit_tiny_patch16_224, deit3_small_patch16_224, …
    Swin-T                               --arch swin_tiny_patch4_window7_224
    ConvNeXt-T of ScaleKD                --arch convnext_tiny --kwargs head_norm_first=true
    ViT-S/16, B/16 and B/14 of ScaleKD   --arch kd_hf/vit_small_patch16_gap, …
    Mixer-B/14 of ScaleKD                --arch kd_hf/mixer_b14
    Mixer-B/16                           --arch kd_hf/mixer_b14 --kwargs patch_size=16
    Mixer-S/16                           --arch kd_hf/mixer_b14 --kwargs patch_size=16 embed_dim=512 depth=8
    VkD's students                       --arch kd_hf/conv_stem_deit_tiny, …
    ViDT, also of VkD                    (no --arch: the weights tell its sizes)
    RepDistiller, mdistiller             --arch kd_hf/resnet56, kd_hf/wrn_40_2, kd_hf/vgg13, kd_hf/resnet50_cifar, …
                                         (or none, in a folder that is named after it: resnet32x4_vanilla/…)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, run_command

if TYPE_CHECKING:
    from kd_hf.config import PreprocessingConfig
    from kd_hf.conversion.layouts import StudentWeights
    from kd_hf.models.handle import ModelHandle

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
    """Write the student of a released checkpoint as a model folder (see :func:`kd_hf.artefact.save_student`).

    Args:
        checkpoint: the file.
        arch: the network, as in a recipe (``resnet50``, ``kd_hf/conv_stem_deit_tiny``); not for ViDT, whose weights
            tell it, nor where the checkpoint's folder is named as RepDistiller names it.
        folder: where the model goes; it must not exist, or be empty.
        weights: ``auto`` (the published ones), ``model`` (not averaged) or ``ema`` (averaged).
        num_classes: K; by default as many as the checkpoint's classifier has.
        image_size: pixels per side; by default the architecture's.
        kwargs: constructor arguments of the architecture.
        preprocessing: mean, std, interpolation and crop where they are not the architecture's.
        label_names: a file with one class name per line, or ``imagenet-1k``.
        bgr: the network was trained on images in OpenCV's order; its first convolution is turned to RGB.

    Returns:
        What was done, in lines for a person.

    Raises:
        UserError: no such file or architecture, no checkpoint, or weights that do not fit the network.
    """
    from kd_hf.artefact import save_student
    from kd_hf.conversion.fitting import count_classes, fit_weights, name_weights, turn_to_rgb
    from kd_hf.conversion.layouts import find_student
    from kd_hf.conversion.reading import read_checkpoint
    from kd_hf.conversion.repdistiller import arch_of_folder
    from kd_hf.conversion.vidt import convert_vidt, is_vidt
    from kd_hf.models.load import load_model

    target = _new_folder(Path(folder))
    source = read_checkpoint(Path(checkpoint))
    student = find_student(source, weights)
    if is_vidt(frozenset(student.tensors)):
        return convert_vidt(student.tensors, target, str(checkpoint))
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
        names = path.read_text(encoding="utf-8").split("\n")
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
    return tuple(names)


def _parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """``key=value`` with values as in a recipe."""
    import yaml

    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key.isidentifier() and equals):
            raise UserError(f"--kwargs: expected key=value (got '{pair}')")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--kwargs: '{text}' is not a value in YAML") from None
    return values


def _preprocessing(args: argparse.Namespace) -> PreprocessingConfig:
    from pydantic import ValidationError

    from kd_hf.config import PreprocessingConfig

    given = {key: getattr(args, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    try:
        return PreprocessingConfig.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None


def _parser() -> argparse.ArgumentParser:
    introduction, _, networks = (__doc__ or "").partition("\n\n")[2].partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.convert",
        description=introduction,
        epilog=f"networks:\n{networks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="the authors' file (.pth, .pth.tar, .pt, .safetensors)")
    add("--arch", help="the network, as in a recipe's student.model; not for ViDT, nor in RepDistiller's folders")
    add("-o", "--output", required=True, metavar="DIR", help="the model folder to write")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="published, as trained, or averaged")
    add("--num-classes", type=_positive, help="by default what the checkpoint's classifier has")
    add("--image-size", type=_positive, help="pixels per side, by default the architecture's")
    add("--mean", type=float, nargs=3, help="of the channels, on a 0-1 scale, by default the architecture's")
    add("--std", type=float, nargs=3)
    add("--interpolation", help="nearest, bilinear, bicubic or lanczos")
    add("--crop-pct", type=float, help="share of the resized image that is shown")
    add("--label-names", metavar="FILE", help=f"class names, one per line, or {IMAGENET}")
    add("--kwargs", nargs="+", default=(), metavar="KEY=VALUE", help="the architecture's constructor arguments")
    add("--bgr", action="store_true", help="trained on images in OpenCV's order: turn the first convolution to RGB")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more (got '{text}')")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Parse the command line, convert, say what was done."""
    args = _parser().parse_args(argv)
    lines = convert_checkpoint(
        args.checkpoint,
        args.arch,
        args.output,
        weights=args.weights,
        num_classes=args.num_classes,
        image_size=args.image_size,
        kwargs=_parse_kwargs(args.kwargs),
        preprocessing=_preprocessing(args),
        label_names=args.label_names,
        bgr=args.bgr,
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    run_command(main)
