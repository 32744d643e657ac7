import itertools
import re

import pytest
import yaml
from pydantic import ValidationError

from kd_hf.errors import UserError
from kd_hf.layout import RESOLVED
from kd_hf.methods import get_method, method_names
from kd_hf.recipe.config import Recipe
from kd_hf.recipe.read import load_recipe
from kd_hf.recipe.resolved import dump_recipe, flat, recipe_hash, recipe_schema, trained_hash
from tests.runs import ROOT

MINIMAL = "student: {model: test_resnet}\ndata: {path: builtin:digits}\ntrain: {output_dir: out}\n"
FULL = """\
student: {model: test_vit, drop_path: 0.1, kwargs: {depth: 2}}
teachers:
  a: {model: test_resnet, gate: {min_score: 50}}
  b: {recipe: other.yaml, mode: batch_stats}
baseline: 71.5
methods:
  task: {weight: 1, label_smoothing: 0.1}
  kd: {teacher: a, weight: {warmup: [0, 1, 5 epochs]}, until: 90 epochs, temperature: 4}
  second: {method: kd, teacher: b, weight: {cosine: [1, 0, 0.333333333]}}
data: {path: builtin:digits, num_labels: 100, augment: {mixup: 0.8, crop: {scale: [0.5, 1]}}}
train:
  output_dir: out
  learning_rate: 1e-4
  lr_scheduler_type: multistep
  lr_decay_at: [30 epochs, 1234567 steps, 0.9]
  eval_strategy: no
  save_total_limit: null
  optim_args: {betas: [0.9, 0.95]}
  ema: {decay: 0.999}
"""


@pytest.fixture
def file(tmp_path):
    """Writes YAML files into one folder."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


# --- reading


def test_defaults(file):
    recipe = load_recipe(file(MINIMAL))
    assert recipe.student.model == "test_resnet"
    assert recipe.methods == {}
    assert recipe.all_teachers() == {}
    assert recipe.train.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5E3", 1500.0), ("-1e+2", -100.0), ("1_0e2", 1000.0), ("1.", 1.0), ("3", 3), ("1e", "1e"),
     ("yes", "yes"), ("No", "No"), ("off", "off"), ("true", True), ("False", False), ("null", None), ("", None),
     ("2026-01-31", "2026-01-31"), ("[1e-1, no]", [0.1, "no"]), ("'true'", "true")],
)  # fmt: skip
def test_yaml_values_are_read_as_people_mean_them(file, text, value):
    options = f"train: {{output_dir: out, optim_args: {{x: {text}}}}}"
    read = load_recipe(file(MINIMAL.replace("train: {output_dir: out}", options))).train.optim_args["x"]
    assert read == value
    assert type(read) is type(value)


def test_no_is_a_strategy_and_yes_a_truth(file):
    recipe = load_recipe(file(MINIMAL), ["train.eval_strategy=no", "train.use_cpu=yes", "train.bf16=off"])
    assert (recipe.train.eval_strategy, recipe.train.use_cpu, recipe.train.bf16) == ("no", True, False)


def test_overrides_win_and_the_last_one_counts(file):
    recipe = load_recipe(file(MINIMAL), ["train.seed=1", "train.learning_rate=1e-3", "train.seed=2"])
    assert recipe.train.seed == 2
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.output_dir == "out"


def test_overrides_reach_any_depth_and_make_blocks(file):
    recipe = load_recipe(
        file(MINIMAL), ["data.augment.crop.padding=2", "teacher.model=a/b", "teacher.gate.min_score=80", "methods.kd="]
    )
    assert recipe.data.augment.crop.padding == 2
    assert recipe.teacher.gate.min_score == 80
    assert list(recipe.methods) == ["kd"]


def test_an_override_may_be_a_block_or_a_list(file):
    recipe = load_recipe(file(MINIMAL), ["data.augment={mixup: 0.8}", "train.report_to=[tensorboard, wandb]"])
    assert recipe.data.augment.mixup == 0.8
    assert recipe.train.report_to == ["tensorboard", "wandb"]


def test_a_method_is_removed_with_false(file):
    path = file(MINIMAL + "methods: {kd: {temperature: 4}, task: {weight: 2}}\n")
    assert list(load_recipe(path, ["methods.kd=false"]).methods) == ["task"]


def test_fragments_are_laid_over_each_other(file):
    file("train: {learning_rate: 1, seed: 1}\ndata: {augment: {mixup: 0.1}}\n", "parts/one.yaml")
    file("train: {learning_rate: 2}\nbase: deep.yaml\n", "parts/two.yaml")
    file("train: {learning_rate: 3, max_steps: 7}\n", "parts/deep.yaml")
    path = file("base: [parts/one.yaml, parts/two.yaml]\n" + MINIMAL + "methods: {task: {weight: 3}}\n")
    recipe = load_recipe(path)
    train = recipe.train
    assert (train.learning_rate, train.seed, train.max_steps, train.output_dir) == (2, 1, 7, "out")
    assert recipe.data.augment.mixup == 0.1
    assert recipe.data.path == "builtin:digits"


def test_one_fragment_may_be_used_twice_but_not_include_itself(file):
    file("train: {seed: 5}\n", "common.yaml")
    file("base: common.yaml\n", "a.yaml")
    assert load_recipe(file("base: [common.yaml, a.yaml]\n" + MINIMAL)).train.seed == 5
    file("base: loop2.yaml\n", "loop1.yaml")
    file("base: loop1.yaml\n", "loop2.yaml")
    with pytest.raises(UserError, match=r"loop2\.yaml:1: `base:`.* include each other: .*loop1.*loop2.*loop1"):
        load_recipe(file("base: loop1.yaml\n" + MINIMAL))


def test_a_teachers_recipe_is_found_beside_the_file_that_names_it(file, tmp_path):
    file("teacher: {recipe: teacher.yaml}\n", "parts/with_teacher.yaml")
    recipe = load_recipe(file("base: parts/with_teacher.yaml\n" + MINIMAL))
    assert recipe.teacher.recipe == str(tmp_path / "parts" / "teacher.yaml")


@pytest.mark.parametrize("key", ["train.seed", "data.augment.mixup", "methods.kd.temperature"])
def test_a_message_names_the_file_that_last_wrote_the_key(file, key):
    blocks = key.split(".")
    text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(blocks))[:-1]
    file(text + " wrong\n", "below.yaml")
    with pytest.raises(UserError, match=rf"below\.yaml:{len(blocks)}: {key}: .*'wrong'"):
        load_recipe(file("base: below.yaml\n" + MINIMAL))
    with pytest.raises(UserError, match=rf"^override '{key}=worse': {key}: .*'worse'"):
        load_recipe(file("base: below.yaml\n" + MINIMAL), [f"{key}=worse"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", "methods.kd.weight: .*valid number"),
        (".nan", "methods.kd.weight: .*finite number"),
        ("{warmpu: [0, 1, 5]}", "unknown key 'methods.kd.weight.warmpu'. Did you mean 'warmup'"),
        ("{warmup: [0, 1]}", "'methods.kd.weight.warmup' needs more than 2 values"),
        ("{warmup: [0, 1, 5 parsecs]}", "methods.kd.weight.warmup.2: expected a duration"),
        ("{warmup: [0, 1, 2, 3]}", "methods.kd.weight.warmup: .* at most 3 items"),
        ("{}", "methods.kd.weight: give one of `warmup"),
    ],
)
def test_messages_about_a_weight_speak_of_the_form_that_was_meant(file, value, message):
    with pytest.raises(UserError, match=message):
        load_recipe(file(MINIMAL), [f"methods.kd.weight={value}"])


def test_unknown_keys_that_look_like_a_union_are_named(file):
    for key in ("float", "a[b]"):
        with pytest.raises(UserError, match=f"unknown key '{re.escape(key)}'"):
            load_recipe(file(MINIMAL + f"'{key}': 1\n"))


def test_long_wrong_values_are_cut(file):
    with pytest.raises(UserError) as caught:
        load_recipe(file(MINIMAL), ["student=[" + ", ".join(["word"] * 500) + "]"])
    shown = str(caught.value).partition("(got ")[2]
    assert len(shown) < 100


def test_a_folder_and_binary_are_no_recipes(tmp_path):
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "a.yaml")


# --- the resolved form


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_the_resolved_recipe_is_the_same_recipe(file, text):
    recipe = load_recipe(file(text))
    again = load_recipe(file(dump_recipe(recipe), "again/" + RESOLVED))
    teachers = {name: cfg.model_copy(update={"recipe": None}) for name, cfg in recipe.all_teachers().items()}
    read = {name: cfg.model_copy(update={"recipe": None}) for name, cfg in again.all_teachers().items()}
    # a path to a teacher's recipe is relative to the file, so it is compared apart
    assert again.model_copy(update={"teachers": read}) == recipe.model_copy(update={"teachers": teachers})
    assert again.train.save_total_limit == recipe.train.save_total_limit


def test_the_resolved_recipe_says_every_option_of_its_methods(file):
    recipe = load_recipe(file(MINIMAL + "methods: {dkd: }\n"))
    written = yaml.safe_load(dump_recipe(recipe))["methods"]["dkd"]
    assert get_method("dkd").Config().model_dump().items() <= written.items()


def test_the_resolved_recipe_says_every_key_of_every_block(file):
    written = yaml.safe_load(dump_recipe(load_recipe(file(MINIMAL))))
    assert written.keys() == Recipe.model_fields.keys()
    for name in ("student", "data", "train", "eval"):
        block = Recipe.model_fields[name].annotation
        assert written[name].keys() == block.model_fields.keys()


def test_hash_is_in_the_first_line(file, tmp_path):
    recipe = load_recipe(file(MINIMAL))
    file(dump_recipe(recipe), RESOLVED)
    assert trained_hash(tmp_path) == recipe_hash(recipe)
    assert len(recipe_hash(recipe)) == 12
    assert trained_hash(tmp_path / "missing") is None
    file("# recipe hash: 0123456789ab\n" + MINIMAL + "train.gone: 1\n", RESOLVED)
    assert trained_hash(tmp_path) == "0123456789ab"  # written by a version with other keys
    file("gone: 1\n", RESOLVED)
    assert trained_hash(tmp_path) is None


def test_a_key_that_a_newer_version_adds_leaves_the_hash_of_a_run(file, tmp_path):
    recipe = load_recipe(file(MINIMAL))
    older = "\n".join(line for line in dump_recipe(recipe).splitlines() if "warmup_lr" not in line)
    file(older, RESOLVED)
    assert trained_hash(tmp_path) == recipe_hash(recipe)


@pytest.mark.parametrize(
    "override",
    ["train.output_dir=elsewhere", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=2",
     "train.dataloader_num_workers=3", "train.logging_steps=7", "train.report_to=[wandb]", "train.disable_tqdm=true",
     "train.save_total_limit=9", "train.resume_from_checkpoint=false", "train.cpu_threads=2", "baseline=70.5",
     "methods.kd.temperature=1", "train.learning_rate=0.0005"],
)  # fmt: skip
def test_what_does_not_change_the_result_does_not_change_the_hash(file, override):
    path = file(MINIMAL + "methods: {kd: {}}\n")
    assert recipe_hash(load_recipe(path, [override])) == recipe_hash(load_recipe(path))


def test_what_changes_the_result_changes_the_hash(file):
    path = file(MINIMAL + "methods: {kd: {}}\n")
    overrides = ["train.seed=1", "train.learning_rate=1e-3", "methods.kd.temperature=2", "methods.kd.weight=2",
                 "methods.kd.until=3 epochs", "methods.kd.until=3 steps", "methods.dkd={}", "data.num_labels=5",
                 "student.model=test_vit", "teacher.model=x", "train.max_steps=1234567", "train.bf16=true",
                 "train.warmup_steps=1234567", "train.warmup_steps=1234568"]  # fmt: skip
    hashes = [recipe_hash(load_recipe(path, [text])) for text in overrides] + [recipe_hash(load_recipe(path))]
    assert all(left != right for left, right in itertools.combinations(hashes, 2))


def test_hash_does_not_depend_on_how_a_recipe_is_written(file):
    file("data: {path: builtin:digits}\ntrain: {seed: 3}\n", "below.yaml")
    one = load_recipe(file("base: below.yaml\nstudent: {model: test_resnet}\ntrain: {output_dir: out}\n"))
    two = load_recipe(file(MINIMAL), ["train.seed=3"])
    assert recipe_hash(one) == recipe_hash(two)


# --- blocks and schema


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"bf16": True, "fp16": True}, "exclude each other"),
        ({"eval_strategy": "steps"}, "`eval_steps`"),
        ({"save_strategy": "steps"}, "`save_steps`"),
        ({"lr_scheduler_type": "multistep"}, "`lr_decay_at`"),
        ({"lr_scheduler_type": "step", "lr_decay_at": [1, 2]}, "one period"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"momentum": 1.0}, "less than 1"),
    ],
)
def test_blocks_that_contradict_themselves(train, message):
    values = {"student": {"model": "a"}, "data": {"path": "b"}, "train": {"output_dir": "c", **train}}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(values)


def test_recipes_do_not_change(file):
    recipe = load_recipe(file(MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.seed = 3


def test_every_key_is_documented_for_editors():
    schema = recipe_schema()
    block = schema["properties"]["methods"]["properties"]
    assert list(block) == list(method_names())
    for name, described in block.items():
        own = get_method(name).Config.model_fields
        written = described["anyOf"][0]
        assert {*own, "weight", "until", "teacher", "method"} == set(written["properties"])
        assert written["additionalProperties"] is False
        assert described["description"]


def test_schema_has_no_dangling_reference():
    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            for part in node:
                yield from references(part)

    schema = recipe_schema()
    found = set(references(schema))
    assert found
    assert found <= {f"#/$defs/{name}" for name in schema["$defs"]}


def test_flat_values_are_scalars(file):
    values = flat(load_recipe(file(FULL)).model_dump(mode="json"))
    assert values["student.model"] == "test_vit"
    assert values["methods.kd.temperature"] == 4
    assert values["train.optim_args.betas"] == "[0.9, 0.95]"
    assert "train.max_steps" not in values
    assert all(isinstance(value, (str, int, float, bool)) for value in values.values())


def test_the_quick_start_is_read_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert load_recipe(recipe.teacher.recipe).student.model == "test_resnet"
