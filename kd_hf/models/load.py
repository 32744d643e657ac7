"""The one door to networks: timm or transformers, by Hub id, folder, run folder or architecture name."""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_hf.errors import UserError, nearest
from kd_hf.info import Preprocessing
from kd_hf.models.download import download_model
from kd_hf.models.handle import ModelHandle, Origin, describe_timm, describe_transformers
from kd_hf.models.live import config_label_names, processor_preprocessing, timm_preprocessing
from kd_hf.models.pickles import PICKLES, with_safetensors
from kd_hf.models.quiet import quiet_transformers
from kd_hf.models.students import LIBRARY, OWN, STOCK_FACTS, Student, find_student, read_weights

if TYPE_CHECKING:
    from kd_hf.recipe.config import PreprocessingConfig

WEIGHTS = "model*.safetensors"
# what constructors and state dict loading raise when a recipe's values do not fit the network
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`load_model`."""

    model: str
    pretrained: bool
    num_classes: int | None
    image_size: int | None  # None for what takes images of any size
    revision: str | None
    kwargs: Mapping[str, Any]
    drop_path: float | None
    preprocessing: PreprocessingConfig | None
    trust_remote_code: bool
    allow_pickle: bool
    device: torch.device | None

    @property
    def on_meta(self) -> bool:
        """Whether only the shapes are wanted."""
        return self.device is not None and self.device.type == "meta"

    @property
    def weights(self) -> bool:
        """Whether weights must be read at all: on ``meta`` only the shapes are wanted."""
        return self.pretrained and not self.on_meta


@dataclass(frozen=True)
class Source:
    """What a model name turned out to be; `folder` and `config` (its config.json) unless it is only a name."""

    library: str
    architecture: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    student: Student | None = None  # when it is one of ours


def load_model(
    model: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    drop_path: float | None = None,
    preprocessing: PreprocessingConfig | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str | torch.device | None = None,
) -> ModelHandle:
    """Load or build an image classifier, in eval mode and float32.

    Args:
        model: a folder (timm or transformers layout, or a run folder with ``student/`` in it), a Hub id
            (``org/name``, ``hf-hub:org/name``), a timm architecture with or without tag (``resnet18``,
            ``timm/resnet50.a1_in1k``), ``transformers/<model_type>`` for a random network of that type, or
            ``kd_hf/<name>`` for one of :mod:`kd_hf.models.students`.
        pretrained: read the weights; else they are random.
        num_classes: K; where it differs from the weights', the classifier is new.
        image_size: pixels per side, passed to the constructor where the architecture is built for one size.
        revision: branch, tag or commit of the Hub repository.
        kwargs: constructor arguments (timm) or configuration values (transformers).
        drop_path: stochastic depth rate.
        preprocessing: overrides of the model's own mean, std, interpolation and crop.
        trust_remote_code: allow code of the repository to run (transformers).
        allow_pickle: where there are no safetensors, read the tensors of a pickled state dict (and nothing else of it).
        device: where the network goes. On ``meta`` neither weights are downloaded nor memory is used.

    Raises:
        UserError: unknown name, unreachable or gated repository, no safetensors, or arguments that do not fit.
    """
    request = Request(
        model=model,
        pretrained=pretrained,
        num_classes=num_classes,
        image_size=image_size,
        revision=revision,
        kwargs=dict(kwargs or {}),
        drop_path=drop_path,
        preprocessing=preprocessing,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        device=None if device is None else torch.device(device),
    )
    source = locate(request, {LIBRARY: _from_student, "": _from_architecture, "timm": _from_architecture})
    with tempfile.TemporaryDirectory() as scratch, building(request):
        source = with_weights_at_hand(request, source, Path(scratch))
        load = {"timm": _load_timm, "transformers": _load_transformers, LIBRARY: _load_own}[source.library]
        handle = load(request, source)
    handle.network.eval()
    if request.device is not None and not request.on_meta:
        handle.network.to(request.device)
    return handle


def with_weights_at_hand(request: Request, source: Source, scratch: Path) -> Source:
    """The source with safetensors in its folder, when weights are wanted."""
    if not request.weights or (source.folder is not None and any(source.folder.glob(WEIGHTS))):
        return source
    if request.allow_pickle and source.folder is not None:
        place = scratch / source.folder.parent.name / source.folder.name  # so that it still tells the commit
        return replace(source, folder=with_safetensors(source.folder, place))
    raise UserError(
        f"model '{request.model}' has no safetensors weights ({WEIGHTS}), and pickles are not loaded: convert them "
        "(`python -m kd_hf.convert`), set allow_pickle: true if you trust their source, or pretrained: false"
    )


# finding out what a name means


def locate(request: Request, named: Mapping[str, Callable[[Request, str], Source]]) -> Source:
    """Resolve the name; downloads what is needed from the Hub.

    Args:
        request: what is wanted.
        named: how a name that is no folder is read, by what stands before its slash.
    """
    scheme, _, rest = request.model.rpartition(":")
    name = rest if scheme in ("hf-hub", "local-dir") else request.model
    folder = _artefact_folder(Path(name).expanduser())
    if scheme != "hf-hub" and folder is not None:
        return _from_folder(folder)
    here = scheme != "hf-hub" and "/" in name and Path(name).is_dir()  # no repository is meant where a folder lies
    if scheme == "local-dir" or here or name.startswith((".", "/", "~")):
        raise UserError(f"model '{request.model}': there is no config.json in that folder, nor in a student/ within it")
    owner, _, short = name.rpartition("/")
    if owner == "transformers":
        return _from_model_type(request, short)
    if scheme != "hf-hub" and owner in named:
        return named[owner](request, short)
    return _from_hub(request, *name.partition("@")[::2])


def _artefact_folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "student") if (folder / "config.json").is_file()), None)


def _from_folder(folder: Path) -> Source:
    """Read config.json and tell from it which library wrote the folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not valid JSON: {error}") from error
    if config.get("library") == "torch":
        raise UserError(
            f"{folder} holds the weights of {config['architecture']}, which neither timm nor transformers can build: "
            "build it in Python, load model.safetensors into it and hand the network over"
        )
    if "architecture" in config:
        return Source("timm", config["architecture"], folder, config)
    if config.get("model_type") in OWN:
        return Source(LIBRARY, config["model_type"], folder, config)
    if "model_type" in config:
        return Source("transformers", config["model_type"], folder, config)
    raise UserError(f"{folder}/config.json has neither `architecture` (timm) nor `model_type` (transformers)")


def _from_model_type(request: Request, model_type: str) -> Source:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UserError(f"transformers has no model type '{model_type}'.{nearest(model_type, CONFIG_MAPPING.keys())}")
    refuse_weights(request)
    return Source("transformers", model_type)


def _from_student(request: Request, name: str) -> Source:
    student = find_student(name, request.model)
    refuse_weights(request)
    return Source(student.library, student.architecture, student=student)


def refuse_weights(request: Request) -> None:
    """Raise :class:`UserError` when weights are asked for by a name that has none."""
    if request.pretrained:
        raise UserError(
            f"model '{request.model}' is a random network of that type; for weights give a Hub id or a folder, "
            "or set pretrained: false"
        )


def _from_architecture(request: Request, name: str) -> Source:
    """A name of timm's registry, whose weights, if wanted, lie on the Hub."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise UserError(
            f"model '{request.model}': timm has no architecture '{architecture}'.{nearest(architecture, known)}"
        )
    tagged = timm.list_pretrained(architecture)
    if tag and name not in tagged:
        raise UserError(f"model '{request.model}': timm has no weights '{name}'.{nearest(name, tagged)}")
    if not request.weights:
        return Source("timm", name)
    known_weights = timm.get_pretrained_cfg(name)
    repository = known_weights.hf_hub_id if known_weights is not None else None
    if not repository:
        hint = nearest(name, tagged) or " It has none at all."
        raise UserError(f"model '{request.model}': timm names no Hub repository with its weights.{hint}")
    return _from_hub(request, repository, "")


def _from_hub(request: Request, repository: str, revision: str) -> Source:
    patterns = ["*.json"]
    if request.weights:
        patterns.append(WEIGHTS)
        patterns += [PICKLES] if request.allow_pickle else []
    if request.trust_remote_code:
        patterns.append("*.py")
    folder = download_model(repository, request.revision or revision or None, patterns)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"repository '{repository}' has no config.json, so it is neither a timm nor a transformers model"
        )
    return _from_folder(folder)


# building


@contextmanager
def building(request: Request) -> Iterator[None]:
    """Turn what the libraries raise on unfitting arguments into one line."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"model '{request.model}': its safetensors file is damaged ({error}); delete it, then download it again"
        ) from error
    except (*_BUILD_ERRORS, StrictDataclassError) as error:
        raise UserError(_explain(request, " ".join(str(error).split()), type(error).__name__)) from error


def _explain(request: Request, text: str, kind: str) -> str:
    """One line for what a constructor objected to, naming the recipe's key where it can be told."""
    if unknown := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        return _unknown_argument(request, unknown[1], unknown[2])
    if fixed := re.search(r"got multiple values for keyword argument '(\w+)'", text):
        return f"kwargs.{fixed[1]}: the architecture '{request.model}' fixes this argument; it cannot be given"
    return f"model '{request.model}' cannot be built: {kind}: {text[:300]}"


def _unknown_argument(request: Request, class_name: str, argument: str) -> str:
    """The message for a constructor argument that a timm class does not take."""
    if argument == "drop_path_rate" and argument not in request.kwargs:
        return f"drop_path: model '{request.model}' has no stochastic depth; leave drop_path out"
    classes = (
        getattr(module, class_name, None) for name, module in list(sys.modules.items()) if name.startswith("timm.")
    )
    known = next((list(inspect.signature(found).parameters) for found in classes if found is not None), [])
    return (
        f"kwargs.{argument}: {class_name} of model '{request.model}' takes no such argument.{nearest(argument, known)}"
    )


def _load_timm(request: Request, source: Source) -> ModelHandle:
    import timm

    if source.folder is not None:
        name, facts = f"local-dir:{source.folder}", source.config.get("pretrained_cfg", source.config)
    else:
        registered = timm.get_pretrained_cfg(source.architecture)
        name, facts = source.architecture, registered.to_dict() if registered is not None else {}
    arguments = {**(source.student.arguments if source.student else {}), **request.kwargs}
    if request.num_classes is not None:
        arguments["num_classes"] = request.num_classes
    if request.drop_path is not None:
        arguments["drop_path_rate"] = request.drop_path
    if request.image_size is not None and facts.get("fixed_input_size"):
        arguments["img_size"] = request.image_size
    more: dict[str, Any] = {"device": "meta"} if request.on_meta else {}
    if source.student:
        more["pretrained_cfg_overlay"] = STOCK_FACTS
    network = timm.create_model(name, pretrained=request.weights, **arguments, **more)
    if source.student and source.student.initialise:
        source.student.initialise(network)
    native = timm_preprocessing(network)
    info = replace(describe_timm(network, request.model, overridden(native, request)), native=native)
    origin = origin_of(request, source, {**source.config.get("model_args", {}), **arguments})
    return ModelHandle(network, info, origin, _timm_label_names(network, request, source))


def _timm_label_names(network: Any, request: Request, source: Source) -> tuple[str, ...]:
    """The classes that the weights know, when the network still has as many; ImageNet's as synset ids."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = source.config.get("label_names") or ()
    if not names and request.pretrained:
        subset = infer_imagenet_subset(network)
        names = ImageNetInfo(subset).label_names() if subset else ()
    return tuple(names) if len(names) == network.num_classes else ()


def _load_transformers(request: Request, source: Source) -> ModelHandle:
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    values, config = configuration(request, source)
    if isinstance(CLASSES.get(source.architecture), tuple) and not config.architectures:
        config.architectures = [CLASSES[source.architecture][0]]  # several classes: the plain one is first
    if request.weights and source.folder is not None:
        network = _with_weights(request, source.folder, config)
    else:
        with torch.device(request.device if request.on_meta and request.device else "cpu"):
            network = AutoModelForImageClassification.from_config(config, trust_remote_code=request.trust_remote_code)
    native = processor_preprocessing(processor_values(source.folder), config)
    if "image_size" in values:  # built for that size, so it cannot be shown another
        native = replace(native, image_size=values["image_size"])
    info = replace(describe_transformers(network, request.model, overridden(native, request)), native=native)
    origin = origin_of(request, source, values)
    return ModelHandle(network, info, origin, config_label_names(config))


def _load_own(request: Request, source: Source) -> ModelHandle:
    """Build a network of this package, by name or from its artefact; the code in the artefact is not run."""
    own = OWN[source.architecture]()
    if source.folder is not None:
        written = own.config.from_pretrained(source.folder)
    else:
        written = own.config(**(source.student.arguments if source.student else {}))
    values = config_values(request, written)
    config = own.config.from_dict(written.to_dict(), **values)
    with torch.device("meta" if request.on_meta else "cpu"):
        network = own.network(config)
    if request.weights and source.folder is not None:
        read_weights(network, source.folder)
    native = processor_preprocessing(processor_values(source.folder), config)
    if source.student:
        native = replace(source.student.preprocessing, image_size=native.image_size)
    if "image_size" in values:
        native = replace(native, image_size=values["image_size"])
    info = describe_timm(network, request.model, overridden(native, request))
    info = replace(info, native=native, library=LIBRARY)
    origin = origin_of(request, source, values)
    return ModelHandle(network, info, origin, config_label_names(config))


def configuration(request: Request, source: Source) -> tuple[dict[str, Any], Any]:
    """What the request changes, and the changed configuration, of a network of transformers."""
    from transformers import CONFIG_MAPPING, AutoConfig

    trust = {"trust_remote_code": request.trust_remote_code}
    if "auto_map" in source.config and source.architecture not in CONFIG_MAPPING and not request.trust_remote_code:
        raise UserError(
            f"model '{request.model}' brings code of its own ({source.architecture}) that would run here; "
            "read it, then set trust_remote_code: true"
        )
    if source.folder is None:
        values = config_values(request, CONFIG_MAPPING[source.architecture]())
        return values, AutoConfig.for_model(source.architecture, **values)
    values = config_values(request, AutoConfig.from_pretrained(source.folder, **trust))
    return values, AutoConfig.from_pretrained(source.folder, **values, **trust)


def config_values(request: Request, config: Any) -> dict[str, Any]:
    """What the request changes in a transformers configuration; every key must be one the configuration has."""
    known = {*config.to_dict(), "num_labels"}
    for key in request.kwargs:
        if key not in known:
            raise UserError(f"kwargs.{key}: {config.model_type} has no such configuration value.{nearest(key, known)}")
    values = dict(request.kwargs)
    if request.num_classes is not None and request.num_classes != config.num_labels:
        values["id2label"] = {index: f"LABEL_{index}" for index in range(request.num_classes)}
        values["label2id"] = {name: index for index, name in values["id2label"].items()}
    if request.image_size is not None and "image_size" in known:
        values["image_size"] = request.image_size
    if request.drop_path is not None:
        if "drop_path_rate" not in known:
            raise UserError(f"drop_path: model '{request.model}' has no stochastic depth; leave drop_path out")
        values["drop_path_rate"] = request.drop_path
    return values


def _with_weights(request: Request, folder: Path, config: Any) -> nn.Module:
    """Read the weights of a transformers folder; only the classifier may be new."""
    from transformers import AutoModelForImageClassification

    with quiet_transformers():
        network, report = AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
        )
    body = f"{network.base_model_prefix}."
    other_size = sorted(key for key, *_ in report["mismatched_keys"] if key.startswith(body))
    if other_size:
        raise UserError(
            f"model '{request.model}': {other_size[0]} has another shape in the weights; transformers does not resize "
            "them, so leave out image_size and kwargs, or set pretrained: false"
        )
    missing = sorted(key for key in report["missing_keys"] if key.startswith(body) and "pooler" not in key)
    if missing:
        raise UserError(f"model '{request.model}': the weights lack {missing[0]} ({len(missing)} missing in all)")
    return network


def processor_values(folder: Path | None) -> dict[str, Any]:
    """What preprocessor_config.json says, if it is there."""
    path = folder / "preprocessor_config.json" if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def overridden(own: Preprocessing, request: Request) -> Preprocessing:
    """A network's own preprocessing with the request's changes."""
    changes = request.preprocessing.model_dump(exclude_none=True) if request.preprocessing is not None else {}
    if request.image_size is not None:
        changes["image_size"] = request.image_size
    return replace(own, **changes)


def origin_of(request: Request, source: Source, arguments: Mapping[str, Any]) -> Origin:
    """Where a network came from; `arguments` are those it was built with."""
    # a folder of the Hub's cache is named after its commit, which says more than the branch that was asked for
    commit = source.folder.name if source.folder and source.folder.parent.name == "snapshots" else request.revision
    return Origin(source.library, source.architecture, request.model, commit, request.pretrained, dict(arguments))
