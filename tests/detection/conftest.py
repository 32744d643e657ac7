import pytest


@pytest.fixture
def private_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps what it prepares in a folder of this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
