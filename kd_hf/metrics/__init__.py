"""Measuring networks over images: meters, the loop over a set, the evaluation of a run."""
