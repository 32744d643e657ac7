"""kd_hf: knowledge distillation for vision models in the Hugging Face ecosystem."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kd_hf.version import __version__

# public name → module; imported on first use, so that `import kd_hf` costs nothing
_PUBLIC = {
    "DistillTrainer": "kd_hf.train.trainer",
    "Recipe": "kd_hf.recipe.config",
    "TrainConfig": "kd_hf.recipe.config",
    "load_recipe": "kd_hf.recipe.read",
    "Method": "kd_hf.methods.base",
    "load_model": "kd_hf.models.load",
    "UserError": "kd_hf.errors",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from kd_hf.errors import UserError as UserError
    from kd_hf.methods.base import Method as Method
    from kd_hf.models.load import load_model as load_model
    from kd_hf.recipe.config import Recipe as Recipe
    from kd_hf.recipe.config import TrainConfig as TrainConfig
    from kd_hf.recipe.read import load_recipe as load_recipe
    from kd_hf.train.trainer import DistillTrainer as DistillTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kd_hf' has no attribute '{name}'")
