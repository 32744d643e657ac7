"""One thread in this process as in the subprocesses of tests: another number rounds differently, and is slower here."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
