import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from kd_hf.data.opening import open_source
from kd_hf.draws import generator
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig


def make_image(index, width=48, height=40):
    """A smooth colourful picture that differs from its neighbours."""
    coarse = generator("picture", index).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def digits():
    return DataConfig(path="builtin:digits")


def write_folders(root, per_class=3, classes=("cat", "ant", "bee"), splits=("train", "val")):
    index = 0
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                (folder / f"{i}.png").write_bytes(encode(make_image(index)))
                index += 1
    return root


def write_parquet(path, rows, row_group=4, names=("ant", "bee", "cat"), start=0, features=None, **extra):
    """A Parquet file as `datasets` writes it: image bytes, class labels, several row groups."""
    import datasets

    columns = {
        "image": [{"bytes": encode(make_image(start + i)), "path": None} for i in range(rows)],
        "label": [(start + i) % len(names) for i in range(rows)],
        **extra,
    }
    features = features or datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=row_group)
    return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """`datasets` prepares tables in a folder of this test, and looks for no network."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_tar(path, samples, **options):
    """A tar file of samples in WebDataset's layout: name → suffix → bytes, text or what JSON holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, files in samples.items():
            for suffix, value in files.items():
                text = value if isinstance(value, (bytes, str)) else json.dumps(value)
                data = text.encode() if isinstance(text, str) else text
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def contents(source):
    return [source.read(row) for row in range(len(source))]


def refused(cfg, pattern, split="train"):
    with pytest.raises(UserError, match=pattern) as caught:
        open_source(cfg, split)
    assert "\n" not in str(caught.value)


@pytest.fixture
def parquet(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 10)
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 7, start=10)
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", 5, start=100)
    return tmp_path
