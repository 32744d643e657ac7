"""Training: ``python -m kd_hf.train RECIPE``."""
