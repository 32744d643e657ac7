"""Images that are not plain RGB, through every kind of source."""

import io
import subprocess

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from kd_hf.data.loader import eval_loader, train_loader
from kd_hf.data.opening import open_source
from kd_hf.data.pixels import UnreadableImage, decode, exif_warnings_silenced
from kd_hf.data.rows import encode_image
from kd_hf.data.views import EvalTransform, TrainTransform, plan_views, without_far_ends
from kd_hf.info import Preprocessing
from kd_hf.recipe.config import AugmentConfig, CropConfig, DataConfig
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


# --- depth, other programs, extreme shapes ----------------------------------------------------------------------------

DEEP = {
    "8 bits in 16": Image.fromarray(GREY.astype(np.uint16)),
    "8 bits in 32": Image.fromarray(GREY.astype(np.int32)),
    "16 bits": Image.fromarray((GREY.astype(np.uint16) << 8) + 77),
    "floats to 1": Image.fromarray(GREY.astype(np.float32) / 255),
    "floats to 255": Image.fromarray(GREY.astype(np.float32)),
    "floats to 65535": Image.fromarray(GREY.astype(np.float32) * 257),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_neither_black_nor_white(name):
    image = DEEP[name]
    for data in (encode(image, "TIFF"), encode_image(image), *([encode(image)] if "16" in image.mode else [])):
        assert np.array_equal(np.asarray(decode(data).convert("L")), GREY), name


@pytest.mark.parametrize("values", [[0.0, np.nan], [-1.0, 0.5], [0.0, 70000.0]])
def test_grey_without_a_known_white_is_refused(values):
    data = encode(Image.fromarray(np.asarray([values], np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match=r"grey values from .* expected 0 to 1, 0 to 255 or 0 to 65535"):
        decode(data)


def test_no_other_program_is_started(monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    buffer = io.BytesIO()
    make_image(0).save(buffer, "EPS")
    with pytest.raises(UnreadableImage, match="no image, or of a format that is not read here"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (3, 400)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_a_line_of_pixels_takes_little_memory(size, mode):
    """timm would make it 73 × 4,745,000 before it takes the middle."""
    data = encode(Image.new("RGB", size, (10, 200, 30)), "JPEG")
    largest = 0

    def resize(self, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, int(np.prod(size)))
        return whole(self, size, *args, **kwargs)

    whole = Image.Image.resize
    plan = plan_views({"student": Preprocessing(image_size=64, crop_pct=0.875, crop_mode=mode)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", resize)
        (view,) = EvalTransform(plan)(data).values()
        for kind in ("random_resized", "pad", "resize"):
            TrainTransform(plan, AugmentConfig(crop=CropConfig(kind=kind)), "pil")(data, 1)
    assert view.shape == (3, 64, 64) and view[1, 32, 32] > 190 and largest < 73 * 73 * 33


def test_ordinary_images_are_evaluated_as_timm_does():
    image = make_image(0, 200, 10)
    assert without_far_ends(image) is image
    assert without_far_ends(make_image(0, 400, 10)).size == (320, 10)
