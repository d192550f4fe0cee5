"""The ONNX files for timing: each student's exported file, and each teacher's, which is written for the page only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litdistill.export.export import export
from litdistill.export.predict import runtime
from litdistill.export.writers import write_format
from litdistill.features.outputs import run_network
from litdistill.models.preprocess import Preprocessed
from litdistill.utils.checkpoint import write_atomically
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import MANIFEST, ExportMetadata, read_manifest, verified


def shipped_file(folder: Path, precision: str, summary: dict[str, Any], trust: Sequence[str] = ()) -> Path:
    """Returns the verified ONNX file of a run; exports the student where there is none."""
    manifest = folder / "export" / MANIFEST
    files = read_manifest(manifest) if manifest.is_file() else {}
    for name, entry in files.items():
        right = entry.get("format") == "onnx" and entry.get("precision") == precision and entry.get("preprocessing")
        if right and entry.get("student_sha256") == summary["student"]["sha256"]:
            path = manifest.parent / Path(name).name
            content, facts = verified(path)
            runtime(content, facts, path)  # raises UserError for external weights
            return path
    return export(folder, "onnx", precision, trust=trust)[0]


def write_teacher(net: nn.Module, data: Any, path: Path) -> Path:
    """Writes the teacher as ONNX, like an exported student; raises `UserError` where its logits differ from the network's."""
    preprocessing = any(isinstance(m, Preprocessed) for m in net.modules())
    entry = {"format": "onnx", "precision": "fp32", "preprocessing": preprocessing}
    # The file includes the preprocessing, which may differ between members of an ensemble.
    inputs = next(iter(data.batches("test"))).inputs[:64]
    facts = ExportMetadata("onnx", preprocessing, list(data.class_names), [], [], None, list(inputs.shape[1:]), {})
    write_atomically(path, lambda temporary: write_format(net.cpu(), data, temporary, entry, facts, 0))
    with torch.no_grad():
        expected = run_network(net.eval(), inputs).main
    given = torch.from_numpy(runtime(path.read_bytes(), facts, path)(inputs.numpy()))
    if not torch.allclose(given, expected, atol=1e-3 * float(expected.abs().max()), rtol=0):
        raise UserError(f"{path} gives other logits than the teacher: it cannot be timed in the students' runtime.")
    return path
