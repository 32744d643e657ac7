"""Recipes: what may be said, reading it, and what is derived from it."""
