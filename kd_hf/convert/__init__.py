"""Checkpoints of other code: reading them safely, finding the student in them, and the names of its weights."""
