"""Checks and measurements for a GPU."""
