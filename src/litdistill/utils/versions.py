"""Which versions of what a result came from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

from litdistill.utils.paths import ROOT

PACKAGES = ("litdistill", "torch", "torchvision", "lightning", "hydra-core")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide a result; None for one that has no metadata, as where sources are run."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def version(package: str) -> str | None:
    """The installed version of a package; None where it has no metadata. Never raises."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside of a clone, whatever repository lies around it."""
    if ROOT is None or not (ROOT / ".git").exists():
        return None
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
