"""Where the project's own files lie, in a clone and where it is installed, and what relative paths are relative to."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

PACKAGE = Path(__file__).resolve().parents[1]
_CLONE = PACKAGE.parents[1]

# The clone that this package runs from; None where it is installed.
ROOT: Path | None = _CLONE if (_CLONE / "conf" / "train.yaml").is_file() else None

# The wheel holds the config beside the modules, where a clone has it at its top.
CONF = ROOT / "conf" if ROOT is not None else PACKAGE / "conf"

# Keys of all commands' configs that hold a path, or what may be one.
PATH_KEYS = ("runs", "run", "out", "picture", "data.root", "student.checkpoint", "teacher.checkpoint")


def resolve_paths(cfg: DictConfig, start: Path) -> None:
    """Makes the relative paths of a config absolute, in place: they are relative to `start`, whatever the working folder is.

    A checkpoint may be a word as well (auto, teacher): it is a path where there is such a file. So are `runs` in a list.
    """
    for key in PATH_KEYS:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            OmegaConf.update(cfg, key, [str(start / one) for one in value])
        elif isinstance(value, str) and value and (not key.endswith("checkpoint") or (start / value).exists()):
            # A folder keeps the slash at its end, which says that a page and no table is asked for.
            OmegaConf.update(cfg, key, str(start / value) + "/" * (value.endswith("/") and value != "/"))
