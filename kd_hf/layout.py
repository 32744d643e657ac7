"""What lies where in a run folder."""

from __future__ import annotations

STUDENT, REPORT, PLAIN = "student", "report", "plain"  # folders: artefact, page, the run of the plain twin
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
RESOLVED = "recipe.resolved.yaml"
ENDING = "finished.json"  # what was exported and described; see :mod:`kd_hf.run.ending`
LOCK = ".lock"
UNFINISHED = ".unfinished"  # the student of a save, on its way to the Hub
OUTGOING, INCOMING = ".push", ".fetch"  # while a background push or a download runs
PAGE = "index.html"  # in the report
