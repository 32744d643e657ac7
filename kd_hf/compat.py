"""What the oldest versions in setup.cfg lack; each function goes with the version that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kd_hf.errors import UserError


def checkpointing_switch(network: nn.Module) -> Callable[[dict[str, Any]], None] | None:
    """What turns recomputation on in a network of transformers; transformers 5.23 gave it the first of these names."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    return next((getattr(network, name) for name in names if callable(getattr(network, name, None))), None)


def timm_image_size(network: nn.Module) -> int:
    """Pixels of a side that a network of timm was built for; timm 1.0.31 answers itself.

    Older ones keep no record of ``img_size``, but the layer that cuts a picture into patches knows it. (That of Hiera,
    MaxViT and VOLO does not: what counts there is the size of the published weights, as it did in timm.)
    """
    try:
        from timm.models import get_model_input_config
    except ImportError:
        facts: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        sizes = (getattr(module, "img_size", None) for module in network.modules())
        size = next(filter(None, sizes), None) if facts.get("fixed_input_size") else None
        size = size or facts.get("input_size", (3, 224, 224))
        return size if isinstance(size, int) else size[-1]
    return get_model_input_config(network)["input_size"][-1]


def timm_prefix_count(network: nn.Module) -> int:
    """Tokens before those of the patches; timm 1.0.31 has all networks say so, CaiT and XCiT among them."""
    count: Any = getattr(network, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    return int(getattr(network, "cls_token", None) is not None)


def save_timm_config(
    network: nn.Module, path: Path, labels: dict[str, Any], data: dict[str, Any], arguments: Mapping[str, Any]
) -> None:
    """Write config.json in timm's layout; timm 1.0.31 takes `data`, and records `arguments` itself.

    Args:
        network: built by timm.
        path: of the file.
        labels: `label_names` and `label_descriptions`, or nothing.
        data: what the network is to be shown: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.
        arguments: those that the network was built with, as far as they are known.

    Raises:
        UserError: an older timm cannot write how the network is built again.
    """
    from timm.models import _hub

    save: Any = _hub.save_config_for_hf  # an older one's arguments are others
    if hasattr(_hub, "get_model_args"):
        save(network, str(path), model_config=labels, data_config=data)
        return
    facts: dict[str, Any] = dict(getattr(network, "pretrained_cfg", {}))
    sized = {"img_size": [timm_image_size(network)] * 2} if facts.get("fixed_input_size") else {}
    arguments = {**{key: value for key, value in arguments.items() if not key.endswith("_rate")}, **sized}
    _check_arguments(network, facts["architecture"], arguments)
    facts = {**_hub.filter_pretrained_cfg(facts, remove_source=True, remove_null=True), **data}
    # these hold for the size and the weights that were published
    for key in ("architecture", "test_input_size", "test_crop_pct", "pool_size", "custom_load", "label_offset"):
        facts.pop(key, None)
    facts["num_classes"] = network.num_classes
    save(network, path, model_config={**labels, "pretrained_cfg": facts}, model_args=arguments)


def _check_arguments(network: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> None:
    """A network that was built in Python has arguments that timm before 1.0.31 forgets."""
    import timm

    arguments = {**arguments, "num_classes": network.num_classes}
    rebuilt = timm.create_model(architecture, device="meta", **arguments)
    shapes, expected = ({k: v.shape for k, v in each.state_dict().items()} for each in (rebuilt, network))
    if shapes != expected:
        raise UserError(
            f"{architecture} was built with arguments that timm {timm.__version__} does not record, so nobody could "
            "load it again; install timm>=1.0.31 and give the same command, which continues from the last checkpoint"
        )
