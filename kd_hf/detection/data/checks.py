"""What a recipe may not say of images with boxes."""

from __future__ import annotations

from kd_hf.errors import UserError
from kd_hf.recipe.config import Block, DataConfig


def check_data(cfg: DataConfig) -> None:
    """Raise :class:`UserError` for what a `data` block may say of images with labels, but not of images with boxes."""
    asked: dict[str, tuple[Block, str]] = {
        name: (cfg, name) for name in ("image_size", "num_labels", "unlabelled", "hold")
    }
    asked |= {f"augment.{name}": (cfg.augment, name) for name in type(cfg.augment).model_fields if name != "repeats"}
    for place, (block, name) in asked.items():
        if getattr(block, name) != type(block).model_fields[name].default:
            raise UserError(f"data.{place}: not for images with boxes; see `data.boxes` for what is")
