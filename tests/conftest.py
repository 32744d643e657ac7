"""One thread in this process as in the subprocesses of tests: another number rounds differently, and is slower here."""

from __future__ import annotations

import os

import pytest

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


def pytest_configure(config: pytest.Config) -> None:
    """Where all versions are fixed, a warning is an error; with those of another day, a library may have a new one."""
    if os.environ.get("STRICT_WARNINGS"):
        config.getini("filterwarnings")[:0] = ["error:::kd_hf", "error:::tests"]


@pytest.fixture
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it prepares in a folder of this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
