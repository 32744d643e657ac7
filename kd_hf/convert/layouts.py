"""Where in a checkpoint the student's weights are: which entry, averaged or not, and beside what else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kd_hf.convert.reading import Checkpoint
from kd_hf.errors import UserError
from kd_hf.text.words import enumerate_names

CHOICES = ("auto", "model", "ema")


@dataclass(frozen=True)
class Layout:
    """Names of entries: of the weights that were published, of those the optimiser left, and of their average."""

    published: str
    raw: str
    average: str


LAYOUTS = (
    Layout("state_dict", raw="ema_state_dict", average="state_dict"),  # OpenMMLab swaps the two before it saves
    Layout("state_dict", raw="state_dict", average="state_dict_ema"),  # timm
    Layout("model", raw="model", average="model_ema"),  # DeiT, manifold distillation, [CLS]-KD
    Layout("student", raw="student", average="student_ema"),  # VkD
)
# OpenMMLab before 1.0 keeps the other copy of ``a.b`` as ``ema_a_b``, swapped as well
_BUFFER = "ema_"
_WRAPPERS = ("module.", "_orig_mod.")
_STUDENT, _TEACHER = "student.", "teacher."
# what is saved with a student without being part of it
_COMPANIONS = (_TEACHER, "distill_losses.", "data_preprocessor.", "projector.", _BUFFER)
_COUNTERS = frozenset({"steps", "n_averaged"})
_BESIDE_STUDENT = ("linear.",)  # ScaleKD's distiller; only where the student's own names are marked


@dataclass
class StudentWeights:
    """The student's tensors by their name without wrappers, and how many of which others were left out.

    `entry` is the name of the checkpoint's entry they are from, empty for a file that is nothing but weights;
    `strays` are names beside marked ones that are not known to be something else.
    """

    entry: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    strays: list[str] = field(default_factory=list)


def find_student(checkpoint: Checkpoint, choice: str = "auto") -> StudentWeights:
    """Take the student's weights out of a checkpoint.

    Args:
        checkpoint: the file.
        choice: ``auto`` for the weights whose accuracy was published, ``model`` for those that the optimiser left,
            ``ema`` for their moving average. They differ only where training kept an average.

    Raises:
        UserError: the file has no weights, or not those.
    """
    versions = _versions(checkpoint)
    if choice not in versions:
        raise UserError(f"--weights {choice}: '{checkpoint.path}' holds no moving average; use auto or model")
    entry, state = versions[choice]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if others := sorted(str(name) for name in state.keys() - tensors.keys()):
        where = f"entry '{entry}' of '{checkpoint.path}'" if entry else f"'{checkpoint.path}'"
        raise UserError(f"{where} is not a dict of tensors: {enumerate_names(others)}")
    return _split(entry, tensors)


def _versions(checkpoint: Checkpoint) -> dict[str, tuple[str, Mapping[str, object]]]:
    """What each choice means for this file: the entry's name and its content."""
    entries = {name: value for name, value in checkpoint.entries.items() if isinstance(value, Mapping) and value}
    for layout in LAYOUTS:
        if layout.raw in entries and layout.average in entries:
            names = zip(CHOICES, (layout.published, layout.raw, layout.average), strict=True)
            return {choice: (name, entries[name]) for choice, name in names}
    entry = next((layout.published for layout in LAYOUTS if layout.published in entries), "")
    state = entries[entry] if entry else checkpoint.entries
    if not any(isinstance(value, Tensor) for value in state.values()):
        expected = ", ".join(sorted({layout.published for layout in LAYOUTS}))
        found = enumerate_names(sorted([*checkpoint.entries, *checkpoint.foreign])) or "nothing"
        raise UserError(f"'{checkpoint.path}' has no weights, neither at its top nor under {expected}; found {found}")
    if any(name.startswith(_BUFFER) for name in state):
        raw = {name: state.get(_BUFFER + name.replace(".", "_"), value) for name, value in state.items()}
        return {"auto": (entry, state), "model": (entry, raw), "ema": (entry, state)}
    return {"auto": (entry, state), "model": (entry, state)}


def _split(entry: str, tensors: Mapping[str, Tensor]) -> StudentWeights:
    """Part the student's weights from what was saved with them, and take wrappers off their names."""
    bare = {_unwrapped(name): value for name, value in tensors.items()}
    marked = any(name.startswith(_STUDENT) for name in bare)
    companions = (*_COMPANIONS, *_BESIDE_STUDENT) if marked else _COMPANIONS
    # mdistiller saves its distiller as a whole: what is neither network is learned by a method, under any name
    distiller = marked and entry == "model" and any(name.startswith(_TEACHER) for name in bare)
    found = StudentWeights(entry)
    for name, value in bare.items():
        other = next((prefix for prefix in companions if name.startswith(prefix)), None)
        if distiller and not other and not name.startswith(_STUDENT):
            other = name.partition(".")[0] + "."
        if other or name in _COUNTERS:
            found.left_out[f"{other}*" if other else name] += 1
        elif marked and not name.startswith(_STUDENT):
            found.strays.append(name)
        else:
            found.tensors[name.removeprefix(_STUDENT)] = value
    if all(name.startswith("network.") for name in found.tensors):  # an artefact of this package
        found.tensors = {name.removeprefix("network."): value for name, value in found.tensors.items()}
    return found


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
