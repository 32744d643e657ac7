"""The artefact: a folder that timm or transformers loads without this package, with the same logits to the bit."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_hf.compat import save_timm_config
from kd_hf.errors import UserError
from kd_hf.files import atomic_folder
from kd_hf.models.handle import ModelHandle
from kd_hf.models.quiet import quiet_transformers
from kd_hf.models.safetensors import write_safetensors
from kd_hf.models.students import LIBRARY, as_transformers

# what another network may have left in the folder; everything else there stays
_OLD = re.compile(r"model[^/]*\.safetensors(\.index\.json)?|preprocessor_config\.json")
_IN_SHELL = "network."  # begins the names of a network's tensors in the class that transformers loads


def save_student(
    handle: ModelHandle,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a network as a Hub model folder, atomically; what else lies in an existing folder stays.

    timm networks get timm's layout, which ``timm.create_model("local-dir:…")`` and
    ``AutoModelForImageClassification`` both read; transformers networks their own, with an image processor, and so
    do the networks of this package, with the file that defines them (``trust_remote_code=True`` runs it). Any other
    network leaves its weights and its facts: whoever has its class loads them with ``load_state_dict``.
    Weights are safetensors.

    Args:
        handle: the network with its preprocessing and class names.
        folder: the artefact's folder, e.g. ``run/student``.
        state_dict: other weights for the same network, e.g. an average; keys as in ``handle.network``.
        extra_files: further text files by their path in the folder (``README.md``, …).

    Raises:
        UserError: the disk is full or may not be written to; what was there before is untouched.
        ValueError: `state_dict` does not have the network's keys.
    """
    weights = handle.network.state_dict() if state_dict is None else dict(state_dict)
    different = weights.keys() ^ handle.network.state_dict().keys()
    if different:
        raise ValueError(f"state_dict does not fit {handle.info.name}: {sorted(different)[:3]} in one of them only")
    # a copy on the CPU: safetensors refuses tensors that share memory
    weights = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
    with atomic_folder(Path(folder).absolute(), _OLD.fullmatch) as temporary:
        _WRITERS[handle.info.library](handle, temporary, weights)
        for name, text in (extra_files or {}).items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _write_timm(handle: ModelHandle, folder: Path, weights: dict[str, Tensor]) -> None:
    facts = handle.info.preprocessing
    data = {
        "input_size": (3, facts.image_size, facts.image_size),
        "mean": facts.mean,
        "std": facts.std,
        "interpolation": facts.interpolation,
        "crop_pct": facts.crop_pct,
        "crop_mode": facts.crop_mode,
    }
    path = folder / "config.json"
    save_timm_config(handle.network, path, _timm_labels(handle), data, handle.origin.kwargs)
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers' timm wrapper passes num_classes itself and fails on a second one; the root key serves both
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights)


def _timm_labels(handle: ModelHandle) -> dict[str, Any]:
    """`label_names` and a description of each: ImageNet's words for synset ids, else the name itself."""
    from timm.data import ImageNetInfo

    if not handle.label_names:
        return {}
    words: Any = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return {
        "label_names": list(handle.label_names),
        "label_descriptions": {name: words.get(name, name) for name in handle.label_names},
    }


def _write_transformers(handle: ModelHandle, folder: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file

    network: Any = handle.network
    with quiet_transformers():
        network.save_pretrained(folder, state_dict=weights)
    for path in folder.glob("*.safetensors"):
        aligned = path.with_suffix(".aligned")
        write_safetensors(aligned, load_file(path))
        aligned.replace(path)
    config = copy.deepcopy(network.config)
    if handle.label_names:
        config.id2label = dict(enumerate(handle.label_names))
        config.label2id = {name: index for index, name in enumerate(handle.label_names)}
    config.save_pretrained(folder)
    if handle.image_processor is not None:
        handle.image_processor.save_pretrained(folder)
        return
    _image_processor(handle).save_pretrained(folder)
    # the processor holds whole pixels only; the exact ratio lets a reader recover the preprocessing as it was
    path = folder / "preprocessor_config.json"
    processor = json.loads(path.read_text(encoding="utf-8")) | {"crop_pct": handle.info.preprocessing.crop_pct}
    path.write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def _image_processor(handle: ModelHandle) -> Any:
    """The transformers image processor that does what the network's preprocessing says."""
    from PIL.Image import Resampling
    from transformers import BitImageProcessor

    facts = handle.info.preprocessing
    square = {"height": facts.image_size, "width": facts.image_size}
    squash = facts.crop_mode == "squash"
    return BitImageProcessor(
        size=square if squash else {"shortest_edge": int(facts.image_size / facts.crop_pct + 1e-6)},
        do_center_crop=not squash,
        crop_size=square,
        resample=Resampling[facts.interpolation.upper()],
        image_mean=list(facts.mean),
        image_std=list(facts.std),
    )


def _write_own(handle: ModelHandle, folder: Path, weights: dict[str, Tensor]) -> None:
    """The transformers layout, with the network's source file beside its weights."""
    shell = replace(handle, network=as_transformers(handle.network))
    _write_transformers(shell, folder, {f"{_IN_SHELL}{key}": value for key, value in weights.items()})


def _write_torch(handle: ModelHandle, folder: Path, weights: dict[str, Tensor]) -> None:
    """The weights and the facts; only the code that built the network can build it again."""
    config = {
        "library": handle.info.library,
        "architecture": handle.origin.architecture,
        "num_classes": handle.info.num_classes,
        "label_names": list(handle.label_names),
        "preprocessing": asdict(handle.info.preprocessing),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights)


def read_weights(handle: ModelHandle, folder: Path) -> dict[str, Tensor]:
    """The weights of an artefact that :func:`save_student` wrote of this network, named as in ``handle.network``.

    Raises:
        UserError: they cannot be read, or are of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network: Any = handle.network
    try:
        if handle.info.library == "transformers":  # its files may have other names in them than its networks
            with quiet_transformers():
                return dict(type(network).from_pretrained(folder).state_dict())
        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged: {' '.join(str(error).split())[:300]}") from None
    if handle.info.library == LIBRARY:
        weights = {key.removeprefix(_IN_SHELL): value for key, value in weights.items()}
    if different := weights.keys() ^ network.state_dict().keys():
        raise UserError(f"{folder} does not hold the weights of {handle.info.name}: {sorted(different)[:3]}")
    return weights


_WRITERS = {"timm": _write_timm, "transformers": _write_transformers, LIBRARY: _write_own, "torch": _write_torch}


def load_lines(student: Path) -> list[str]:
    """Lines of Python that load an artefact without this package."""
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    trust = ", trust_remote_code=True" if "auto_map" in config else ""  # the network's code travels with it
    detects = any(name.endswith("ForObjectDetection") for name in config.get("architectures") or ())
    kind = "ObjectDetection" if detects else "ImageClassification"
    lines = [f'model = transformers.AutoModelFor{kind}.from_pretrained("{student}"{trust})']
    if "pretrained_cfg" in config:
        lines.insert(0, f'model = timm.create_model("local-dir:{student}", pretrained=True)')
    return lines
