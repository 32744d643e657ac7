import argparse
import os
import pickle
import sys
import tarfile
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kd_hf.convert.reading import Inert, read_checkpoint
from kd_hf.errors import UserError

WEIGHTS = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(3), c=torch.ones(2, dtype=torch.bfloat16))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def framework(monkeypatch):
    """A module that exists while the checkpoint is written, with the kinds of objects that frameworks put in."""
    module = types.ModuleType("other_framework")

    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = [1.0], {"mean": HistoryBuffer.mean}

        def mean(self):
            return 0.0

    class Config(dict):
        pass

    class Levels(list):
        pass

    class Names(set):
        pass

    class Stated:
        def __getstate__(self):
            return (1, 2)

        def __setstate__(self, state):
            raise AssertionError("ran")

    for kind in (HistoryBuffer, Config, Levels, Names, Stated):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def same(found):
    assert list(found) == list(WEIGHTS)
    return all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in WEIGHTS.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_and_containers(tmp_path, zipped, protocol):
    held = {"model": WEIGHTS, "epoch": 3, "lr": [0.1, None], "size": torch.Size([2]), "args": argparse.Namespace(a=1)}
    held["parameter"] = torch.nn.Parameter(torch.ones(2))
    path = tmp_path / "x.pth"
    torch.save(held, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_checkpoint(path)
    assert same(found.entries["model"])
    assert torch.equal(found.entries["parameter"], torch.ones(2))
    assert (found.entries["epoch"], found.entries["lr"]) == (3, [0.1, None])
    assert isinstance(found.entries["args"], Inert)
    assert found.foreign == ("argparse.Namespace",)


def test_safetensors(tmp_path):
    save_file(dict(WEIGHTS), tmp_path / "model.safetensors")
    found = read_checkpoint(tmp_path / "model.safetensors")
    assert {name: value.tolist() for name, value in found.entries.items()} == {
        name: value.tolist() for name, value in WEIGHTS.items()
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_a_framework(tmp_path, framework, monkeypatch, zipped):
    config = framework.Config(a=1)
    config.name = "x"
    others = [framework.HistoryBuffer(), config, framework.Levels([1, 2]), framework.Names({1}), framework.Stated()]
    path = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": WEIGHTS, "hub": others}, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, framework.__name__)
    (tmp_path / f"{framework.__name__}.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = read_checkpoint(path)
    assert same(found.entries["state_dict"])
    assert all(isinstance(other, Inert) for other in found.entries["hub"])
    assert {f"{framework.__name__}.{kind}" for kind in ("Config", "HistoryBuffer", "Levels", "Names", "Stated")} < set(
        found.foreign
    )
    assert framework.__name__ not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_does_not_run(tmp_path, zipped):
    evidence = tmp_path / "evidence"
    attacks = [
        Call(os.system, f"touch {evidence}"),
        Call(eval, f"open({str(evidence)!r}, 'w')"),
        Call(Path.touch, evidence),
        Call(os.mkdir, str(evidence)),
    ]
    path = tmp_path / "x.pth"
    torch.save({"state_dict": WEIGHTS, "more": attacks}, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert not evidence.exists()
    assert same(found.entries["state_dict"])
    assert {f"{os.name}.system", f"{os.name}.mkdir"} < set(found.foreign)
    torch.save(attacks[0], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"no checkpoint: expected a dict of weights \(found {os.name}\.system, not"):
        read_checkpoint(path)
    assert not evidence.exists()
    pickle.loads(pickle.dumps(attacks[-1]))  # the attack itself works
    assert evidence.exists()


def test_an_archive_of_checkpoints(tmp_path):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "x.pth", "x.pth")
    with pytest.raises(UserError, match="is a tar archive"):
        read_checkpoint(tmp_path / "x.tar")


def test_a_program_is_not_loaded(tmp_path):
    path = tmp_path / "x.pt"
    program = torch._C.PyTorchFileWriter(str(path))  # such an archive, without a compiler
    program.write_record("constants.pkl", b"x", 1)
    program.write_end_of_file()
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x80\x04.", b"PK\x03\x04 cut", b"version https://git-lfs"])
def test_no_checkpoint(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth' cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_something_else_that_torch_saved(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torch.ones(2), path)
    with pytest.raises(UserError, match=r"x\.pth' is no checkpoint: .* \(found a Tensor\)"):
        read_checkpoint(path)


def test_a_cut_file(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": WEIGHTS}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x\.pth' cannot be read as a checkpoint"):
        read_checkpoint(path)


def test_no_file(tmp_path):
    (tmp_path / "deit_tiny.pth").touch()
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'deit_tiny\.pth'\?"):
        read_checkpoint(tmp_path / "diet_tiny.pth")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"does not exist\.$"):
        read_checkpoint(tmp_path / "nowhere" / "x.pth")
