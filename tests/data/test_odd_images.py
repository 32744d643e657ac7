"""Images that are not plain RGB, through every kind of source."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from kd_hf.data.loader import eval_loader, train_loader
from kd_hf.data.opening import open_source
from kd_hf.data.pixels import exif_warnings_silenced
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import encode, make_image, write_tar

pytestmark = pytest.mark.filterwarnings("error::UserWarning:PIL")  # about broken EXIF, for one
VIEWS = {"student": Preprocessing(image_size=32, crop_pct=1.0)}
GREY = np.asarray(make_image(0).convert("L"))


def transparent_palette():
    image = make_image(0).quantize(16)
    image.info["transparency"] = 3
    return image


def broken_exif():
    """A JPEG whose EXIF block is cut to pieces, and asks for a rotation before that."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()
    return encode(make_image(0), "JPEG", quality=95, exif=data[:20] + b"\xff" * 9)


ODD = {
    "CMYK": lambda: encode(make_image(0).convert("CMYK"), "JPEG", quality=95),
    "grey": lambda: encode(make_image(0).convert("L")),
    "grey with alpha": lambda: encode(make_image(0).convert("LA")),
    "alpha": lambda: encode(make_image(0).convert("RGBA")),
    "palette": lambda: encode(make_image(0).quantize(256)),
    "transparent palette": lambda: encode(transparent_palette()),
    "two colours": lambda: encode(make_image(0).convert("1")),
    "16 bits": lambda: encode(Image.fromarray(GREY.astype(np.uint16) << 8)),
    "16 bits TIFF": lambda: encode(Image.fromarray(GREY.astype(np.uint16) << 8), "TIFF"),
    "animation": lambda: encode(make_image(0), "GIF", save_all=True, append_images=[make_image(1)]),
    "broken EXIF": broken_exif,
}
COARSE = ("palette", "transparent palette", "two colours", "animation")  # other colours, so only roughly alike


def write_folder(root, images):
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for number, data in enumerate(images):
            with exif_warnings_silenced():
                suffix = Image.open(io.BytesIO(data)).format.lower()
            (root / split / "a" / f"{number:02d}.{suffix}").write_bytes(data)


def write_tables(root, images):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    columns = {"image": [{"bytes": data, "path": None} for data in images], "label": [0] * len(images)}
    for split in ("train", "val"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}.parquet", batch_size=3)


def write_tars(root, images):
    samples = {f"{number:02d}": {"jpg": data, "cls": "0"} for number, data in enumerate(images)}
    for split in ("train", "val"):
        write_tar(root / f"{split}.tar", samples)


@pytest.fixture(params=["folder", "table", "stream", "tar"])
def cfg(request, tmp_path):
    write = {"folder": write_folder, "tar": write_tars}.get(request.param, write_tables)
    write(tmp_path, [make() for make in ODD.values()])
    return DataConfig(path=str(tmp_path), streaming=request.param == "stream")


def test_every_source_gives_them_as_rgb(cfg):
    source = open_source(cfg, "eval")
    (batch,) = eval_loader(source, VIEWS, batch_size=len(ODD))
    assert batch.valid.all() and not batch.corrupt
    plain = np.asarray(make_image(0).resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32)), np.float32)
    for row, name in enumerate(ODD):
        view = batch.views["student"][row].permute(1, 2, 0).numpy().astype(np.float32)
        difference = np.abs(view.mean(-1) - plain.mean(-1)).mean()
        assert difference < (60 if name in COARSE else 20), (name, difference)


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_training_reads_them_all(cfg, decoder):
    cfg = cfg.model_copy(update={"decoder": decoder})
    found = list(train_loader(open_source(cfg, "train"), cfg, VIEWS, per_device=len(ODD), total_steps=2))
    assert not any(batch.corrupt for batch in found)
    assert sorted(found[0].row.tolist()) == list(range(len(ODD)))
    assert torch.equal(found[0].label, torch.zeros(len(ODD), dtype=torch.long))
