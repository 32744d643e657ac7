"""The programs of a card: whole ones, around a line that loads the student."""

from __future__ import annotations

from dataclasses import dataclass

_TIMM = """\
import timm
import torch
from PIL import Image

{load}
model.eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.jpg").convert("RGB")
with torch.no_grad():
    probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]
index = probabilities.argmax().item()
print({label}, f"{{probabilities[index]:.3f}}")
"""
_TRANSFORMERS = """\
import torch
import transformers
from PIL import Image

{load}
processor = transformers.AutoImageProcessor.from_pretrained({place})
image = Image.open("image.jpg").convert("RGB")
with torch.no_grad():
    probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
index = probabilities.argmax().item()
print(model.config.id2label[index], f"{{probabilities[index]:.3f}}")
"""
_DETECTOR = """\
import torch
import transformers
from PIL import Image

{load}
processor = transformers.AutoImageProcessor.from_pretrained({place}{trust})
image = Image.open("image.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
sizes = [(image.height, image.width)]
found = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes)[0]
for score, index, box in zip(found["scores"], found["labels"], found["boxes"]):
    left, top, right, bottom = box.tolist()
    print(model.config.id2label[index.item()], f"{{score:.3f}} {{left:.0f}} {{top:.0f}} {{right:.0f}} {{bottom:.0f}}")
"""
# how a loading line begins → the library's name, and a program around that line
_PROGRAMS = {
    "model = timm.": ("timm", _TIMM),
    "model = transformers.AutoModelForImageClassification.": ("transformers", _TRANSFORMERS),
    "model = transformers.AutoModelForObjectDetection.": ("transformers", _DETECTOR),
}
_TRUST = ", trust_remote_code=True"


@dataclass(frozen=True)
class Program:
    """A program, the library it is for, and whether it runs code of the repository."""

    library: str
    text: str
    trusts: bool


def program(load: str, place: str, label: str) -> Program | None:
    """The program around a loading line; None for a line of another kind.

    Args:
        load: the line.
        place: where the student lies, as Python.
        label: the class of number ``index``, as Python; for timm, which does not know it.
    """
    known = next((known for start, known in _PROGRAMS.items() if load.startswith(start)), None)
    if known is None:
        return None
    library, text = known
    trusts = _TRUST in load
    return Program(library, text.format(load=load, place=place, label=label, trust=_TRUST if trusts else ""), trusts)
