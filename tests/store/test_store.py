"""The format of a store: what rows say, what decides the images, what does not fit."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch

from kd_hf.cache.write import write_store
from kd_hf.data.loader import train_loader
from kd_hf.data.order import Layout
from kd_hf.data.views import DeviceStage
from kd_hf.errors import UserError
from kd_hf.info import Preprocessing, Shapes
from kd_hf.methods import get_method
from kd_hf.outputs import Outputs, Target
from kd_hf.recipe.config import AugmentConfig, TrainConfig
from kd_hf.store.format import log_probabilities, open_store, rounding, spread
from kd_hf.store.reader import StoredTeacher, asked_for, shown_images
from tests.data.conftest import encode, make_image
from tests.data.test_loader import Pictures
from tests.runs import TEACHER, merged, recipe

B, C = 32, 1000
LOGIT_METHODS = {"kd": {"temperature": 4.0}, "nkd": {}, "dkd": {}, "deit_soft": {}, "wsld": {}, "deit_hard": {}}
# of a loss, relative, with 100 of 1000 classes; dkd compares the others among themselves, down to the last one
SPARSE = {"dkd": 0.1}


def confident_logits(classes=C, seed=0):
    """Like a trained teacher's: one class far above the others, and some similar ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, classes, generator=generator)
    rows = torch.arange(B)
    logits[rows, torch.randint(classes, (B,), generator=generator)] += torch.linspace(0, 20, B)
    return logits


@pytest.mark.parametrize("kept", [1, 7, 100, 999, 1000, 5000])
def test_kept_classes_come_back_within_the_rounding(kept):
    logits = confident_logits()
    values, classes = log_probabilities(logits, kept)
    again = spread(values, classes, C)
    live = torch.log_softmax(logits, 1)
    held = torch.arange(C).expand(B, -1) if classes is None else classes
    assert held.shape == (B, min(kept, C)) and again.dtype == torch.float32
    exact = live.gather(1, held)
    assert ((again.gather(1, held) - exact).abs() <= rounding(exact) + 1e-6).all()
    assert again.argmax(1).equal(logits.argmax(1))


@pytest.mark.parametrize("kept", [1, 7, 100])
def test_the_rest_shares_what_is_left_and_never_overtakes(kept):
    logits = confident_logits()
    values, classes = log_probabilities(logits, kept)
    again = spread(values, classes, C)
    rest = torch.ones(B, C).scatter_(1, classes, 0).bool()
    assert (again[rest].view(B, -1) == again[rest].view(B, -1)[:, :1]).all()
    assert (again[rest].view(B, -1).amax(1) <= values[:, -1].float()).all()
    total = again.exp().sum(1)
    left = 1 - values.float().exp().sum(1)
    capped = left > (C - kept) * values[:, -1].float().exp()  # only rounding makes the least kept one too small
    assert torch.allclose(total[~capped & (left > 0)], torch.ones(()), atol=1e-5)
    assert torch.isfinite(again).all() and (total < 1 + 2e-3).all()


def test_extreme_logits_stay_finite():
    logits = torch.full((2, 50), -2e5)
    logits[0, 3], logits[1] = 2e5, torch.linspace(-90, 0, 50)
    logits[1, 7] = -torch.inf
    for kept in (1, 5, 50):
        assert torch.isfinite(spread(*log_probabilities(logits, kept), 50)).all()
    with pytest.raises(UserError, match="NaN"):
        log_probabilities(torch.tensor([[0.0, torch.nan]]), 1)


@pytest.mark.parametrize("name", LOGIT_METHODS)
def test_losses_are_the_live_teachers_within_the_rounding(name):
    """Dense: the error of every log-probability is at most its rounding, so that of a loss is of that size."""
    method = get_method(name)
    cfg = method.Config.model_validate(LOGIT_METHODS[name])
    built = method(cfg, Shapes(C), Shapes(C), {})
    seen, logits = torch.randn(B, C, generator=torch.Generator().manual_seed(1)), confident_logits()
    student = Outputs(seen, seen + 0.1)
    target = Target(torch.where(torch.arange(B) % 4 > 0, logits.argmax(1), logits.topk(5).indices[:, -1]))
    live = built(student, Outputs(logits), target, {})
    found = {}
    for kept in (C, 100):
        stored = built(student, Outputs(spread(*log_probabilities(logits, kept), C)), target, {})
        assert stored.keys() == live.keys()
        found[kept] = [abs(float(stored[key] - live[key])) / abs(float(live[key])) for key in live]
    assert max(found[C]) < 1e-3
    assert max(found[100]) < SPARSE.get(name, 2e-2)


# --- what decides the images ----------------------------------------------------------------------------------------

BASE = {
    "data": {
        "lanes": 2,
        "augment": {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0},
    },
    "train": {"seed": 3},
}
VIEWS = {"student": Preprocessing(image_size=24), "teacher": Preprocessing(image_size=24, mean=(0.5,) * 3)}
PLAIN = {"data": {"augment": {"auto_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}}}
OTHER_SIZE = {"student": Preprocessing(image_size=16), "teacher": Preprocessing(image_size=24)}


def augment(**values):
    return {"data": {"augment": values}}


# base, change; other arguments: the changed ones, or those of the base and the changed ones
CHANGES = {
    "seed": (BASE, {"train": {"seed": 4}}),
    "hflip": (BASE, augment(hflip=0.0)),
    "policy": (BASE, augment(auto_augment="rand-m3-mstd0.5")),
    "jitter beside a policy": (BASE, augment(color_jitter=0.4)),
    "jitter": (merged(BASE, PLAIN), augment(color_jitter=0.4)),
    "erasing": (BASE, augment(erasing=0.9)),
    "mixup": (BASE, augment(mixup=0.1)),
    "no mixing": (BASE, augment(mix_prob=0.0)),
    "switch": (BASE, augment(switch_prob=1.0)),
    "switch of mixup alone": (merged(BASE, augment(cutmix=0.0)), augment(switch_prob=0.1)),
    "group of mixing": (BASE, augment(mix_group=2)),
    "group of nothing": (merged(BASE, PLAIN), augment(mix_group=2)),
    "repeats": (BASE, augment(repeats=2)),
    "crop": (BASE, augment(crop={"scale": (0.5, 1.0)})),
    "padding of another crop": (BASE, augment(crop={"padding": 1})),
    "padding": (merged(BASE, augment(crop={"kind": "pad"})), augment(crop={"padding": 1})),
    "scale of another crop": (merged(BASE, augment(crop={"kind": "pad"})), augment(crop={"scale": (0.5, 1.0)})),
    "decoder": (BASE, {"data": {"decoder": "pil"}}, {"kind": "JPEG"}, {"kind": "JPEG"}),
    "lanes": (BASE, {"data": {"lanes": 3}}),
    "block": (BASE, {"data": {"shuffle_block": 1}}),
    "labels": (BASE, {"data": {"num_labels": 5}}),
    "streaming": (BASE, {"data": {"streaming": True}}),
    "corruption": (BASE, {"data": {"max_corrupt": 1}}),
    "workers": (BASE, {"train": {"dataloader_num_workers": 7, "learning_rate": 3.0}}),
    "rows": (BASE, {}, {"rows": 48}),
    "other images": (BASE, {}, {"first": 1}),
    "row groups": (BASE, {}, {"groups": (20, 20)}),
    "batch": (BASE, {}, {"batch": 4}),
    "batch without lanes": (merged(BASE, {"data": {"lanes": 1}}, PLAIN), {}, {"batch": 4}),
    "lanes of one group": (merged(BASE, PLAIN), {"data": {"lanes": 3, "shuffle_block": 1}}, *[{"groups": (40,)}] * 2),
    "student's mean in a shared view": (BASE, {}, {"views": {**VIEWS, "student": Preprocessing(24, (0.1,) * 3)}}),
    "student's mean without noise": (
        merged(BASE, PLAIN), {}, {"views": {**VIEWS, "student": Preprocessing(24, (0.1,) * 3)}},
    ),
    "teacher's size": (BASE, {}, {"views": {**VIEWS, "teacher": Preprocessing(32)}}),
    "teacher's std": (BASE, {}, {"views": {**VIEWS, "teacher": Preprocessing(24, (0.5,) * 3, (0.1,) * 3)}}),
    "student's size": (BASE, {}, {"views": OTHER_SIZE}, {"views": {**OTHER_SIZE, "student": Preprocessing(20)}}),
    "student's size without boxes": (
        merged(BASE, PLAIN), {}, {"views": OTHER_SIZE}, {"views": {**OTHER_SIZE, "student": Preprocessing(20)}},
    ),
}  # fmt: skip


def a_view(blocks, rows=40, first=0, groups=(10, 10, 10, 10), batch=8, views=VIEWS, kind="PNG"):
    """What the manifest says of the images, and the pixels the teacher is shown at the first positions."""
    run = recipe("unused", *blocks)
    source = Pictures(rows, groups=groups if sum(groups) == rows else (rows // 4,) * 4)
    source.images = [encode(make_image(first + row), kind) for row in range(rows)]
    shown = shown_images("teacher", run, source, views, batch)
    args = {"per_device": batch, "seed": run.train.seed, "total_steps": 16 // batch}
    loader = train_loader(source, run.data, views, **args)
    stage = DeviceStage(views, 3)
    return shown, torch.cat([stage(part)[0]["teacher"] for part in loader])


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_the_pixels_and_nothing_else_is_compared(name):
    base, change, *rest = CHANGES[name]
    before, after = rest if len(rest) == 2 else ({}, rest[0] if rest else {})
    shown, pixels = a_view([base], **before)
    changed, other = a_view([base, change], **after)
    same_pixels = pixels.shape == other.shape and torch.allclose(pixels, other, atol=1e-5)
    assert (shown == changed) == same_pixels, [key for key in shown if shown[key] != changed[key]]


def test_what_a_recipe_asks_of_a_teacher():
    run = recipe("unused", {"teacher": TEACHER})
    asked = asked_for(run.teacher, TrainConfig(output_dir="x", bf16=True))
    assert (asked["dtype"], asked["model"], asked["mode"]) == ("bfloat16", "test_resnet", "eval")
    assert "gate" not in asked and "shard" not in asked


# --- a small store --------------------------------------------------------------------------------------------------

OPTIONS = {
    "teacher": TEACHER,
    "methods": {"kd": {"weight": 1.0}},
    "data": {"augment": {"mixup": 0.8, "erasing": 0.3}},
    "train": {"num_train_epochs": 2, "max_steps": None, "per_device_train_batch_size": 98},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two epochs of 1,078 digits, of ten classes the four likeliest."""
    folder = tmp_path_factory.mktemp("store") / "s"
    write_store(recipe("unused", OPTIONS), folder, top_k=4)
    return folder


def test_files_are_parquet_that_datasets_reads(store, tmp_path):
    found = datasets.load_dataset("parquet", data_files=str(store / "data/*.parquet"), split="train",
                                  cache_dir=str(tmp_path))  # fmt: skip
    manifest = open_store(str(store)).manifest
    assert len(found) == 2 * 1078 == sum(shard.rows for shard in manifest.shards)
    row = found[0]
    assert (type(row["key"]), len(row["teacher_values"]), len(row["teacher_classes"])) == (int, 8, 8)
    values = np.frombuffer(row["teacher_values"], np.float16)
    assert (np.diff(values) <= 0).all()
    footers = [pyarrow.parquet.read_metadata(path) for path in sorted((store / "data").iterdir())]
    assert [[footer.row_group(group).num_rows for group in range(footer.num_row_groups)] for footer in footers] == [
        [1000, 78]
    ] * 2
    assert footers[0].row_group(0).column(0).compression == "ZSTD"


def test_a_row_takes_410_bytes_at_most(tmp_path):
    from kd_hf.cache.files import PartFile

    rows, values = 3000, np.random.default_rng(0)
    logits = torch.from_numpy(values.normal(size=(rows, C)).astype(np.float32)) * 2
    kept, classes = log_probabilities(logits, 100)
    with PartFile(tmp_path / "x.parquet", 1000) as file:
        columns = {"t_values": kept.numpy(), "t_classes": classes.numpy().astype(np.uint16)}
        file.add({"key": values.integers(0, 1 << 32, rows, dtype=np.uint32), **columns})
    assert (tmp_path / "x.parquet").stat().st_size / rows <= 410


@pytest.mark.parametrize(("world", "rank", "accumulation"), [(1, 0, 1), (2, 1, 1), (2, 0, 3), (1, 0, 7)])
def test_any_rank_reads_its_own_positions(store, world, rank, accumulation):
    teacher = StoredTeacher.of("teacher", recipe("unused", OPTIONS).teacher, open_store(str(store)))
    whole = teacher.reader(Layout(98), 11, ()).rows
    layout = Layout(98 // world // accumulation, world, rank, accumulation)
    reader = teacher.reader(layout, 11, ())
    for micro in range(20 * accumulation, 22 * accumulation):
        epoch, start = layout.locate(micro, 11)
        expected = whole(epoch, 0, 1078)
        keys = torch.from_numpy(expected["key"][start : start + layout.per_device].astype(np.int64))
        logits = reader(micro, keys, torch.device("cpu")).logits
        rows = {key: value[start : start + layout.per_device] for key, value in expected.items()}
        assert logits.equal(reader.decode(rows, torch.device("cpu")).logits)
    with pytest.raises(UserError, match="was written for other images"):
        reader(0, keys, torch.device("cpu"))


def change_manifest(store, tmp_path, change):
    values = json.loads((store / "manifest.json").read_text())
    change(values)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    (tmp_path / "data").symlink_to(store / "data")
    return tmp_path


def test_what_is_no_store_is_named(store, tmp_path):
    for place, pattern in {
        str(tmp_path): "is no store: there is no manifest.json; `python -m kd_hf.cache RECIPE -o FOLDER` writes one",
        "/nowhere/x": "is no store",
        "user/name": "'user/name' is neither a folder nor a store on the Hub",
    }.items():
        with pytest.raises(UserError, match=pattern) as caught:
            open_store(place)
        assert "\n" not in str(caught.value)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(UserError, match="is unfinished; the command that began it"):
        open_store(str(tmp_path))
    for text, pattern in {"{": "is damaged", '{"format": 9}': "has format 9; this version reads 1"}.items():
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=pattern):
            open_store(str(tmp_path))


def test_a_damaged_file_is_named(store, tmp_path):
    folder = change_manifest(store, tmp_path, lambda values: values["teachers"]["teacher"].update(top_k=5))
    run = recipe("unused", OPTIONS)
    reader = StoredTeacher.of("teacher", run.teacher, open_store(str(folder))).reader(Layout(98), 11, ())
    with pytest.raises(UserError, match=r"teacher\.store: a row has another length than the manifest says"):
        reader(0, torch.zeros(98, dtype=torch.int64), torch.device("cpu"))
    (folder / "data").unlink()
    with pytest.raises(UserError, match=r"teacher\.store: cannot read the Parquet file .*epoch0000-0000\.parquet"):
        StoredTeacher.of("teacher", run.teacher, open_store(str(folder))).reader(Layout(98), 11, ()).rows(0, 0, 2)


def test_several_teachers_are_found_by_name(store, tmp_path):
    def add(values):
        values["teachers"]["other"] = values["teachers"]["teacher"]

    cfg, other = recipe("unused", OPTIONS).teacher, change_manifest(store, tmp_path, add)
    assert StoredTeacher.of("mine", cfg, open_store(str(store))).column == "teacher"
    assert StoredTeacher.of("other", cfg, open_store(str(other))).column == "other"
    with pytest.raises(UserError, match="holds the teachers teacher, other, and no 'mine'"):
        StoredTeacher.of("mine", cfg, open_store(str(other)))


def test_no_key_of_the_augmentation_is_forgotten():
    shown = shown_images("teacher", recipe("unused", BASE), Pictures(40), VIEWS, 8)
    compared = {key.removeprefix("data.augment.") for key in shown if key.startswith("data.augment.")}
    assert AugmentConfig.model_fields.keys() <= compared
