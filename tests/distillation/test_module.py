"""What a recipe's methods become for given networks, and the one module that is trained."""

from __future__ import annotations

import pytest
import torch

from kd_hf.data.noise import NoiseSource
from kd_hf.distillation.assembly import assemble
from kd_hf.distillation.choices import Choice, taps_of, weights_at
from kd_hf.distillation.module import DistillModule, by_role, check_batch
from kd_hf.draws import Draws
from kd_hf.errors import UserError
from kd_hf.methods import get_method
from kd_hf.methods.base import Moment, Needs
from kd_hf.methods.kd import KD
from kd_hf.outputs import Outputs, Target
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.schedule import Ramp
from kd_hf.recipe.variants import plain_twin, with_untrained_teachers
from tests.runs import TEACHER, recipe

RESNET = {"student": {"model": "test_efficientnet"}, "teacher": TEACHER}


def built(tmp_path, *blocks, device="cpu"):
    return assemble(recipe(tmp_path, *blocks), num_classes=10, device=device)


def names(parts) -> dict[str, object]:
    return {choice.name: choice.weight for choice in parts.choices}


def test_task_is_there_unless_the_recipe_turns_it_off(tmp_path):
    assert names(built(tmp_path)) == {"task": 1.0}
    assert names(built(tmp_path, RESNET, {"methods": {"kd": {}}})) == {"task": 1.0, "kd": 0.5}
    assert names(built(tmp_path, RESNET, {"methods": {"kd": {}, "task": {"weight": 0}}})) == {"kd": 0.5}


def test_paper_weights_are_the_defaults(tmp_path):
    parts = built(tmp_path, RESNET, {"methods": {"mgd": {}, "wsld": {}, "dkd": {"weight": {"warmup": [0, 2, 10]}}}})
    weights = names(parts)
    assert (weights["mgd"], weights["wsld"]) == (7e-5, 2.5)
    assert isinstance(weights["dkd"], Ramp)
    assert [weights_at(parts.choices, step, 100, 10)["dkd"] for step in (0, 5, 10, 50)] == [0, 1, 2, 2]
    assert [choice.name for choice in parts.choices if choice.may_pause] == ["dkd"]


def test_the_loss_on_labels_may_take_what_kd_leaves(tmp_path):
    methods = {"task": {"weight": {"one_minus": "kd"}}, "kd": {"weight": {"warmup": [0.2, 0.8, 2]}, "until": "4 steps"}}
    choices = built(tmp_path, RESNET, {"methods": methods}).choices
    found = [weights_at(choices, step, 10, 5) for step in range(5)]
    assert [weights["kd"] for weights in found] == pytest.approx([0.2, 0.5, 0.8, 0.8, 0.0])
    assert [weights["task"] for weights in found] == pytest.approx([0.8, 0.5, 0.2, 0.2, 1.0])
    assert list(found[0]) == ["task", "kd"]
    for name in ("kdd", "task"):
        with pytest.raises(UserError, match=r"methods\.task\.weight\.one_minus: .*Did you mean 'kd'|Known: kd"):
            built(tmp_path, RESNET, {"methods": methods | {"task": {"weight": {"one_minus": name}}}})


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(UserError, match="every weight is 0"):
        built(tmp_path, {"methods": {"task": {"weight": 0}}})


def test_several_teachers_must_be_told_apart(tmp_path):
    teachers = {"teachers": {"a": TEACHER, "b": TEACHER}}
    with pytest.raises(UserError, match=r"methods\.kd.*several teachers \(a, b\)"):
        built(tmp_path, teachers, {"methods": {"kd": {}}})
    parts = built(tmp_path, teachers, {"methods": {"kd": {"teacher": "b"}}})
    assert [choice.teacher for choice in parts.choices] == [None, "b"]


def test_index_only_methods_refuse_mixed_labels(tmp_path):
    with pytest.raises(UserError, match=r"methods\.dkd is defined for index labels only.*mixup"):
        built(tmp_path, RESNET, {"methods": {"dkd": {}}, "data": {"augment": {"cutmix": 1.0}}})


def test_taps_are_collected_once(tmp_path):
    twice = {"first": {"method": "mgd"}, "second": {"method": "mgd", "mask_ratio": 0.5}}
    parts = built(tmp_path, RESNET, {"methods": {**twice, "kd": {}}})
    assert taps_of(parts.choices) == ("stage:-1",)
    assert taps_of(parts.choices, "teacher") == ("stage:-1",)
    assert set(parts.module.methods) == {"task", "first", "second", "kd"}


def test_only_student_and_methods_are_in_the_module(tmp_path):
    module = built(tmp_path, RESNET, {"methods": {"mgd": {}}}).module
    keys = {key.split(".")[0] for key in module.state_dict()}
    assert keys == {"student", "methods"}
    methods = {key.split(".")[1] for key in module.state_dict() if key.startswith("methods.")}
    assert methods == {"mgd"}


def test_forward_names_the_parts_and_skips_what_is_not_active(tmp_path):
    module: DistillModule = built(tmp_path, RESNET, {"methods": {"mgd": {}, "kd": {}}}).module
    keys = torch.arange(4)
    pixels, target = torch.randn(4, 3, 32, 32), Target(torch.tensor([0, 1, 2, -1]))
    shape = module.methods["mgd"].shape
    taught = {"teacher": Outputs(torch.randn(4, 10), None, {"stage:-1": torch.randn(4, *shape)})}
    draws = module.draw(Draws(keys), Moment(0, 1, 1))
    assert set(module(pixels, taught, target, draws)) == {"task/ce", "mgd/generation", "kd/soft"}
    assert set(module(pixels, taught, target, draws, active=("kd",))) == {"kd/soft"}


def test_roles_rename_taps():
    outputs = Outputs(torch.zeros(1, 2), None, {"stage:-1": torch.ones(1), "block:0": torch.zeros(1)})
    assert list(by_role(outputs, {"feature": "stage:-1"}).taps) == ["feature"]


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    def weights(seed, *blocks):
        module = built(tmp_path, RESNET, {"methods": {"mgd": {}}, "train": {"seed": seed}}, *blocks).module
        return {key: value for key, value in module.state_dict().items() if value.is_floating_point()}

    one, same, other = weights(0), weights(0, {"teacher": {"model": "test_efficientnet"}}), weights(1)
    student = [key for key in one if key.startswith("student.")]
    assert all(one[key].equal(same[key]) for key in student)
    assert any(not one[key].equal(other[key]) for key in student)
    assert any(not one[key].equal(other[key]) for key in one if key.startswith("methods."))


def test_meta_device_gives_the_same_shapes(tmp_path):
    blocks = (RESNET, {"methods": {"mgd": {}}})
    real, meta = built(tmp_path, *blocks), built(tmp_path, *blocks, device="meta")
    assert real.shapes == meta.shapes
    assert all(parameter.is_meta for parameter in meta.module.parameters())


def test_plain_twin_differs_in_what_teaches_only(tmp_path):
    whole = recipe(
        tmp_path / "run", RESNET,
        {"methods": {"kd": {}, "task": {"weight": 0.5, "label_smoothing": 0.1}}, "data": {"num_labels": 50}},
    )  # fmt: skip
    twin = plain_twin(whole)
    assert twin.teacher is None and list(twin.methods) == ["task"]
    assert twin.methods["task"].weight == 1.0 and twin.methods["task"].options == {"label_smoothing": 0.1}
    assert twin.data.unlabelled == "drop"
    assert twin.train.output_dir == str(tmp_path / "run" / "plain")
    same = {"output_dir"}
    assert twin.train.model_dump(exclude=same) == whole.train.model_dump(exclude=same)
    assert twin.student == whole.student


def test_an_untrained_teacher_is_described_by_its_recipe(tmp_path):
    import yaml

    teacher = recipe(tmp_path / "t", {"student": {"model": "test_resnet"}})
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(teacher.model_dump(mode="json", exclude_none=True)))
    whole = Recipe.model_validate(
        recipe(tmp_path / "run").model_dump() | {"teacher": {"recipe": str(tmp_path / "t.yaml")}}
    )
    assert with_untrained_teachers(whole).teacher.model == "test_resnet"


class Compares(KD):
    """Of one image there is nothing to learn."""

    name = "compares"
    least_images = 3

    class Config(KD.Config):
        gather: bool = False


def compares(gather=False):
    needs = Needs(teacher_logits=True, batch_coupled=True, gathered=gather)
    return Choice("mine", Compares, Compares.Config(gather=gather), needs, 1.0, None, "teacher")


@pytest.mark.parametrize(("gather", "per_device", "processes"), [(False, 3, 1), (True, 1, 3), (True, 2, 2)])
def test_a_batch_of_enough_images_is_taken(gather, per_device, processes):
    check_batch([compares(gather)], per_device, processes)


def test_a_batch_of_too_few_images_is_refused_with_what_helps():
    with pytest.raises(UserError, match=r"methods\.mine .*fewer than 3, .*batch_size is 2; raise it$"):
        check_batch([compares()], 2, 1)
    with pytest.raises(UserError, match=r"raise it, or set methods\.mine\.gather: true$"):
        check_batch([compares()], 1, 3)
    with pytest.raises(UserError, match=r"raise it$"):
        check_batch([compares(gather=True)], 1, 2)


class KeepsEach(KD):
    """Keeps something of every training image."""

    name = "keeps_each"

    @classmethod
    def needs(cls, cfg, student, teacher):
        return Needs(teacher_logits=True, samples=True)

    def __init__(self, cfg, student, teacher, parts):
        super().__init__(cfg, student, teacher, parts)
        self.samples = student.samples


def test_training_images_are_known_to_a_method_that_keeps_something_of_each(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "kd_hf.distillation.choices.get_method", lambda name, *task: KeepsEach if name == "kd" else get_method(name)
    )
    run, images = recipe(tmp_path, RESNET, {"methods": {"kd": {}}}), NoiseSource(12, 8, 10)
    assert assemble(run, 10, samples=images).module.methods["kd"].samples is images
    assert assemble(run, 10).module.methods["kd"].samples is None
    with pytest.raises(UserError, match=r"methods\.kd .*data\.augment\.repeats is 2: set it to 1"):
        built(tmp_path, RESNET, {"methods": {"kd": {}}, "data": {"augment": {"repeats": 2}}})
