"""Loads a trained student as a torch module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from litdistill.export.export import student_of_run
from litdistill.export.predict import load_network


def load_student(source: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Returns the student of a finished run's folder or of an exported `.safetensors` file, in eval mode on the CPU.

    The module includes its preprocessing: it takes inputs as the data yields them (images as uint8 or from 0 to 1).
    `trust`: packages whose classes the config of a run made elsewhere may name (`litdistill.config.trust`). Raises
    `UserError` for any other folder or file.
    """
    path = Path(source)
    return student_of_run(path, None, trust)[0] if path.is_dir() else load_network(path)
