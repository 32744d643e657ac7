"""Students as one file that runs without this package: ``python -m kd_hf.export MODEL``."""
