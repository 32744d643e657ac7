"""Export: ``python -m kd_hf.export MODEL --format torch-export|onnx [-o FILE]`` → one file that runs without kd_hf.

MODEL is a run folder, a model folder, a Hub id or a pretrained timm name. The file takes any number of normalised
images and gives their logits; how to prepare the images and the names of the classes are inside it. It is read back
and compared with the model before it gets its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kd_hf.errors import run_command
from kd_hf.export.model import FORMATS, export_model


def main(argv: Sequence[str]) -> int:
    """Parse the command line, export, say what was done."""
    parser = argparse.ArgumentParser(
        prog="python -m kd_hf.export",
        description="Write a model as one file that runs without kd_hf, and check its numbers.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, Hub id or pretrained timm name")
    add("--format", required=True, choices=list(FORMATS))
    add("-o", "--output", metavar="FILE", help="by default model.pt2 or model.onnx in the model's folder")
    add("--image-size", type=int, help="pixels per side, instead of the model's own")
    add("--opset", type=int, help="operator set of ONNX, instead of torch's choice")
    args = parser.parse_args(argv)
    done = export_model(args.model, args.format, args.output, image_size=args.image_size, opset=args.opset)
    print("\n".join(done.lines()))
    return 0


if __name__ == "__main__":
    run_command(main)
