"""ViDT among the Auto classes of transformers."""

from __future__ import annotations


def register_auto_classes() -> None:
    """Let transformers' Auto classes find ViDT in a model folder without running the code that lies there."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

    from kd_hf.detection.networks.vidt import ViDTForObjectDetection
    from kd_hf.detection.networks.vidt_config import ViDTConfig
    from kd_hf.detection.networks.vidt_image_processor import ViDTImageProcessor

    AutoConfig.register(ViDTConfig.model_type, ViDTConfig, exist_ok=True)
    AutoModelForObjectDetection.register(ViDTConfig, ViDTForObjectDetection, exist_ok=True)
    backends: dict[str, type] = {"torchvision": ViDTImageProcessor}
    AutoImageProcessor.register(ViDTConfig, image_processor_classes=backends, exist_ok=True)
