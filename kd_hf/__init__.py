"""kd_hf: knowledge distillation for vision models in the Hugging Face ecosystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name → module; imported on first use, so that `import kd_hf` costs nothing
_PUBLIC = {
    "DistillTrainer": "kd_hf.trainer",
    "Recipe": "kd_hf.config",
    "TrainConfig": "kd_hf.config",
    "load_recipe": "kd_hf.recipe",
    "Method": "kd_hf.methods.base",
    "load_model": "kd_hf.models.load",
    "UserError": "kd_hf.errors",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from kd_hf.config import Recipe as Recipe
    from kd_hf.config import TrainConfig as TrainConfig
    from kd_hf.errors import UserError as UserError
    from kd_hf.methods.base import Method as Method
    from kd_hf.models.load import load_model as load_model
    from kd_hf.recipe import load_recipe as load_recipe
    from kd_hf.trainer import DistillTrainer as DistillTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kd_hf' has no attribute '{name}'")
