"""Images of one red, one green and one blue rectangle, as files of every layout, and a detector that finds them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from kd_hf.detection.data.objects import make_objects
from kd_hf.detection.data.source import BoxSource
from kd_hf.draws import generator
from kd_hf.info import Preprocessing

NAMES = ("red", "green", "blue")
VIEW = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


@dataclass
class Scene:
    """Boxes are left, top, width and height; the class of each is its colour."""

    image: Image.Image
    boxes: list[list[int]] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    iscrowd: list[int] = field(default_factory=list)

    @property
    def data(self):
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()

    def objects(self, image_id=0):
        return make_objects(self.boxes, self.classes, None, self.iscrowd, image_id, self.image.size)


def draw(size, boxes, classes, iscrowd=None):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for (left, top, width, height), colour in zip(boxes, classes, strict=True):
        pixels[top : top + height, left : left + width, colour] = 255
    return Scene(Image.fromarray(pixels), boxes, classes, iscrowd or [0] * len(boxes))


def scene(index, least=20):
    """Every fourth image is empty; sizes and places differ."""
    draws = generator("scene", index)
    width, height = (int(side) for side in draws.integers(60, 121, 2))
    boxes = []
    for _ in range(index % 4):
        w, h = int(draws.integers(least, width)), int(draws.integers(least, height))
        boxes.append([int(draws.integers(0, width - w + 1)), int(draws.integers(0, height - h + 1)), w, h])
    return draw((width, height), boxes, list(range(len(boxes))))


class Scenes(BoxSource):
    """Scenes in memory; some rows hold bytes that are no image."""

    def __init__(self, rows=24, damaged=(), groups=None):
        self.class_names, self.group_sizes = NAMES, groups or (rows,)
        self.scenes = [scene(row) for row in range(rows)]
        self.damaged = damaged

    def read(self, row):
        data = self.scenes[row].data
        return data[:40] if row in self.damaged else data, self.scenes[row].objects(1000 + row)

    def annotations(self):
        return (found.objects(1000 + row) for row, found in enumerate(self.scenes))

    def describe(self):
        return "scenes"


def write_parquet(path, scenes, row_group=4, names=NAMES, start=0, box_format="xywh", **extra):
    """As `datasets` writes it: a struct of lists in the column of the objects."""
    import datasets

    def cells(found):
        boxes = [
            [
                float(x),
                float(y),
                float(x + w if box_format == "xyxy" else w),
                float(y + h if box_format == "xyxy" else h),
            ]
            for x, y, w, h in found.boxes
        ]
        area = [float(w * h) for _, _, w, h in found.boxes]
        return {"bbox": boxes, "category": found.classes, "area": area, "iscrowd": found.iscrowd}

    category = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = {
        "image_id": datasets.Value("int64"),
        "image": datasets.Image(),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(category),
            "area": datasets.List(datasets.Value("float32")),
            "iscrowd": datasets.List(datasets.Value("int8")),
        },
    }
    columns = {
        "image_id": [start + row for row in range(len(scenes))],
        "image": [{"bytes": found.data, "path": None} for found in scenes],
        "width": [found.image.width for found in scenes],
        "height": [found.image.height for found in scenes],
        "objects": [cells(found) for found in scenes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(path, batch_size=row_group)
    return dataset


def coco_json(scenes, ids=(1, 2, 4), start=500):
    """What COCO's JSON says of scenes, whose colours have the numbers `ids`."""
    images = [
        {"id": start + row, "file_name": f"{start + row:012d}.png", "width": s.image.width, "height": s.image.height}
        for row, s in enumerate(scenes)
    ]
    annotations = [
        {"id": 0, "image_id": start + row, "category_id": ids[colour], "bbox": box, "area": box[2] * box[3],
         "iscrowd": crowd, "segmentation": [[1.0] * 8]}
        for row, s in enumerate(scenes)
        for box, colour, crowd in zip(s.boxes, s.classes, s.iscrowd, strict=True)
    ]  # fmt: skip
    for number, entry in enumerate(annotations, 1):
        entry["id"] = number
    categories = [{"id": number, "name": name} for number, name in zip(ids, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root, scenes, split="train2017", change=None, **options):
    """COCO's own layout; `change` is called with the JSON before it is written."""
    found = coco_json(scenes, **options)
    (root / split).mkdir(parents=True)
    for entry, drawn in zip(found["images"], scenes, strict=True):
        (root / split / entry["file_name"]).write_bytes(drawn.data)
    if change:
        change(found)
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(found))
    return root


class Colours(nn.Module):
    """Finds where each colour is: a query and a class for each; `extra` adds "no object" to the classes."""

    def __init__(self, extra=False, noise=0.0):
        super().__init__()
        self.extra, self.noise = extra, noise
        self.info = SimpleNamespace(preprocessing=VIEW, num_classes=3)

    def forward(self, images):
        lit = images.pixels > 0  # [B, 3, H, W]
        height, width = (~images.mask).any(2).sum(1), (~images.mask).any(1).sum(1)
        boxes = torch.zeros(len(lit), 3, 4)
        logits = torch.full((len(lit), 3, 3 + self.extra), -6.0)
        for image in range(len(lit)):
            for colour in range(3):
                y, x = (lit[image, colour].any(axis).nonzero()[:, 0] for axis in (1, 0))
                if not len(y):
                    logits[image, colour, -1] = 6.0 if self.extra else -6.0
                    continue
                left, right = x[0] / width[image], (x[-1] + 1) / width[image]
                top, bottom = y[0] / height[image], (y[-1] + 1) / height[image]
                left, right = left + self.noise * colour, right + self.noise * colour
                boxes[image, colour] = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
                logits[image, colour, colour] = 6.0 - colour
        return SimpleNamespace(logits=logits, boxes=boxes)
