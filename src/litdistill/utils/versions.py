"""Which versions of what a result came from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

from litdistill.utils.paths import ROOT


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result."""
    names = ("litdistill", "torch", "torchvision", "lightning", "hydra-core")
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside of a repository."""
    try:
        ask = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True, check=True).stdout  # noqa: E731
        return {"commit": ask("rev-parse", "HEAD").strip(), "dirty": bool(ask("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None
