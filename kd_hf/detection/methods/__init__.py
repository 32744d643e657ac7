"""Losses and distillation methods of detectors."""
