"""One file that runs without kd_hf: traced, written, read back and compared with the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from kd_hf.models.handle import ModelHandle

FACTS = "model.json"  # the entry of the file that says what goes in and what comes out
INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
TRACED = 2  # images; 0 and 1 would become constants of the graph
CHECKED = (1, TRACED, 5)
OLDEST_OPSET = 18  # of torch's exporter
ONNX_LIMIT = 2**31  # bytes of a protobuf message, so of a file with its weights inside
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[["Tensor"], "Tensor"]  # normalised images [B, 3, H, W] → logits [B, K]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    `write(program, path, facts, opset)` writes it, `read(path)` gives what it computes; `limit` bounds the difference
    from the model, relative to the largest logit; `usage` is how to run it, for a person.
    """

    suffix: str
    limit: float
    write: Callable[[ExportedProgram, Path, str, int | None], None]
    read: Callable[[Path], Run]
    usage: str
    facts: str


@dataclass(frozen=True)
class Export:
    """A written file and how far it is from the model: the largest difference by batch size, relative to the logits."""

    path: Path
    format: str
    image_size: int
    num_classes: int
    differences: Mapping[int, float]

    def lines(self) -> list[str]:
        """What was written, how good it is and how to use it."""
        form = FORMATS[self.format]
        worst, sizes = max(self.differences.values()), ", ".join(map(str, self.differences))
        side = self.image_size
        usage = form.usage.format(path=str(self.path), size=side)
        return [
            f"{self.path}: {self.path.stat().st_size / 1e6:.1f} MB, {self.format}, "
            f"{INPUT} [{BATCH}, 3, {side}, {side}] float32 → {OUTPUT} [{BATCH}, {self.num_classes}]",
            f"largest difference from the model: {worst:.1e} of its largest logit, at batch sizes {sizes} "
            f"(allowed: {form.limit:.0e})",
            f"preprocessing and class names: {FACTS} inside the file ({form.facts})",
            *(f"    {line}" for line in usage.splitlines()),
        ]


def export_model(
    model: str,
    format: str,
    output: str | Path | None = None,
    *,
    image_size: int | None = None,
    opset: int | None = None,
) -> Export:
    """Write a model as one file with a dynamic batch dimension, weights included, and check its numbers.

    Args:
        model: as in :func:`kd_hf.models.load.load_model`; its weights are read.
        format: a key of :data:`FORMATS`.
        output: the file; by default ``model.pt2`` or ``model.onnx`` in the model's folder, for other models in the
            working folder.
        image_size: pixels per side, where the file shall not take the model's own.
        opset: of ONNX; by default torch's choice.

    Raises:
        UserError: a missing package or model, an option of the other format, a network that cannot be traced, or a
            file whose logits are not the model's; nothing is left behind then.
    """
    from kd_hf.models.load import load_model

    if format not in FORMATS:
        raise UserError(f"format: unknown '{format}'.{nearest(format, FORMATS)}")
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size: expected 1 or more (got {image_size})")
    form = FORMATS[format]
    target = _target(model, output, form.suffix)
    _check_options(format, opset)
    # a folder is never taken for a Hub id
    handle = load_model(f"local-dir:{model}" if Path(model).is_dir() else model, pretrained=True, image_size=image_size)
    if format == "onnx":
        _check_size(handle)
    network = _logits_only(handle.network)
    side = handle.info.preprocessing.image_size
    program = trace(network, side)
    with _replacing(target) as temporary:
        form.write(program, temporary, facts_of(handle, model), opset)
        differences = compare(network, form.read(temporary), side)
        for count, difference in differences.items():
            if not difference <= form.limit:  # also NaN
                raise UserError(
                    f"{target} was not written: at batch size {count} the exported logits differ from those of "
                    f"'{model}' by {difference:.1e} of the largest, allowed is {form.limit:.0e}"
                )
    return Export(target, format, side, handle.info.num_classes, differences)


def _target(model: str, output: str | Path | None, suffix: str) -> Path:
    if output is None:
        return Path(model, f"model{suffix}") if Path(model).is_dir() else Path(f"{Path(model).name}{suffix}")
    target = Path(output).expanduser()
    if target.suffix != suffix:
        raise UserError(f"-o: expected a file name that ends in {suffix} (got '{output}')")
    return target


def _check_options(format: str, opset: int | None) -> None:
    if format != "onnx":
        if opset is not None:
            raise UserError(f"--opset: only ONNX has operator sets; leave it out, or use --format onnx (got {format})")
        return
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'kd_hf[export]'")
    from onnx.defs import onnx_opset_version

    newest = onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"--opset: expected {OLDEST_OPSET} to {newest} (got {opset})")


def _check_size(handle: ModelHandle) -> None:
    size = sum(tensor.nbytes for tensor in handle.network.state_dict().values())
    if size >= ONNX_LIMIT:
        raise UserError(f"--format onnx: a file holds 2 GB, the model has {size / 1e9:.1f} GB; use torch-export")


def facts_of(handle: ModelHandle, model: str) -> str:
    """What an application has to know, as JSON: name, input, output, preprocessing and class names."""
    from kd_hf.version import __version__

    preprocessing = asdict(handle.info.preprocessing)
    side = preprocessing["image_size"]
    facts = {
        "name": (Path(model).resolve() if Path(model).is_dir() else Path(model)).name,
        "architecture": handle.origin.architecture,
        "input": {"name": INPUT, "shape": [BATCH, 3, side, side], "dtype": "float32", "channels": "RGB"},
        "output": {"name": OUTPUT, "shape": [BATCH, handle.info.num_classes]},
        "preprocessing": preprocessing,
        "label_names": list(handle.label_names),
        "producer": f"kd_hf {__version__}",
    }
    return json.dumps(facts, indent=1, ensure_ascii=False)


def _logits_only(network: nn.Module) -> nn.Module:
    """The network as a function of images to logits: transformers' networks give an object that holds them."""
    from torch import Tensor, nn

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: Tensor) -> Tensor:
            output = self.network(pixels)
            return output if isinstance(output, Tensor) else output.logits

    return Logits().eval().requires_grad_(False)


def trace(network: nn.Module, side: int) -> ExportedProgram:
    """The graph of a network for any number of images of `side` pixels, without the paths of this machine in it.

    Raises:
        UserError: torch cannot follow the network.
    """
    import torch

    export = partial(
        torch.export.export, network, (_images(TRACED, side),), dynamic_shapes={INPUT: {0: torch.export.Dim(BATCH)}}
    )
    try:
        program = export()
    except Exception as error:
        try:
            # the plain trace takes len(x) for a constant; the strict one does not, but follows less
            program = export(strict=True)
        except Exception:
            raise UserError(f"torch.export cannot follow this network: {_first_line(error)}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    program.example_inputs = None
    return program


def _images(count: int, side: int) -> Tensor:
    import torch

    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


def compare(network: nn.Module, exported: Run, side: int) -> dict[int, float]:
    """Largest difference of the logits by batch size (1, traced, not traced), relative to the largest logit."""
    import torch

    differences = {}
    for count in CHECKED:
        images = _images(count, side)
        with torch.no_grad():
            expected, found = network(images), exported(images)
        if found.shape != expected.shape:
            raise UserError(
                f"the exported network gives {list(found.shape)} for {count} images, not {list(expected.shape)}"
            )
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        differences[count] = float((found - expected).abs().max() / scale)
    return differences


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Write a file under another name, which it changes for `target` at the end; an error leaves nothing behind."""
    from kd_hf.files import sync, writing

    temporary = target.with_name(f".tmp-{target.name}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _write_torch(program: ExportedProgram, path: Path, facts: str, opset: int | None) -> None:
    import torch

    torch.export.save(program, path, extra_files={FACTS: facts})


def _read_torch(path: Path) -> Run:
    import torch

    return torch.export.load(path).module()


def _write_onnx(program: ExportedProgram, path: Path, facts: str, opset: int | None) -> None:
    with _quiet("onnxscript"):
        exported = _convert(program, opset)
    found = exported.model.opset_imports.get("")
    if opset is not None and found != opset:
        raise UserError(f"--opset: this network has no form in operator set {opset}; torch gave {found}")
    exported.model.metadata_props[FACTS] = facts
    exported.save(path, external_data=False)


def _convert(program: ExportedProgram, opset: int | None) -> Any:
    import torch

    options: dict[str, Any] = {
        "input_names": [INPUT],
        "output_names": [OUTPUT],
        "dynamic_shapes": {INPUT: {0: BATCH}},
        "opset_version": opset,
        "verbose": False,
    }
    try:
        try:
            return torch.onnx.export(program, **options)
        except torch.onnx.OnnxExporterError:
            # masked attention: the layouts that the trace saw are not those of torch's own decomposition
            return torch.onnx.export(program.run_decompositions(), **options)
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"torch cannot convert this network to ONNX: {_first_line(error.__cause__ or error)}"
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep back what a library logs about optimisations and versions it does not reach; the result is checked."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_onnx(path: Path) -> Run:
    import onnxruntime
    import torch

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime {onnxruntime.__version__} cannot run the file: {_first_line(error)}") from error
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


FORMATS: Mapping[str, Format] = {
    "torch-export": Format(
        suffix=".pt2",
        limit=1e-6,  # the operations and kernels are the same; float32 resolves 1.2e-7
        write=_write_torch,
        read=_read_torch,
        usage="import torch\n"
        'model = torch.export.load("{path}").module()\n'
        "logits = model(torch.zeros(8, 3, {size}, {size}))",
        facts=f'torch.export.load(…, extra_files={{"{FACTS}": ""}})',
    ),
    "onnx": Format(
        suffix=".onnx",
        limit=1e-4,  # other kernels sum in another order; norms and softmax carry that through the blocks of a deep ViT
        write=_write_onnx,
        read=_read_onnx,
        usage="import numpy, onnxruntime\n"
        'session = onnxruntime.InferenceSession("{path}")\n'
        f'logits = session.run(None, {{{{"{INPUT}": numpy.zeros((8, 3, {{size}}, {{size}}), "float32")}}}})[0]',
        facts=f'session.get_modelmeta().custom_metadata_map["{FACTS}"]',
    ),
}
