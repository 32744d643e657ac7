import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from kd_hf.data.opening import open_source
from kd_hf.data.tars import members
from kd_hf.errors import UserError
from kd_hf.recipe.config import DataConfig
from tests.data.conftest import contents, encode, make_image, refused, write_tar


def samples(count, label=None, start=0, **more):
    """Pictures with a `cls` file, or with the files that `label` gives for a number."""
    label = label or (lambda i: {"cls": str(i % 3)})
    return {f"{i:05d}": {"png": encode(make_image(i)), **label(i), **more} for i in range(start, start + count)}


def tars(root, label=None, shards=((0, 7), (7, 5)), evaluation=4):
    for number, (start, count) in enumerate(shards):
        write_tar(root / f"train-{number:03d}.tar", samples(count, label, start))
    write_tar(root / "validation-000.tar", samples(evaluation, label, 100))
    return DataConfig(path=str(root))


def expected(start, stop):
    return [(encode(make_image(i)), i % 3) for i in range(start, stop)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "label",
    [
        lambda i: {"cls": f"{i % 3}\n"},
        lambda i: {"json": {"label": i % 3, "width": 3}},
        lambda i: {"json": {"cls": str(i % 3)}},
        lambda i: {"cls": ["n01", "n02", "n05"][i % 3]},
        lambda i: {"json": {"label": ["ant", "bee", "cat"][i % 3]}, "txt": "a caption"},
    ],
    ids=["cls", "json label", "json cls", "names", "json names"],
)
def test_tar_files(tmp_path, label, streaming):
    cfg = tars(tmp_path, label).model_copy(update={"streaming": streaming})
    train, evaluation = open_source(cfg, "train"), open_source(cfg, "eval")
    assert contents(train) == expected(0, 12)
    assert contents(evaluation) == expected(100, 104)
    assert train.labels().tolist() == [i % 3 for i in range(12)]
    assert train.class_names == evaluation.class_names and train.num_classes == 3
    assert pickle.loads(pickle.dumps(train)).read(9) == train.read(9)
    assert "split train (12 images in 2 tar files, 3 classes)" in train.describe()


def test_groups_are_runs_within_a_tar_file(tmp_path):
    one = encode(make_image(0, 4, 4))
    for number, count in enumerate((250, 100, 7)):
        write_tar(tmp_path / f"train-{number}.tar", {f"{i}": {"png": one, "cls": "0"} for i in range(count)})
    assert open_source(DataConfig(path=str(tmp_path)), "train").group_sizes == (83, 83, 84, 100, 7)


def test_splits_by_folder_and_by_pattern(tmp_path):
    write_tar(tmp_path / "a/train/x.tar", samples(4))
    write_tar(tmp_path / "a/val/x.tar", samples(3))
    cfg = DataConfig(path=str(tmp_path / "a"))
    assert (len(open_source(cfg, "train")), len(open_source(cfg, "eval"))) == (4, 3)
    write_tar(tmp_path / "b/some.tar", samples(4))
    write_tar(tmp_path / "b/other.tar", samples(2))
    files = {"train": "some.tar", "held_out": "oth*.tar"}
    cfg = DataConfig(path=str(tmp_path / "b"), data_files=files, eval_split="held_out")
    assert (len(open_source(cfg, "train")), len(open_source(cfg, "eval"))) == (4, 2)


def test_the_same_samples_as_datasets_reads(tmp_path):
    import datasets

    cfg = tars(tmp_path)
    table = datasets.load_dataset(str(tmp_path), split="train").cast_column("png", datasets.Image(decode=False))
    found = [(row["png"]["bytes"], int(row["cls"])) for row in table]
    assert found == contents(open_source(cfg, "train"))


def test_columns_name_suffixes_and_keys(tmp_path):
    def label(i):
        return {"seg.png": encode(make_image(i + 50)), "json": {"kind": i % 3, "label": 0}, "id": str(i % 2)}

    cfg = tars(tmp_path, label)
    refused(cfg, r"data.image_column: sample '00000' of .*train-000.tar has several files .*\.png, \.seg\.png")
    cfg = cfg.model_copy(update={"image_column": "seg.png"})
    assert open_source(cfg, "train").read(5) == (encode(make_image(55)), 0)
    kind = cfg.model_copy(update={"image_column": ".PNG", "label_column": "kind"})
    assert contents(open_source(kind, "train")) == expected(0, 12)
    by_file = cfg.model_copy(update={"label_column": "id"})
    assert open_source(by_file, "train").labels().tolist() == [i % 2 for i in range(12)]
    refused(cfg.model_copy(update={"label_column": "kinds"}), r"\.json file of sample .* has no 'kinds'.*'kind'")
    refused(cfg.model_copy(update={"image_column": "jpg"}), r"data.image_column: .* has no image file")


def test_samples_without_label_count_as_unlabelled(tmp_path):
    cfg = tars(tmp_path, lambda i: {"json": {"label": None if i % 2 else i % 3}})
    assert open_source(cfg, "train").labels().tolist() == [-1 if i % 2 else i % 3 for i in range(12)]
    assert len(open_source(cfg.model_copy(update={"unlabelled": "drop"}), "train")) == 6


def test_classes_are_those_of_the_training_split(tmp_path):
    write_tar(tmp_path / "val.tar", samples(2, lambda i: {"cls": ["bee", "cat"][i]}))
    cfg = DataConfig(path=str(tmp_path))
    assert open_source(cfg, "eval").class_names == ("bee", "cat")  # without one, its own
    write_tar(tmp_path / "train.tar", samples(3, lambda i: {"cls": ["ant", "bee", "cat"][i]}))
    evaluation = open_source(cfg, "eval")
    assert evaluation.class_names == ("ant", "bee", "cat") and evaluation.labels().tolist() == [1, 2]
    write_tar(tmp_path / "val.tar", samples(1, lambda i: {"cls": "dog"}))
    refused(cfg, r"split validation has the label 'dog', and there is no such class. Known: ant, bee, cat", "eval")
    write_tar(tmp_path / "train.tar", samples(3))
    write_tar(tmp_path / "val.tar", samples(2))
    assert open_source(cfg, "eval").class_names == ("0", "1", "2")
    write_tar(tmp_path / "val.tar", samples(1, lambda i: {"cls": "3"}))
    refused(cfg, r"split validation has the label 3, but only 3 classes", "eval")


# one sample, and what is said about it
MISTAKES = {
    "no image": ({"txt": "a", "cls": "0"}, r"data.image_column: sample 'x' of .* has no image file .*\.txt, \.cls"),
    "no label": ({"png": b"x", "txt": "a"}, r"data.label_column: sample 'x' of .* has no label .*\.cls"),
    "empty label": ({"png": b"x", "cls": " \n"}, r"data.label_column: sample 'x' of .* has the label ''"),
    "list as label": ({"png": b"x", "json": {"label": [1]}}, r"has the label \[1\], expected a number or a name"),
    "negative label": ({"png": b"x", "cls": "-3"}, r"data.label_column: .* has the label -3; expected 0, 1"),
    "broken JSON": ({"png": b"x", "json": "{"}, r"the \.json file of sample 'x' of .* is not valid"),
    "JSON without a label": ({"png": b"x", "json": {"lable": 1}}, r"has no 'label'. Did you mean 'lable'"),
    "JSON that is a list": ({"png": b"x", "json": [1]}, r"has no 'label'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_samples_that_lack_something(tmp_path, case):
    files, pattern = MISTAKES[case]
    write_tar(tmp_path / "train.tar", {"x": files})
    refused(DataConfig(path=str(tmp_path)), pattern)


def test_one_file_twice(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a/x.png"))
    refused(DataConfig(path=str(tmp_path)), r"data.path: .*train.tar has two files 'a/x.png'")


def test_damaged_tar_files(tmp_path):
    cfg = tars(tmp_path)
    path = tmp_path / "train-001.tar"
    whole = path.read_bytes()
    (size,) = {member.offset + member.size for member in members(str(path)) if member.name == "00011.png"}
    for length in (0, 300, 512, 1000, size, size - 1):
        path.write_bytes(whole[:length])
        refused(cfg, r"data.path: the tar file .*train-001.tar is truncated")
    path.write_bytes(b"\x1f\x8b" + whole[2:257] + b"x" + whole[258:])
    refused(cfg, r"data.path: .*train-001.tar is not a tar file, or damaged at byte 0")
    path.write_bytes(whole[:124] + b"99999999999 " + whole[136:])
    refused(cfg, r"is not a tar file, or damaged at byte 0")
    path.write_bytes(bytes(1024))
    assert len(open_source(cfg, "train")) == 7
    (tmp_path / "train-000.tar").write_bytes(bytes(1024))
    refused(cfg, r"data.path: no images in ")


def test_a_tar_file_that_is_lost_later(tmp_path):
    source = open_source(tars(tmp_path), "train")
    path = tmp_path / "train-001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    source.read(0)
    advice = "once it can be read, the same command continues the run from its last checkpoint"
    with pytest.raises(UserError, match=rf"data.path: the tar file .*train-001.tar has become shorter; {advice}"):
        source.read(11)
    path.unlink()
    with pytest.raises(UserError, match=rf"cannot read the tar file .*train-001.tar: No such file .*; {advice}"):
        source.read(11)


# --- the tar format


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, form):
    long = "/".join(["folder"] * 12) + "/x.png" if form == tarfile.USTAR_FORMAT else "f" * 180 + "/é.png"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, size in [
            ("plain.png", tarfile.REGTYPE, 700),
            ("folder.png", tarfile.DIRTYPE, 0),
            (long, tarfile.REGTYPE, 512),
            ("link.png", tarfile.SYMTYPE, 0),
            ("old.png", tarfile.AREGTYPE, 0),
            ("last.png", tarfile.REGTYPE, 1),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.mtime, member.linkname = kind, size, 1.5, "l" * 120 if kind == b"2" else ""
            if form == tarfile.USTAR_FORMAT:
                member.mtime, member.linkname = 1, "plain.png"
            tar.addfile(member, fileobj=io.BytesIO(bytes(size)))
    with tarfile.open(path) as tar:
        known = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in members(str(path))] == known
    assert len(known) == 4


def test_sizes_in_binary_and_headers_without_a_mark(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a": {"png": b"12345"}})
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    path.write_bytes(data)
    assert [m.size for m in members(str(path))] == [5]
    data[257:265] = bytes(8)
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    assert [m.name for m in members(str(path))] == ["a.png"]


def test_files_need_not_be_side_by_side(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for suffix in ("png", "cls"):
            for i in range(4):
                file = tmp_path / f"{i}.{suffix}"
                file.write_bytes(encode(make_image(i)) if suffix == "png" else str(i % 3).encode())
                tar.add(file, f"folder/{i}.{suffix}")
        tar.addfile(tarfile.TarInfo("folder/._0.png"))
        tar.addfile(tarfile.TarInfo(".DS_Store"))
    assert contents(open_source(DataConfig(path=str(tmp_path)), "train")) == expected(0, 4)


def test_reading_headers_leaves_the_images_alone(tmp_path, monkeypatch):
    import os

    cfg = tars(tmp_path)
    read = []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or original(fd, size, offset))
    source = open_source(cfg, "train")
    assert max(read) == 512 and np.sum(read) < 12 * 2 * 600 + 2 * 512
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError):
        source.read(0)
