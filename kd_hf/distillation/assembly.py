"""From a recipe to built parts: networks with their taps, methods, the module that is trained. No data is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from kd_hf.data.views import with_strong
from kd_hf.distillation.choices import Choice, check_methods, choose_methods, taps_of
from kd_hf.distillation.module import DistillModule, build_methods
from kd_hf.draws import hash_key
from kd_hf.errors import UserError
from kd_hf.info import ModelInfo, Preprocessing, Samples, Shapes
from kd_hf.models.handle import ModelHandle
from kd_hf.models.parts import live_part
from kd_hf.models.recompute import enable_checkpointing
from kd_hf.models.taps import Tapped
from kd_hf.recipe.config import ModelConfig, Recipe, StudentConfig, TeacherConfig
from kd_hf.recipe.variants import GIVEN_NETWORK
from kd_hf.store.reader import StoredTeacher
from kd_hf.tasks import open_task
from kd_hf.tasks.base import Task


@dataclass
class Assembly:
    """Everything a recipe names, built. `module` is what is trained; `teachers` are networks only."""

    recipe: Recipe
    student: ModelHandle
    teachers: dict[str, ModelHandle]
    tapped_teachers: dict[str, Tapped]
    choices: tuple[Choice, ...]
    module: DistillModule
    task: Task
    shapes: dict[str, Shapes]  # by model name ("student" or the teacher's), taps by tap name
    stored: dict[str, StoredTeacher] = field(default_factory=dict)  # teachers of which only the outputs are there

    def views(self, stored: bool = False) -> dict[str, Preprocessing]:
        """How each network's training view looks, by model name; the student comes first.

        Args:
            stored: add what stored teachers were shown.
        """
        infos = {name: handle.info for name, handle in {"student": self.student, **self.teachers}.items()}
        if stored:
            infos |= {name: teacher.info for name, teacher in self.stored.items()}
        order = [name for name in ("student", *self.recipe.all_teachers()) if name in infos]
        return {name: view_of(infos[name], self.config_of(name), self.recipe) for name in order}

    def shown(self) -> dict[str, Preprocessing]:
        """The views of a training step: those of all networks, twice where a loss compares two of each image."""
        return with_strong(self.views()) if self.needs_strong else self.views()

    @property
    def needs_strong(self) -> bool:
        """Whether a method looks at a second, strongly augmented view of every image."""
        return any(choice.needs.strong for choice in self.choices)

    def config_of(self, name: str) -> ModelConfig:
        """The recipe's block of a network."""
        return self.recipe.student if name == "student" else self.recipe.all_teachers()[name]


def view_of(info: ModelInfo, cfg: ModelConfig, recipe: Recipe) -> Preprocessing:
    """The view training feeds a network: its own preprocessing at the size the recipe gives."""
    return replace(info.preprocessing, image_size=_image_size(cfg, recipe) or info.preprocessing.image_size)


def _image_size(cfg: ModelConfig, recipe: Recipe) -> int | None:
    return cfg.image_size or recipe.data.image_size


def assemble(
    recipe: Recipe,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
    given: Mapping[str, ModelHandle] | None = None,
    samples: Samples | None = None,
    task: Task | None = None,
) -> Assembly:
    """Build networks and methods.

    Args:
        recipe: the run; teachers given by `recipe:` must have been resolved to folders.
        num_classes: classes of the data, for the student's head; the student's own when None.
        device: "meta" builds shapes only, without memory or weights.
        given: networks that exist already, by name; the recipe's block of one says only how it is used.
        samples: the training images, for methods that keep something of each; without, such a method cannot train.
        task: the recipe's, where it is open already.
    """
    seed, task = recipe.train.seed, task or open_task(recipe)
    torch.manual_seed(hash_key(seed, "student") & 0x7FFFFFFFFFFFFFFF)
    alive = given or {}
    classes = recipe.student.num_classes or num_classes
    student = alive.get("student") or load_network(recipe.student, task, classes, device)
    blocks = recipe.all_teachers()
    stored = {name: StoredTeacher.open(name, cfg) for name, cfg in blocks.items() if cfg.store}
    teachers = {
        name: alive.get(name) or load_network(cfg, task, cfg.num_classes, device)
        for name, cfg in blocks.items()
        if name not in stored
    }
    infos = {name: (stored.get(name) or teachers[name]).info for name in blocks}
    choices = choose_methods(task, student.info, infos)
    check_methods(choices, stored)
    dist_head = any(choice.needs.dist_head for choice in choices)
    tapped = task.tapped(student, student.info, taps_of(choices), dist_head)
    shapes = {"student": _shapes(tapped, student.info, recipe.student, task)}
    shapes |= {name: teacher.shapes for name, teacher in stored.items()}
    parts: dict[str, Mapping[str, nn.Module]] = {name: {} for name in stored}
    tapped_teachers = {}
    for name, handle in teachers.items():
        tapped_teachers[name] = task.tapped(handle, handle.info, taps_of(choices, name))
        shapes[name] = _shapes(tapped_teachers[name], handle.info, blocks[name], task)
        needed = {part for choice in choices if choice.teacher == name for part in choice.needs.parts}
        parts[name] = {part: live_part(handle, part) for part in sorted(needed)}
    own = {part: live_part(student, part) for choice in choices for part in choice.needs.student_parts}
    torch.manual_seed(hash_key(seed, "methods") & 0x7FFFFFFFFFFFFFFF)
    with torch.device(device):
        methods = build_methods(choices, shapes["student"], shapes, parts, own, samples)
    if recipe.train.activation_checkpointing:
        enable_checkpointing(student.network)
    module = DistillModule(tapped, methods, choices)
    return Assembly(recipe, student, teachers, tapped_teachers, choices, module, task, shapes, stored)


def load_network(
    cfg: StudentConfig | TeacherConfig, task: Task, num_classes: int | None, device: str | torch.device = "cpu"
) -> ModelHandle:
    """Load the network of one block of a recipe; with random weights on the meta device."""
    if cfg.model is None:
        raise UserError(f"the teacher of {getattr(cfg, 'recipe', None)} has not been trained yet")
    if cfg.model.startswith(GIVEN_NETWORK):
        raise UserError(f"'{cfg.model}': this network was handed over in Python and cannot be built from the recipe")
    # the whole network's weights come first; without any, only a name is needed on the meta device
    body = getattr(cfg, "body", None) if cfg.pretrained and not cfg.weights else None
    pretrained = cfg.pretrained and (body is not None or str(device) != "meta")
    elsewhere = cfg.weights if pretrained else None  # its files say what the network is made of
    return task.load(
        elsewhere or cfg.model,
        pretrained=pretrained,
        num_classes=num_classes,
        image_size=_image_size(cfg, task.recipe),
        revision=cfg.revision,
        kwargs={} if elsewhere else cfg.kwargs,
        drop_path=getattr(cfg, "drop_path", None),
        preprocessing=cfg.preprocessing,
        trust_remote_code=cfg.trust_remote_code,
        allow_pickle=cfg.allow_pickle,
        device=device,
        **({"body": body} if body else {}),
    )


def _shapes(model: Tapped, info: ModelInfo, cfg: ModelConfig, task: Task) -> Shapes:
    taps = task.tap_shapes(model, view_of(info, cfg, task.recipe).image_size)
    return Shapes(info.num_classes, taps, info.width, len(info.block_prefix))
