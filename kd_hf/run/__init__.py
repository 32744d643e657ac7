"""The run folder: checkpoints, log, length, and reading it afterwards."""
