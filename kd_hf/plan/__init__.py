"""Explaining a recipe without training it: ``python -m kd_hf.plan RECIPE``."""
