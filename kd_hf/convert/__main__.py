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
    ViDT, also of VkD                    (no --arch: the weights tell its sizes; --kwargs decoder_attention_heads=4)
    RepDistiller, mdistiller             --arch kd_hf/resnet56, kd_hf/wrn_40_2, kd_hf/vgg13, kd_hf/resnet50_cifar, …
                                         (or none, in a folder that is named after it: resnet32x4_vanilla/…)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_hf.convert.checkpoint import IMAGENET, convert_checkpoint
from kd_hf.errors import UserError, run_command

if TYPE_CHECKING:
    from kd_hf.recipe.config import PreprocessingConfig


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

    from kd_hf.recipe.config import PreprocessingConfig

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
