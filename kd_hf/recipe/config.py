"""The blocks of a recipe: every key a user can write, its meaning and its default. No torch here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator

from kd_hf.errors import UserError
from kd_hf.recipe.schedule import Duration, DurationField, Weight
from kd_hf.task_table import DEFAULT, task_entry

TASK = "task"  # the block of `methods` that is there unless it is turned off: the ordinary loss on labels
_COCO_SIDES = tuple(range(480, 801, 16))
_DETECTION = "object-detection"


class Block(BaseModel):
    """A recipe block: unknown keys are refused, values are coerced (so `1e-4` is a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class PreprocessingConfig(Block):
    """Overrides of what the model's own configuration says about its images."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)


class ModelConfig(Block):
    """A network by Hub id, local folder, run folder or timm architecture name."""

    model: str | None = None
    """`timm/resnet50`, `google/vit-base-patch16-224`, a folder, or an architecture name such as `resnet18`."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    num_classes: int | None = Field(None, gt=0)
    """Replaces the classifier; by default the data's number of classes for a student, the model's own for a teacher."""
    image_size: int | None = Field(None, gt=0)
    """Pixels per side of this model's view; by default `data.image_size`, else the model's own."""
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the model's constructor (timm) or configuration (transformers)."""
    weights: str | None = None
    """Where the pretrained weights of `model` lie, when its name does not say so: a Hub id, or a folder such as
    `kd_hf.convert` writes. What needs no weights (`plan`, `--smoke`) builds `model` with `kwargs`."""
    trust_remote_code: bool = False
    """Allow code from the Hub repository to run."""
    allow_pickle: bool = False
    """Read weights that exist as pickles only; nothing but tensors is unpickled."""


class StudentConfig(ModelConfig):
    """The network that is trained."""

    model: str
    pretrained: bool = False
    """Begin with trained weights, of the whole network or of a detector's `body`; true where `body` is given."""
    body: str | None = None
    """The classifier whose weights the body of a detector begins with, where it has none of its own: a Hub id, also of
    timm, or a folder, e.g. `timm/swin_tiny_patch4_window7_224.ms_in1k`. `revision` is then of this repository;
    `pretrained: false` leaves them out."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Stochastic depth rate of the student."""

    @model_validator(mode="before")
    @classmethod
    def _a_body_has_trained_weights(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("body") is not None
        return {"pretrained": True, **values} if given else values


class GateConfig(Block):
    """The measurement of a teacher before the first step."""

    enabled: bool = True
    samples: int = Field(256, gt=0)
    """How many images of the evaluation split are shown to the teacher."""
    min_score: float | None = Field(
        None, ge=0, le=100, validation_alias=AliasChoices("min_score", "min_top1", "min_ap")
    )
    """Refuse to train below this number of the task: top-1 of classifiers, average precision of detectors, in percent.
    By default only a teacher at chance level is refused."""


class TeacherConfig(ModelConfig):
    """A network that is imitated; frozen, outside the trained module."""

    recipe: str | None = None
    """Instead of `model`: a recipe whose student is this teacher; it is trained first when its artefact is missing."""
    pretrained: bool = True
    mode: Literal["eval", "batch_stats", "train"] = "eval"
    """`batch_stats` uses batch statistics in BatchNorm, `train` also drop path: as some official code did."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights of the frozen teacher; `auto` follows the run's mixed precision."""
    shard: bool = False
    """Spread the weights over all processes, for a teacher that does not fit on one device; slower."""
    store: str | None = None
    """Outputs written by `python -m kd_hf.cache`: a folder, or `user/name[@revision]` on the Hub. They are read, and
    the network neither runs nor needs its weights."""
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.model is None) == (self.recipe is None):
            raise ValueError("give either `model` or `recipe`")
        return self


class MethodBlock(BaseModel):
    """What the recipe says about one loss. All other keys of the block belong to the method's own Config."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    weight: Weight | None = None
    """Factor of this loss; by default the paper's. A number, `{warmup: [from, to, duration]}` or `{cosine: […]}`."""
    until: DurationField | None = None
    """Stop this loss after a duration, e.g. `90 epochs`."""
    teacher: str | None = None
    """Which of several `teachers` this method reads."""
    method: str | None = None
    """Method name, when the block's own name is another (two blocks of one method)."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the method's Config."""
        return dict(self.model_extra or {})


class CropConfig(Block):
    """How the training crop is taken from the decoded image; one box serves all views."""

    kind: Literal["random_resized", "pad", "resize"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop relative to the image (`random_resized`)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop (`random_resized`)."""
    padding: int = Field(4, ge=0)
    """Pixels added on each side, at the student's resolution, before a random crop of the original size (`pad`)."""


class StrongConfig(Block):
    """A second view of every training image, with crop and flip of its own, for losses that compare two views."""

    auto_augment: str | None = "rand-m10-n2-mstd101-inc1"
    """A policy in timm's terms; by default two operations of RandAugment with a magnitude uniform in 0–10."""
    cutout: float = Field(0.5, ge=0, le=1)
    """Side of a grey square at a random place, relative to the view's; the view's borders cut it off."""

    def describe(self) -> str:
        """What is done, in a few words."""
        return " and ".join([self.auto_augment or "no policy", *(["cutout"] if self.cutout else [])])


class AugmentConfig(Block):
    """Random changes to training images. Every draw is keyed by (seed, epoch, sample)."""

    crop: CropConfig = CropConfig()
    hflip: float = Field(0.5, ge=0, le=1)
    auto_augment: str | None = None
    """A policy in timm's terms: RandAugment as `rand-m9-mstd0.5-inc1`, 3-Augment as `3a`, AutoAugment as `original`."""
    color_jitter: float = Field(0.0, ge=0)
    """Strength of brightness, contrast and saturation jitter; not used together with `auto_augment`, except `3a`."""
    erasing: float = Field(0.0, ge=0, le=1)
    """Probability of random erasing (area 0.02–1/3, aspect 0.3–10/3, per-pixel normal noise after normalisation)."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of Mixup's Beta distribution; 0 turns it off."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix's Beta distribution; 0 turns it off."""
    mix_prob: float = Field(1.0, ge=0, le=1)
    """Probability that a group of images is mixed at all."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Probability of CutMix when both are on."""
    mix_group: int | None = Field(None, ge=2, multiple_of=2)
    """Images that share one mixing coefficient; by default the whole global batch."""
    repeats: int = Field(1, ge=1)
    """Repeated augmentation: how often each image occurs in a batch, with draws of its own."""
    strong: StrongConfig = StrongConfig()
    """The second view, made only where a loss needs it (`mlkd`, and `task` with `strong: true`)."""


class BoxAugment(Block):
    """Sizes of images with boxes, and random changes to them; the defaults are those of DETR and ViDT.

    A training image is flipped, then either resized or resized, cropped and resized. Every draw is keyed by (seed,
    epoch, sample); all networks are shown the same pixels.
    """

    hflip: float = Field(0.5, ge=0, le=1)
    crop: float = Field(0.5, ge=0, le=1)
    """Probability that an image is cropped before it is resized."""
    sizes: tuple[int, ...] = Field(_COCO_SIDES, min_length=1)
    """Pixels of the shortest side in training; one of them is drawn."""
    max_size: int = Field(1333, gt=0)
    """The longest side at most, in training and evaluation; the shortest gives way."""
    crop_sizes: tuple[int, ...] = Field((400, 500, 600), min_length=1)
    """Pixels of the shortest side before a crop; the longest is free."""
    crop_range: tuple[int, int] = (384, 600)
    """Least and greatest side of a crop; both are drawn."""
    multiple_of: int = Field(16, gt=0)
    """Sides are rounded down to multiples of this, whereby images are distorted a little; 1 keeps them."""
    eval_size: int = Field(800, gt=0)
    """Pixels of the shortest side in evaluation."""

    @model_validator(mode="after")
    def _possible(self) -> BoxAugment:
        low, high = self.crop_range
        if not 0 < low <= high:
            raise ValueError("`crop_range` is the least and the greatest side of a crop, in this order")
        if min(*self.sizes, *self.crop_sizes, self.max_size, self.eval_size) < self.multiple_of:
            raise ValueError(f"no side may be below `multiple_of` = {self.multiple_of}")
        return self


class BoxData(Block):
    """Where boxes are found, and which images are used."""

    augment: BoxAugment = BoxAugment()
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """What the four numbers of a box are in Parquet files and tables: COCO's left, top, width and height, or left, top,
    right and bottom. COCO's own JSON files always have the first."""
    annotations: dict[str, str] | None = None
    """Split → COCO's JSON file, relative to `data.path`; by default `annotations/instances_<split>.json`."""
    images: dict[str, str] | None = None
    """Split → folder of its images, relative to `data.path`; by default the split's name, such as `train2017`."""
    empty: Literal["keep", "drop"] = "keep"
    """Whether training images without objects are used."""


class DataConfig(Block):
    """Where images come from and what is done to them."""

    path: str
    """A Hub data set id, class folders (`train/…`, `val/…`), a folder of Parquet or tar files, or `builtin:digits`."""
    name: str | None = None
    """Configuration of the Hub data set."""
    revision: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    data_files: dict[str, str | list[str]] | None = None
    """Split → patterns of Parquet or tar files, relative to `path`."""
    boxes: BoxData | None = None
    """Images with boxes for object detection, instead of images with one class each; `{}` takes COCO's conventions."""
    streaming: bool = False
    """Read row groups as they are needed instead of the whole set first; the batches are the same."""
    image_column: str | None = None
    """Column of the images, when it is not clear; in tar files the suffix, e.g. `jpg`."""
    label_column: str | None = None
    """Column of the labels, when it is not clear; in tar files a suffix (`cls`) or a key of the JSON files."""
    image_size: int | None = Field(None, gt=0)
    """Pixels per side of every view whose model block says nothing else."""
    augment: AugmentConfig = AugmentConfig()
    num_labels: int | None = Field(None, gt=0)
    """Keep the labels of this many training images (chosen per class, keyed by seed); the rest count as unlabelled."""
    unlabelled: Literal["keep", "drop"] | str = "keep"
    """Whether training images without a label are used: `keep` or `drop` them, or name a folder of more of them, which
    lies in `path` or where paths begin. Those in `train/_unlabelled/` beside class folders need not be named."""
    shuffle_block: int = Field(2, ge=1)
    """Row groups of a lane whose rows are shuffled together; streaming holds lanes × this many in memory."""
    lanes: int = Field(64, ge=1)
    """Sequences of row groups that feed a global batch side by side. Processes × workers up to this number
    read different row groups; the order depends on it, and not on them."""
    decoder: Literal["torchvision", "pil"] = "torchvision"
    """What decodes, crops and resizes training JPEGs: torchvision on uint8 tensors (about twice as fast, 50 dB or more
    from PIL on photographs), or PIL throughout, as the official code. Other formats and evaluation always use PIL."""
    hold: Literal["auto"] | bool = "auto"
    """Decode each image once and hold its view as uint8; images are then moved and flipped on the device. The batches
    are the same, and no worker processes are started for them. `auto` holds sets of small images (64 pixels, 2 GiB,
    an eighth of the machine's memory at most) unless `augment` changes more than their place; it holds evaluation
    images too."""
    max_corrupt: int = Field(100, ge=0)
    """Unreadable images that are tolerated (replaced by the next readable row and counted) before the run stops."""


class EmaConfig(Block):
    """An exponential moving average of the student's weights."""

    decay: float = Field(0.9999, gt=0, lt=1)
    start: Literal["initial_weights", "first_step"] = "initial_weights"
    """Whether the average starts from the initial weights (DeiT, mmcv) or those after the first step (mmengine)."""
    warmup: bool = False
    """Raise the decay from 0 at the start, as timm's `use_warmup`."""
    buffers: Literal["average", "copy"] = "average"
    """BatchNorm statistics: averaged like weights, or copied."""
    export: bool = True
    """Whether the artefact holds the average (true) or the raw weights."""


def _expanded(path: str) -> str:
    """A path with `~` and `$VARIABLES` replaced, as a shell does."""
    if not path.strip() or "\0" in path:
        raise ValueError("expected the path of a folder")
    full = os.path.expanduser(os.path.expandvars(path))
    # a whole name in a path; elsewhere a dollar may be meant
    if unset := re.search(r"(?:^|/)(\$(?:\w+|\{[^}]*\}))(?=/|$)", full):
        raise ValueError(f"the variable {unset[1]} is not set")
    if full.startswith("~"):
        raise ValueError(f"no user {full.partition('/')[0]} on this machine")
    return full


Folder = Annotated[str, AfterValidator(_expanded)]


class TrainConfig(Block):
    """The engine; names and meanings of transformers' TrainingArguments where they are the same."""

    output_dir: Folder
    seed: int = 0
    per_device_train_batch_size: int = Field(32, gt=0)
    per_device_eval_batch_size: int | None = Field(None, gt=0)
    """By default the training batch size."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, gt=0)
    """Optimiser steps; overrides `num_train_epochs`."""
    optim: str = "adamw"
    """Any optimiser of `timm.optim`: adamw, lamb, `momentum` (plain SGD), `sgd` (SGD with Nesterov momentum), …"""
    learning_rate: float = Field(5e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    decay_norm_and_bias: bool = False
    """Apply weight decay to 1-d parameters and biases too."""
    no_weight_decay: tuple[str, ...] = ()
    """Further parameters without weight decay, by pattern: `student.network.pos_embed`, `methods.*.position`."""
    momentum: float = Field(0.9, ge=0, lt=1)
    optim_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimiser, e.g. `{betas: [0.9, 0.95]}`."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    lr_scheduler_type: Literal["cosine", "linear", "step", "multistep", "constant"] = "cosine"
    lr_schedule_on: Literal["step", "epoch", "epoch_after_warmup"] = "step"
    """Whether the learning rate moves at every step or at epoch ends. `epoch_after_warmup` warms up at every step, the
    last of which has the full rate, and its curve then spans the epochs that are left (mmengine); otherwise the step
    after the warm-up is the first at the full rate, and the curve spans the whole run (timm)."""
    lr_schedule_lag: DurationField = Duration(0.0, "steps")
    """How far the schedule is behind: official loops that set the rate after a step or an epoch, and not before it,
    take two of them at the first rate (`1 epochs` in DeiT's)."""
    warmup_steps: DurationField = Duration(0.0, "steps")
    """`5 epochs`, `500 steps`, 500, or a ratio of the run below 1."""
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_at: tuple[DurationField, ...] = ()
    """Milestones of `multistep`, or the single period of `step`."""
    lr_decay_rate: float = Field(0.1, gt=0)
    max_grad_norm: float | None = Field(None, gt=0)
    ema: EmaConfig | None = None
    full_determinism: bool = False
    """On a GPU: only kernels that add in a fixed order, so that a run, and its continuation, repeat to the bit; an
    operation that has none ends the run in a line that names it. A CPU needs nothing of the kind."""
    bf16: bool = False
    fp16: bool = False
    torch_compile: bool = False
    channels_last: bool | None = None
    """Keep maps with their channels last in memory. By default on a GPU in half precision, whose kernels for
    BatchNorm and convolutions want it, unless a network is sharded; nowhere else."""
    activation_checkpointing: bool = False
    sync_batchnorm: bool = False
    """Statistics of the student's BatchNorm over all processes (GPUs only); methods' own norms stay local."""
    dataloader_num_workers: int = Field(0, ge=0)
    dataloader_prefetch_factor: int = Field(4, gt=0)
    """Batches that the workers together are ahead."""
    logging_steps: int = Field(50, gt=0)
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    eval_steps: int | None = Field(None, gt=0)
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_steps: int | None = Field(None, gt=0)
    save_total_limit: int | None = Field(2, gt=0)
    load_best_model_at_end: bool = False
    """Export the weights of the best evaluation instead of the last ones."""
    metric_for_best_model: str | None = None
    """By default the number that the task is judged by: `eval_top1` of classifiers, `eval_ap` of detectors."""
    greater_is_better: bool | None = None
    """By default as the metric says: an nll, a loss or a calibration error is better when low."""
    resume_from_checkpoint: bool | Folder | None = None
    """By default an unfinished run of the same recipe in `output_dir` is continued (to the bit); true demands one,
    false starts over, a path names a checkpoint folder."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers, by accelerate's names: tensorboard, wandb, trackio, …"""
    run_name: str | None = None
    """What trackers call the run; by default the name of `output_dir`."""
    use_cpu: bool = False
    cpu_threads: int | Literal["auto"] = "auto"
    """Threads per process on a CPU; `auto` leaves room for what else runs on the machine."""
    disable_tqdm: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        for what in ("eval", "save"):
            if getattr(self, f"{what}_strategy") == "steps" and getattr(self, f"{what}_steps") is None:
                raise ValueError(f"`{what}_strategy: steps` needs `{what}_steps`")
        if self.lr_scheduler_type in ("step", "multistep") and not self.lr_decay_at:
            raise ValueError(f"`lr_scheduler_type: {self.lr_scheduler_type}` needs `lr_decay_at`")
        if self.lr_scheduler_type == "step" and len(self.lr_decay_at) > 1:
            raise ValueError("`lr_scheduler_type: step` has one period in `lr_decay_at`; use multistep for milestones")
        return self

    def lies_channels_last(self, device: str, sharded: bool = False) -> bool:
        """Whether networks on a device of this type keep their maps with channels last."""
        usual = device == "cuda" and (self.bf16 or self.fp16) and not sharded
        return usual if self.channels_last is None else self.channels_last

    def is_due(self, what: Literal["eval", "save"], step: int, epoch_end: bool) -> bool:
        """Whether `eval_strategy` or `save_strategy` asks for something after a step."""
        strategy, every = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps")
        return epoch_end if strategy == "epoch" else strategy == "steps" and step % every == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as callbacks written for transformers ask for them."""
        return self.model_dump(mode="json")

    def to_json_string(self) -> str:
        """The same as text."""
        return self.model_dump_json(indent=2)


class EvalConfig(Block):
    """What is measured on the evaluation split."""

    max_samples: int | None = Field(None, gt=0)
    teacher: bool = True
    """Measure top-1 of the teacher and the student's agreement with it."""
    report: bool = True
    """Draw `report/` when the run ends: curves, class-wise gains, where student and teacher look and disagree."""
    report_samples: int = Field(1000, gt=0)
    """Evaluation images that the report looks at."""


class HubConfig(Block):
    """What goes to the Hub, when, and where; names of transformers' TrainingArguments. The token comes from
    `hf auth login` or the variable HF_TOKEN, never from a recipe."""

    push_to_hub: bool = False
    """Push the student with its card when the run ends; the repository is made before the first step."""
    hub_model_id: str | None = None
    """`user/name`; by default the name of `train.output_dir` under the token's user."""
    hub_strategy: Literal["end", "every_save", "checkpoint"] = "end"
    """`every_save` also pushes the student at every save, in the background; `checkpoint` the newest checkpoint too,
    so that the same command continues the run on another machine."""
    hub_private_repo: bool | None = None
    """Make a new repository private; by default the organisation's setting decides."""
    hub_revision: str | None = None
    """Branch to push to; made when it is missing."""
    license: str = "apache-2.0"
    """License of the weights, as the Hub's card names it."""
    tags: tuple[str, ...] = ()
    """Further tags of the model card."""
    data_pictures: bool = False
    """Show evaluation images in the model card too (where the networks look, where they disagree, what detectors find);
    whoever may read the repository sees them."""


class PublishedConfig(Block):
    """A score that was published for a run."""

    score: float
    """In the unit of the run's own score: top-1 in percent, or average precision."""
    source: str
    """Who published it."""


def task_named(values: Mapping[str, Any]) -> Any:
    """The task of a recipe given as plain values: what it names, else what its data block belongs to."""
    data = values.get("data")
    boxes = isinstance(data, Mapping) and data.get("boxes") is not None
    return values.get("task") or (_DETECTION if boxes else DEFAULT)


class Recipe(Block):
    """A whole run. Read one with :func:`kd_hf.recipe.read.load_recipe`."""

    task: str = DEFAULT
    """What is learned, by the Hub's name: `image-classification`, `object-detection` (which `data.boxes` implies), or a
    task of another package."""
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name, instead of `teacher`."""
    baseline: Literal["train"] | float | None = None
    """What the student is compared with: a known top-1 in percent, or `train`: the same student, data, seed and steps
    without teacher and methods (and without unlabelled images) is trained too."""
    cell: str | None = None
    """Which of the recipe's `cells` this is: named blocks of changes to the recipe, such as one for each method.
    Several are laid over each other: `wttm+crd`."""
    published: PublishedConfig | None = None
    """What was published for this run; it is shown beside what is measured."""
    methods: dict[str, MethodBlock] = Field(default_factory=dict)
    """Losses by method name; `task` is the ordinary loss on labels and is there with weight 1 unless changed."""
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _one_kind_of_teacher(self) -> Recipe:
        if self.teacher is not None and self.teachers:
            raise ValueError("give either `teacher` or `teachers`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _task_by_its_data(cls, values: Any) -> Any:
        return {**values, "task": task_named(values)} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _blocks_of_the_task(self) -> Recipe:
        try:
            task_entry(self.task)
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.task != _DETECTION and self.data.boxes is not None:
            raise ValueError(f"`data.boxes` is for `task: {_DETECTION}`; the task is {self.task}. Remove one of them")
        if self.task == _DETECTION and self.data.boxes is None:
            raise ValueError(f"`task: {_DETECTION}` needs the block `data.boxes`; `{{}}` takes COCO's conventions")
        if self.student.body is not None and self.task != _DETECTION:
            raise ValueError("`student.body` is for detectors (`data.boxes`); a classifier takes `student.weights`")
        return self

    def method_of(self, name: str) -> str:
        """Which method a block of `methods` means: the one it names, else its own name, else the task's own loss."""
        block = self.methods.get(name)
        named = block.method if block is not None else None
        return named or (task_entry(self.task).loss if name == TASK else name)

    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Teachers by name; a single `teacher` is called 'teacher'."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers)
