"""What lies where in a run folder."""

from __future__ import annotations

STUDENT, REPORT, PLAIN = "student", "report", "plain"  # folders: artefact, page, the run of the plain twin
LOG = "log.jsonl"
RESOLVED = "recipe.resolved.yaml"
PAGE = "index.html"  # in the report
