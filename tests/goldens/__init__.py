"""Recorded inputs, parameters, draws, losses and gradients of the official implementations, and the check of them.

``python -m tests.goldens DIR`` runs ``DIR/<method>/<case>.safetensors`` through the methods of this package, and
``DIR/trajectories/<case>.safetensors``, whole trainings, through its trainer.
"""
