"""Paths of the project's files, in a clone and in an installed package, and the resolution of relative paths in configs."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

PACKAGE = Path(__file__).resolve().parents[1]
_CLONE = PACKAGE.parents[1]

# The clone that this package runs from; None where it is installed.
ROOT: Path | None = _CLONE if (_CLONE / "conf" / "train.yaml").is_file() else None

# conf/ is at the top of a clone, and inside the package in a wheel.
CONF = ROOT / "conf" if ROOT is not None else PACKAGE / "conf"

# Config keys, of all commands, whose value is or may be a path.
PATH_KEYS = (
    *("runs", "run", "out", "picture", "pictures", "to", "data.root", "student.checkpoint", "teacher.checkpoint"),
    *("teacher.outputs", "data.test", "data.validation", "data.unlabelled"),
)
# Ends of keys whose value may also be a keyword, as auto, or the name of a split.
WORDS = ("checkpoint", "teacher.outputs", "data.test", "data.validation")


def resolve_paths(cfg: DictConfig, start: Path) -> None:
    """Makes the relative paths of a config absolute, in place; they are relative to `start`, not to the working folder.

    What may be one of `WORDS` is a path only where such a file exists. `runs` may be a list.
    """
    for key in PATH_KEYS:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            OmegaConf.update(cfg, key, [str(start / one) for one in value])
        elif isinstance(value, str) and value and (not key.endswith(WORDS) or (start / value).exists()):
            # A trailing slash is kept: it requests a page instead of a table.
            OmegaConf.update(cfg, key, str(start / value) + "/" * (value.endswith("/") and value != "/"))
