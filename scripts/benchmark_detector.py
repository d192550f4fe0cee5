"""Times detectors in ONNX on one CPU thread, by turns: with and without post-processing, batch 1 and 8, p50 and p95.

python scripts/benchmark_detector.py runs/detection/<run>
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from litdistill.evaluation import latency
from litdistill.evaluation.evaluate import rebuild
from litdistill.export.export import names_and_shape
from litdistill.export.writers import write_format
from litdistill.models.preprocess import Preprocessed
from litdistill.tasks.base import Task
from litdistill.types import Outputs
from litdistill.utils.manifest import ExportMetadata

BATCHES = (1, 8)


class DenseHeads(Task):
    """Gives logits and boxes at every anchor, and chooses none."""

    def exported(self, outputs: Outputs, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat([head.flatten(1) for head in outputs.heads.values()], 1),)


def content(net, data, task, of) -> bytes:
    """Returns the ONNX file of a network, with what `task` adds to it."""
    names, shape = names_and_shape(net.cpu().eval(), data, of)
    inside = any(isinstance(m, Preprocessed) for m in net.modules())
    facts = ExportMetadata("onnx", inside, names, [], [], None, shape, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_format(net, data, path, {"precision": "fp32"}, facts, 0, task)
        return path.read_bytes()


def main(folder: str) -> None:
    data, distiller = rebuild(Path(folder))
    nets = {"student": distiller.deployed_student}
    if distiller.teacher is not None:
        nets["teacher"] = distiller.teacher.net
    runs = {}
    for name, net in nets.items():
        runs[name] = latency.onnx_run(content(net, data, distiller.task, distiller.task))
        runs[f"{name}, without post-processing"] = latency.onnx_run(content(net, data, DenseHeads(), distiller.task))
    inputs = next(iter(data.batches("test"))).inputs
    reference = "teacher" if "teacher" in nets else "student"
    print(f"| network | batch | p50 ms | p95 ms | times as fast as the {reference} |\n|---|---|---|---|---|")
    for batch in BATCHES:
        images = inputs[torch.arange(batch) % len(inputs)].numpy()
        found = latency.time_models(runs, images, reference, work_clock=time.thread_time)
        for name, one in found.items():
            print(f"| {name} | {batch} | {one['p50_ms']:.2f} | {one['p95_ms']:.2f} | {1 / one['ratio'][1]:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
