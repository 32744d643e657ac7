"""Detectors: ViDT as a model of transformers, loading, and what their outputs are."""
