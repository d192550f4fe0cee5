"""`litdistill new <folder>`: writes a small research project that imports litdistill.

The files of `template/` are copied, with the folder's name in place of `my_project`.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from litdistill.utils.errors import UserError

TEMPLATE = Path(__file__).parent / "template"
PLACEHOLDER = "my_project"


def main(arguments: Sequence[str]) -> None:
    """Writes the project that the arguments name, and prints how to go on. Raises `UserError` as `write_project` does."""
    parser = argparse.ArgumentParser(
        "litdistill new",
        description="Writes a small research project: configs, a method and a network of its own, and tests.",
    )
    parser.add_argument("folder", type=Path, help="where to write it; its last part names the package")
    folder = parser.parse_args(arguments).folder
    name = write_project(folder)
    print(f"Written: the project {name}, in {folder}. To go on:\n")
    print(f"  cd {shlex.quote(str(folder))}\n  litdistill train --config-dir conf experiment=first\n  python -m pytest")


def write_project(folder: Path) -> str:
    """Writes the project into `folder`, which is made, and returns the name of its package.

    Raises `UserError` for a folder that holds anything, and for a name that Python cannot import.
    """
    name = re.sub(r"[-. ]+", "_", folder.resolve().name.lower())
    if not name.isidentifier() or keyword.iskeyword(name) or name in ("litdistill", "tests", "conf"):
        raise UserError(
            f"{folder}: its last part names a Python package: letters, digits and underscores, such as kd_study."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and holds something. Name a new folder.")
    for source in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        parts = [part.replace(PLACEHOLDER, name) for part in source.relative_to(TEMPLATE).parts]
        target = folder.joinpath(*parts[:-1], ".gitignore" if parts[-1] == "gitignore" else parts[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8").replace(PLACEHOLDER, name), encoding="utf-8")
    return name
