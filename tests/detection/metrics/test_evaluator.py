import numpy as np
import pytest
import torch
from accelerate import Accelerator

from kd_hf.detection.data.loader import eval_loader
from kd_hf.detection.data.stage import BoxStage
from kd_hf.detection.metrics.average_precision import Results, average_precision
from kd_hf.detection.metrics.evaluator import BoxEvaluator, BoxSubject, Finder, measure_boxes
from kd_hf.errors import UserError
from kd_hf.recipe.config import BoxAugment, Recipe
from tests.detection.scenes import VIEW, Colours, Scenes, write_coco

AUGMENT = BoxAugment(eval_size=160, max_size=400, multiple_of=8)
VIEWS = {"student": VIEW}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def recipe(**values):
    train = {"output_dir": "x", "per_device_eval_batch_size": 5, "disable_tqdm": True}
    return Recipe(student={"model": "x"}, data={"path": "x"}, train=train, **values)


@pytest.mark.parametrize("extra", [False, True])
def test_a_detector_that_finds_everything_has_full_precision(accelerator, extra):
    source = Scenes(23, damaged=(7,))
    evaluator = BoxEvaluator({"student": Colours(extra)}, VIEW, {}, source, accelerator, recipe(), AUGMENT)
    values = evaluator()
    assert values["samples"] == 22 and values["ap50"] == pytest.approx(100) and values["ap"] > 90


def test_official_numbers_are_found_by_the_same_number(accelerator, tmp_path):
    from kd_hf.detection.data.opening import open_boxes
    from kd_hf.recipe.config import DataConfig

    source = open_boxes(DataConfig(path=str(write_coco(tmp_path, Scenes(12).scenes, ids=(0, 1, 2)))), "train")
    subject = {"student": BoxSubject(Colours(), VIEW)}
    assert measure_boxes(subject, source, accelerator, batch_size=4, augment=AUGMENT)["student"]["ap50"] == 100


def test_teachers_are_measured_once_and_others_beside_the_student(accelerator):
    teacher = Colours(noise=0.05)
    calls = []
    teacher.register_forward_hook(lambda *given: calls.append(1))
    students = {"student": Colours(noise=0.02), "raw": Colours()}
    evaluator = BoxEvaluator(students, VIEW, {"teacher": teacher}, Scenes(12), accelerator, recipe(), AUGMENT)
    values, seen = evaluator(), len(calls)
    assert values["teacher_ap"] < values["ap"] < values["raw_ap"]
    assert evaluator() == values and len(calls) == seen == 3
    without = BoxEvaluator(
        students, VIEW, {"teacher": teacher}, Scenes(4), accelerator, recipe(eval={"teacher": False})
    )
    assert without.teachers == {}
    teacher.info.num_classes = 7
    strange = BoxEvaluator(students, VIEW, {"teacher": teacher}, Scenes(12), accelerator, recipe(), AUGMENT)
    assert "teacher_ap" not in strange()


def test_students_run_in_evaluation_mode_without_gradient(accelerator):
    student = Colours().train()
    modes = []
    student.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    BoxEvaluator({"student": student}, VIEW, {}, Scenes(4), accelerator, recipe(), AUGMENT)()
    assert modes == [(False, False)]


def test_what_was_found_can_be_kept(accelerator):
    found = {}
    evaluator = BoxEvaluator({"student": Colours()}, VIEW, {}, Scenes(9), accelerator, recipe(), AUGMENT)
    values = evaluator(found)
    assert found["student"].rows.tolist() == list(range(9))
    assert average_precision(found["student"], (0, 1, 2)).items() <= values.items()


def test_some_images_stand_for_all(accelerator):
    limited = recipe(eval={"max_samples": 6})
    assert BoxEvaluator({"student": Colours()}, VIEW, {}, Scenes(), accelerator, limited, AUGMENT)()["samples"] == 6


def rank_results(source, world, rank):
    """What one of several processes finds; the last batches are padded."""
    finder, stage, network = Finder(source), BoxStage(VIEWS), Colours(noise=0.03)
    for batch in eval_loader(source, VIEWS, augment=AUGMENT, batch_size=3, world=world, rank=rank):
        finder.add(batch, network(stage(batch)[0]["student"]))
    return finder.results()


def test_ranks_together_find_what_one_process_finds(accelerator):
    source = Scenes(13, damaged=(2,))
    parts = [rank_results(source, 2, rank) for rank in range(2)]
    assert [len(part.rows) for part in parts] == [6, 6]  # of 7 and 6 rows, padded to three batches of 3
    kept = {}
    subject = {"student": BoxSubject(Colours(noise=0.03), VIEW)}
    values = measure_boxes(subject, source, accelerator, batch_size=13, augment=AUGMENT, keep=kept)["student"]
    joined = Results.join(parts)
    assert np.array_equal(joined.rows, kept["student"].rows)
    assert np.allclose(joined.boxes, kept["student"].boxes, atol=1e-3)
    assert average_precision(joined, (0, 1, 2)) == {name: value for name, value in values.items() if name != "samples"}


def test_a_network_of_other_classes_is_refused(accelerator):
    source = Scenes(4)
    source.class_names = ("a", "b", "c", "d", "e")
    with pytest.raises(UserError, match="the network has 3 classes, the data 5"):
        measure_boxes({"student": BoxSubject(Colours(), VIEW)}, source, accelerator, batch_size=4, augment=AUGMENT)
