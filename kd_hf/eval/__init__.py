"""Measuring models on their own: ``python -m kd_hf.eval MODEL``."""
