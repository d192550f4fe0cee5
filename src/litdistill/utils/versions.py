"""Versions of Python, packages and this repository, recorded with each result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from litdistill.utils.paths import ROOT

PACKAGES = ("litdistill", "torch", "torchvision", "lightning", "hydra-core")


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that determine a result; None for a package without metadata."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def in_words(found: Mapping[str, str | None]) -> str:
    """Returns `versions` as text: `python 3.13.1, torch 2.11.0`; without packages that had none."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version is not None)


def version(package: str) -> str | None:
    """Returns the installed version of a package; None where it has no metadata, as when run from sources. Never raises."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Returns the commit and whether the working tree is dirty; None outside a clone of this project."""
    if ROOT is None or not (ROOT / ".git").exists():
        return None
    try:
        return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
