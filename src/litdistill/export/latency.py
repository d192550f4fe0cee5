"""Latency of ONNX files with their post-processing and without it: of detectors and of networks that give masks.

    python scripts/benchmark_detector.py <run>

Post-processing is all that follows the last convolutions of a file: the decoding of boxes, scores and suppression, or the
choice of a class for each pixel.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.evaluation import latency
from litdistill.export.export import names_and_shape
from litdistill.export.writers import last_nodes, write_format
from litdistill.models.preprocess import Preprocessed
from litdistill.tasks.base import Task
from litdistill.utils.manifest import BOXES, MASK, ExportMetadata

BATCHES = (1, 8)
WITHOUT = "without post-processing"


def has_postprocessing(task: Task) -> bool:
    """Returns whether exported files of a task have post-processing."""
    return task.output_kind in (BOXES, MASK)


def onnx_of(net: nn.Module, data: Any, task: Task) -> bytes:
    """Returns a network with its preprocessing and post-processing as an ONNX file, unchecked and for timing alone."""
    names, shape = names_and_shape(net.cpu().eval(), data, task)
    inside = any(isinstance(m, Preprocessed) for m in net.modules())
    facts = ExportMetadata("onnx", inside, names, [], [], None, shape, {}, task.output_kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_format(net, data, path, {"precision": "fp32"}, facts, 0, task)
        return path.read_bytes()


def without_postprocessing(content: bytes) -> bytes:
    """Returns an ONNX file up to its last convolutions, whose results are its outputs; those of int8 in float."""
    import onnx

    proto = onnx.load_from_string(content)
    last, given = set(last_nodes(proto)), {i.name for i in proto.graph.initializer}
    network = [node for node in proto.graph.node if node.name not in last]
    made = {name for node in network for name in node.output}
    for node in proto.graph.node:  # in order of execution
        if (
            node.name in last
            and node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and {*node.input} <= made | given
        ):
            network.append(node)
            made |= {*node.output}
    read = {name for node in network for name in node.input}
    outputs = [name for node in network for name in node.output if name not in read]
    kept = {node.name for node in network}
    nodes = [node for node in proto.graph.node if node.name in kept]
    del proto.graph.node[:], proto.graph.output[:]
    proto.graph.node.extend(nodes)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    weights = [i for i in proto.graph.initializer if i.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(weights)
    return bytes(proto.SerializeToString())


def time_files(
    files: Mapping[str, bytes], inputs: Tensor, reference: str, threads: int = 1, rounds: int = latency.ROUNDS
) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns `time_batches` of ONNX files with post-processing on the CPU, for each batch size of `BATCHES`."""
    runs = {name: latency.onnx_run(content, threads) for name, content in files.items()}
    bare = {name: latency.onnx_run(without_postprocessing(content), threads) for name, content in files.items()}
    clock = time.thread_time if threads == 1 else None
    return time_batches(runs, bare, inputs, reference, BATCHES, rounds, clock)


def time_batches(
    runs: Mapping[str, latency.Run],
    bare: Mapping[str, latency.Run],
    inputs: Tensor,
    reference: str,
    batches: Sequence[int],
    rounds: int = latency.ROUNDS,
    work_clock: Callable[[], float] | None = None,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns by model and batch size what `litdistill.evaluation.latency.time_models` measures, all by turns; what it measures
    of one of `bare`, the models without their post-processing, has the key `WITHOUT`.

    `inputs`: test samples (N, ...), of which batches are made. `reference`: the model that ratios are to; those of
    `bare` are to it without post-processing.
    """
    every = {**runs, **{f"{name}, {WITHOUT}": run for name, run in bare.items()}}
    references = {name: reference if name in runs else f"{reference}, {WITHOUT}" for name in every}
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in runs}
    for batch in batches:
        images = inputs[torch.arange(batch) % len(inputs)].numpy()
        measured = latency.time_models(every, images, references, rounds, work_clock=work_clock)
        for name in runs:
            found[name][batch] = measured[name]
            if name in bare:
                found[name][batch][WITHOUT] = measured[f"{name}, {WITHOUT}"]
    return found


def latency_table(found: Mapping[str, Mapping[int, Mapping[str, Any]]], reference: str) -> list[list[str]]:
    """Returns head and rows of what `time_files` returns: a row for each file and batch size, with and without."""
    rows = [["network", "batch", "p50 ms", "p95 ms", f"times as fast as the {reference}"]]
    for name, batches in found.items():
        for batch, timed in batches.items():
            for words, one in ((name, timed), (f"{name}, {WITHOUT}", timed[WITHOUT])):
                ratio = f"{1 / one['ratio'][1]:.2f}"
                rows.append([words, str(batch), f"{one['p50_ms']:.2f}", f"{one['p95_ms']:.2f}", ratio])
    return rows
