"""Comparing runs: ``python -m kd_hf.compare RUN [RUN …]``."""
