"""A small run with its exports, and what tests of exported files share."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file

from litdistill.data.sources import load as load_data
from litdistill.export.export import export
from litdistill.training.train import train
from litdistill.utils.files import write_text
from tests.conftest import compose_config

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


RUN = [
    *("method=supervised", "teacher=null", "student.widths=[8,16]", "trainer=cpu", "trainer.max_epochs=10"),
    *("data.per_class=60", "data.batch_size=32", "optimizer.lr=0.01"),
]
CASES = [  # format, precision, preprocessing in the file, file, tolerance
    ("onnx", "fp32", True, "student.onnx", 1e-4),
    ("onnx", "fp32", False, "student-normalized.onnx", 1e-4),
    ("onnx", "fp16", True, "student-fp16.onnx", 2e-2),
    ("onnx", "int8", True, "student-int8.onnx", 0.2),
    ("pt2", "fp32", True, "student.pt2", 1e-4),
    ("pt2", "fp16", False, "student-fp16-normalized.pt2", 2e-2),
    ("safetensors", "fp32", True, "student.safetensors", 1e-4),
    ("safetensors", "fp16", True, "student-fp16.safetensors", 2e-2),
    ("torchscript", "fp32", True, "student.pt", 1e-4),
]


@pytest.fixture(scope="session", name="run")
def run_fixture(tmp_path_factory):
    """The folder of one finished run, everything in `CASES` exported from it; one for all files of tests."""
    return exported(tmp_path_factory.getbasetemp() / "exports")


@cache
def exported(place: Path) -> Path:
    cfg = compose_config(place / "run", *RUN)
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    for format, precision, preprocessing, name, _ in CASES:
        path, _ = export(folder, format, precision, preprocessing, calibration=200)
        assert path == folder / "export" / name
    return folder


@pytest.fixture(scope="session", name="reference")
def reference_fixture(run):
    """Test images, their labels and the student's logits in float64, from its weights and the formulas alone."""
    test = load_data("digits", "").test
    w = {k: v.double() for k, v in load_file(run / "student.safetensors").items()}
    facts = json.loads((run / "export" / "manifest.json").read_text())["files"]["student.onnx"]
    x = (test.images.double() / 255 - facts["mean"][0]) / facts["std"][0]
    for layer in ("layer1", "layer2"):
        x = F.conv2d(x, w[f"{layer}.0.weight"], padding=1)
        mean, var, gain, bias = (w[f"{layer}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        column = lambda v: v[:, None, None]  # noqa: E731
        x = (x - column(mean)) / column(var + 1e-5).sqrt() * column(gain) + column(bias)
        x = x.relu()
        x = F.max_pool2d(x, 2) if layer == "layer1" else x.mean((2, 3))
    return test.images.numpy(), test.targets.numpy(), (x @ w["fc.weight"].T + w["fc.bias"]).numpy()


@pytest.fixture(name="shipped")
def shipped_fixture(run, tmp_path):
    """A copy of the exported files, to spoil."""
    return shutil.copytree(run / "export", tmp_path / "export")


def restamp(path, **changes):
    """Makes the manifest speak of the file as it is now, as whoever changed it could."""
    manifest = path.parent / "manifest.json"
    whole = json.loads(manifest.read_text())
    entry = whole["files"].setdefault(path.name, dict(whole["files"]["student.onnx"]))
    entry |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changes}
    manifest.write_text(json.dumps(whole))
