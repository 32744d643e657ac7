import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kd_hf.errors import UserError
from kd_hf.hub.artefact import save_student
from kd_hf.models.load import load_model
from kd_hf.models.safetensors import write_safetensors
from tests.models.families import HF_LEVELS, HF_SWIN, HF_TWO_HEADS, HF_VIT, SWIN, VIT

NAMES = ("ant", "bee", "cat", "dog", "eel")
STUDENTS = {
    "resnet": ("test_resnet", {}, 32),
    "vit": ("vit_tiny_patch16_224", VIT, 32),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 48),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 64),
    "hf-vit": ("transformers/vit", HF_VIT, 32),
    "hf-resnet": ("transformers/resnet", {**HF_LEVELS, "embedding_size": 16}, 32),
    "hf-swin": ("transformers/swin", HF_SWIN, 32),
    "hf-two-heads": ("transformers/deit", HF_TWO_HEADS, 32),
}
# runs without this package: the two libraries alone must be able to read every folder
READER = """
import sys
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

for folder in sorted(Path(sys.argv[2], "students").iterdir()):
    pixels = load_file(f"pixels/{folder.name}.safetensors")["pixels"]
    with torch.no_grad():
        if sys.argv[1] == "timm":
            import timm
            if folder.name.startswith("hf-"):
                continue
            logits = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels)
        else:
            from transformers import AutoImageProcessor, AutoModelForImageClassification
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            assert list(model.config.id2label.values()) == ["ant", "bee", "cat", "dog", "eel"]
            image = Image.new("RGB", (100, 80))
            prepared = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
            assert prepared.shape[2:] == pixels.shape[2:], prepared.shape
            logits = model(pixels).logits
    save_file({"logits": logits.contiguous()}, f"by_{sys.argv[1]}/{folder.name}.safetensors")
assert "kd_hf" not in sys.modules
"""


def build(key):
    model, kwargs, size = STUDENTS[key]
    handle = load_model(model, num_classes=5, image_size=size, kwargs=kwargs)
    handle.label_names = NAMES
    with torch.no_grad():  # BatchNorm statistics and heads that are not their initial values
        for tensor in handle.network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return handle


def pixels_for(handle):
    size = handle.info.preprocessing.image_size
    return torch.randn(2, 3, size, size)


def logits_of(handle, pixels):
    with torch.no_grad():
        output = handle.network.eval()(pixels)
    return getattr(output, "logits", output)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """Every student, saved, with the logits that its network gave in memory, and read back by both libraries."""
    torch.manual_seed(0)
    root, expected = tmp_path_factory.mktemp("artefacts"), {}
    for key in STUDENTS:
        handle = build(key)
        pixels = pixels_for(handle)
        save_student(handle, root / "students" / key)
        (root / "pixels").mkdir(exist_ok=True)
        save_file({"pixels": pixels}, root / "pixels" / f"{key}.safetensors")
        expected[key] = (handle, pixels, logits_of(handle, pixels))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for library in ("timm", "transformers"):
        (root / f"by_{library}").mkdir()
        command = [sys.executable, "-c", textwrap.dedent(READER), library, str(root)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return root, expected


@pytest.mark.parametrize("key", [key for key in STUDENTS if not key.startswith("hf-")])
def test_timm_reads_the_artefact_to_the_bit(artefacts, key):
    root, expected = artefacts
    assert torch.equal(load_file(root / "by_timm" / f"{key}.safetensors")["logits"], expected[key][2])


@pytest.mark.parametrize("key", STUDENTS)
def test_transformers_reads_the_artefact_to_the_bit(artefacts, key):
    root, expected = artefacts
    assert torch.equal(load_file(root / "by_transformers" / f"{key}.safetensors")["logits"], expected[key][2])


@pytest.mark.parametrize("key", STUDENTS)
def test_load_model_reads_it_back(artefacts, key):
    root, expected = artefacts
    made, pixels, logits = expected[key]
    handle = load_model(str(root / "students" / key), pretrained=True)
    assert torch.equal(logits_of(handle, pixels), logits)
    assert handle.info.preprocessing == made.info.preprocessing
    assert handle.label_names == NAMES
    assert (handle.info.stages, handle.info.blocks, handle.info.head) == (
        made.info.stages,
        made.info.blocks,
        made.info.head,
    )


def test_the_timm_folder(artefacts):
    root, expected = artefacts
    config = json.loads((root / "students" / "vit" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["num_classes"] == 5
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["depth"] == 3 and config["model_args"]["img_size"] == [32, 32]
    facts = expected["vit"][0].info.preprocessing
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == list(facts.mean)
    assert config["pretrained_cfg"]["crop_pct"] == facts.crop_pct
    assert config["label_names"] == list(NAMES) and config["label_descriptions"]["bee"] == "bee"
    with safe_open(root / "students" / "vit" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(expected["vit"][0].network.state_dict())
    assert not list((root / "students" / "vit").glob("*.bin"))


def test_safetensors_are_aligned_and_read_by_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "a.bias": torch.randn(5),
        "b.weight": torch.randn(5, 32).to(torch.bfloat16),
        "c.count": torch.tensor(7),
        "d.mask": torch.tensor([True, False, True]),
        "e.weight": torch.randn(3, 16, 2, 2).to(memory_format=torch.channels_last),
        "f.none": torch.zeros(0, 4),
        "g.half": torch.randn(3).half(),
        "h.double": torch.randn(3).double(),
    }
    write_safetensors(path, tensors)
    written = load_file(path)
    assert written.keys() == tensors.keys()
    assert all(
        torch.equal(written[name], value) and written[name].dtype == value.dtype for name, value in tensors.items()
    )
    for value in written.values():
        assert value.data_ptr() % min(64, value.nbytes & -value.nbytes or 1) == 0


def test_imagenet_classes_get_their_words(tmp_path):
    handle = load_model("test_resnet", num_classes=2)
    handle.label_names = ("n01440764", "n01443537")
    save_student(handle, tmp_path / "student")
    words = json.loads((tmp_path / "student" / "config.json").read_text())["label_descriptions"]
    assert words == {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


@pytest.mark.parametrize("key", ["resnet", "hf-vit"])
def test_other_weights_for_the_same_network(tmp_path, key):
    handle = build(key)
    before = {name: value.clone() for name, value in handle.network.state_dict().items()}
    other = {name: value + 1 for name, value in before.items()}
    save_student(handle, tmp_path / "student", state_dict=other)
    written = load_model(str(tmp_path), pretrained=True).network.state_dict()
    assert all(torch.equal(written[name], value) for name, value in other.items())
    assert all(torch.equal(before[name], value) for name, value in handle.network.state_dict().items())
    with pytest.raises(ValueError, match="does not fit"):
        save_student(handle, tmp_path / "student", state_dict={"network.fc.weight": torch.zeros(1)})


def test_channels_last_and_shared_tensors(tmp_path):
    handle = build("resnet")
    handle.network.to(memory_format=torch.channels_last)
    weights = handle.network.state_dict()
    weights["layer1.0.bn1.bias"] = weights["layer1.0.bn1.weight"]
    save_student(handle, tmp_path / "student", state_dict=weights)
    written = load_file(tmp_path / "student" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in weights.items())


def test_extra_files_are_written_and_stay(tmp_path):
    handle = build("resnet")
    save_student(handle, tmp_path / "student", extra_files={"README.md": "# é", "data/recipe.yaml": "a: 1"})
    assert (tmp_path / "student" / "README.md").read_text(encoding="utf-8") == "# é"
    assert (tmp_path / "student" / "data" / "recipe.yaml").read_text() == "a: 1"
    save_student(handle, tmp_path / "student")
    names = sorted(path.name for path in (tmp_path / "student").iterdir())
    assert names == ["README.md", "config.json", "data", "model.safetensors"]  # somebody may have changed them
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_failed_save_leaves_the_old_artefact(tmp_path):
    handle = build("resnet")
    save_student(handle, tmp_path / "student")
    before = (tmp_path / "student" / "config.json").read_bytes()
    with pytest.raises(TypeError):
        save_student(handle, tmp_path / "student", extra_files={"README.md": 3})
    assert (tmp_path / "student" / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*student: (Not a directory|File exists)"):
        save_student(build("resnet"), tmp_path / "file" / "student")
