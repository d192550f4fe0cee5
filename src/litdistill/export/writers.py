"""Writers of the export formats; `litdistill.export.export` checks and moves the files."""

from __future__ import annotations

import copy
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from litdistill.compress.quantize import Int8, converted, quiet
from litdistill.data.foreign import training_inputs
from litdistill.export.predict import build_net as named_net
from litdistill.features.outputs import to_outputs
from litdistill.models.preprocess import (
    Preprocess,
    as_plain_modules,
    bare,
    plain_modules,
    preprocess_of,
    without_preprocessing,
    wrap,
)
from litdistill.tasks.base import Task
from litdistill.types import Outputs
from litdistill.utils.checkpoint import load_state_dict_checked, save_student
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import BOXES, MASK, MISSING, OUTPUT_NAMES, ExportMetadata


class ExportWrapper(nn.Module):
    """The network to export: returns float32 logits of raw images, or of normalized images without `preprocessing`.

    It includes the network's preprocessing, or those of its members where they differ. With `half` the network computes in
    float16 after the preprocessing; inputs and outputs keep their types. `traced`: it is traced, and not stored by its keys.
    `task`: adds its post-processing, and returns a tuple where it has several outputs (`Task.exported`).
    """

    def __init__(
        self,
        net: nn.Module,
        preprocessing: bool = True,
        half: bool = False,
        traced: bool = False,
        task: Task | None = None,
    ):
        super().__init__()
        self.task = task or Task()
        own = preprocess_of(net)
        inside = as_plain_modules(net) if preprocessing and own is None else without_preprocessing(net)
        self.net = (plain_modules(inside) if traced else inside).cpu().eval().requires_grad_(False)
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            # Weights in channels-last memory format are traced to needless gathers.
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        self.preprocess = copy.deepcopy(own).cpu() if preprocessing and own is not None else nn.Identity()
        self.half_precision = half
        if half:
            self.net.half()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        inputs = self.preprocess(images)
        half = self.half_precision and inputs.is_floating_point()  # token ids stay integers
        outputs = to_outputs(self.net(inputs.half() if half else inputs))
        if self.half_precision:
            outputs = Outputs({k: v.float() for k, v in outputs.heads.items()})
        found = self.task.exported(outputs, images)
        return found if len(found) > 1 else found[0]


def write_format(
    student: nn.Module,
    data: Any,
    path: Path,
    entry: dict[str, Any],
    facts: ExportMetadata,
    calibration: int,
    task: Task | None = None,
) -> None:
    """Writes the file; adds the quantization's settings to `entry`. `task`: adds its post-processing."""
    metadata = {k: json.dumps(v) for k, v in entry.items()}
    model = ExportWrapper(
        student, facts.preprocessing, entry["precision"] == "fp16", facts.format != "safetensors", task
    ).eval()
    example = model_inputs(student, data, 2, facts.preprocessing)
    with quiet():
        if facts.format == "safetensors":
            try:
                load_state_dict_checked(bare(named_net(facts)), model.net.state_dict(), "this run", "student")
            except UserError as error:
                raise UserError(
                    f"As safetensors nobody could rebuild this network; use format=onnx. {error}"
                ) from error
            save_student(model.net, path, metadata)
        elif facts.format == "torchscript":
            _write_torchscript(model, example, path)
        elif facts.format == "pt2":
            with path.open("wb") as file:
                program, own = _traced(model, example), model.task.own_operators("pt2")
                torch.export.save(program.run_decompositions(own) if own else program, file)
        elif isinstance(bare(student), Int8):
            entry["quantization"] = {
                "tool": "torchao.quantization.pt2e",
                "format": "QDQ",
                "activations": "uint8 per tensor",
                "weights": "int8 per channel, 7 bits",
            }
            small = wrap(converted(bare(student)), preprocess_of(student))  # type: ignore[arg-type]
            model = ExportWrapper(small, facts.preprocessing, task=task)
            metadata["quantization"] = json.dumps(entry["quantization"])
            _write_onnx(model.eval(), example, path, metadata)
        elif entry["precision"] == "int8":
            images = model_inputs(student, data, calibration, facts.preprocessing)
            entry["quantization"] = _write_int8(model, example, images, path, metadata)
        else:
            _write_onnx(model, example, path, metadata)


@torch.no_grad()
def model_inputs(student: nn.Module, data: Any, count: int, preprocessing: bool) -> Tensor:
    """Returns training samples as inputs of the exported file: raw, or preprocessed."""
    inputs = training_inputs(data, count)
    preprocess = None if preprocessing else preprocess_of(student)
    return (inputs if preprocess is None else preprocess(inputs)).clone(memory_format=torch.contiguous_format)


def _traced(model: ExportWrapper, example: Tensor) -> torch.export.ExportedProgram:
    """Returns the exported program for batches of any size, without paths of source files."""
    try:
        program = torch.export.export(
            model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=False
        )
    except Exception as error:  # torch.export raises many kinds of errors for code that it cannot trace
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.export cannot trace this student; use format=safetensors. {reason}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_torchscript(model: ExportWrapper, example: Tensor, path: Path) -> None:
    whole = io.BytesIO()
    try:
        torch.jit.save(torch.jit.freeze(torch.jit.trace(model, (example,))), whole)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"PyTorch {torch.__version__} cannot write this student as TorchScript, which it deprecates: use format=pt2. "
            f"{error}"
        ) from error
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            if not item.filename.endswith(".debug_pkl"):  # the paths of the source files
                new.writestr(item, old.read(item))


def _write_onnx(model: ExportWrapper, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    program = _traced(model, example)
    names = OUTPUT_NAMES.get(model.task.output_kind, ("logits",))
    try:
        import onnx

        made = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=names,
            verbose=False,
            custom_translation_table=model.task.own_operators("onnx"),
        )
    except (ModuleNotFoundError, torch.onnx.errors.OnnxExporterError) as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if isinstance(missing, ModuleNotFoundError):
            raise UserError(MISSING.format(missing.name)) from error
        raise UserError(f"This student cannot be written as ONNX; use format=pt2. {error}") from error
    assert made is not None
    proto = made.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]  # names of modules and paths of source files
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    _save_onnx(onnx, proto, path, metadata)


def _save_onnx(onnx: Any, proto: Any, path: Path, metadata: Mapping[str, str]) -> None:
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _write_int8(
    model: ExportWrapper, example: Tensor, images: Tensor, path: Path, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Quantizes statically by onnxruntime, calibrated on training images (N, C, H, W) without augmentation."""
    try:
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ModuleNotFoundError as error:
        raise UserError(MISSING.format(error.name)) from error
    feeds = ({"images": chunk.numpy()} for chunk in images.split(64))
    with tempfile.TemporaryDirectory() as folder:
        float_, ready, done = (Path(folder) / f"{n}.onnx" for n in ("float", "ready", "done"))
        _write_onnx(model, example, float_, {})
        quant_pre_process(float_, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            done,
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Weights have 7 bits: with 8, sums of U8S8 products overflow 16 bits on CPUs without VNNI, where outputs
            # would then differ from those that were checked.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=_float_nodes(onnx.load(ready), isinstance(model.preprocess, Preprocess), model.task),
        )
        options = {
            "tool": "onnxruntime.quantization.quantize_static",
            "format": "QDQ",
            "activations": "uint8 per tensor, MinMax",
            "weights": "int8 per channel, 7 bits",
            "calibration": f"{len(images)} training images",
        }
        _save_onnx(onnx, onnx.load(done), path, {**metadata, "quantization": json.dumps(options)})
    return options


class _Reader:
    """onnxruntime's interface for calibration data."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]):
        self.feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def _float_nodes(proto: Any, preprocessing: bool, task: Task) -> list[str]:
    """Returns the names of the nodes that stay in float: those of the preprocessing, where there is one, of a spectrogram,
    whose powers have a range of many magnitudes, and of group normalization, for which onnxruntime has no kernel in int8. Of
    boxes and masks also post-processing, which compares coordinates and scores, and the convolutions before it: whatever is
    lost there moves an edge of a box, and they are few."""
    dense = task.output_kind in (BOXES, MASK)
    return [
        *(_preprocessing_nodes(proto) if preprocessing else ()),
        *_spectrogram_nodes(proto),
        *_group_normalization_nodes(proto),
        *((*last_nodes(proto), *last_convolutions(proto)) if dense else ()),
    ]


PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def last_nodes(proto: Any) -> list[str]:
    """Returns the names of the nodes whose results reach no convolution and no product of matrices."""
    return _last(proto)[1]


def last_convolutions(proto: Any) -> list[str]:
    """Returns the names of the convolutions and products of matrices whose results reach no other."""
    return _last(proto)[0]


def _last(proto: Any) -> tuple[list[str], list[str]]:
    """Returns the names of the last products, and of the nodes behind them."""
    needed: set[str] = set()
    products, names = [], []
    for node in reversed(proto.graph.node):  # from the last executed
        reaches = bool(needed & set(node.output))
        if node.op_type in PRODUCTS or reaches:
            needed |= set(node.input)
            products += [node.name] * (not reaches)
        else:
            names.append(node.name)
    return products, names


def _group_normalization_nodes(proto: Any) -> list[str]:
    """Returns the names of the nodes of group normalization: it is written as instance normalization of reshaped maps, a
    product and a sum with constants."""
    reached: set[str] = set()
    names, constants = [], {i.name for i in proto.graph.initializer}
    for node in proto.graph.node:  # in order of execution
        follows = bool(reached & set(node.input))
        scaled = node.op_type in ("Mul", "Add") and bool(constants & set(node.input))
        if node.op_type == "InstanceNormalization" or (follows and (node.op_type == "Reshape" or scaled)):
            reached |= set(node.output)
            names.append(node.name)
    return names


def _spectrogram_nodes(proto: Any) -> list[str]:
    """Returns the names of the nodes from a short-time Fourier transform to the logarithm of its powers, and all before."""
    if not any(node.op_type == "STFT" for node in proto.graph.node):
        return []
    needed: set[str] = set()
    names = []
    for node in reversed(proto.graph.node):  # from the last executed
        if node.op_type == "Log" or needed & set(node.output):
            needed |= set(node.input)
            names.append(node.name)
    return names


def _preprocessing_nodes(proto: Any) -> list[str]:
    """Returns the names of the preprocessing nodes: casts, resizing, products and sums of the images with constants."""
    reached, names = {i.name for i in proto.graph.input}, []
    constants = {"", *(i.name for i in proto.graph.initializer)}
    for node in proto.graph.node:  # in order of execution
        if node.op_type in ("Cast", "Resize", "Mul", "Add") and all(i in reached | constants for i in node.input):
            reached |= set(node.output)
            names.append(node.name)
    return names
