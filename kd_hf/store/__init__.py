"""Stored outputs of teachers: their format, and reading them."""
