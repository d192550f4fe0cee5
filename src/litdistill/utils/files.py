"""Files that are whole or not there: what is written is moved to its place when it is done."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from litdistill.utils.errors import UserError

PART = ".part"  # suffix of files that are still being written


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with an empty file in the same folder, then renames that to `path`; readers never see a part."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
        try:
            temporary.touch(exist_ok=False)
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        if not isinstance(error, OSError) and not re.search(UNWRITTEN, str(error)):
            raise
        reason = "the disk is full, or a quota is reached" if isinstance(error, RuntimeError) else error
        raise UserError(f"{path} cannot be written: {reason}. Free some space, or choose another folder.") from error


# What torch and safetensors raise for a write that the system refused, with neither its error nor its number.
UNWRITTEN = r"inline_container|PytorchStreamWriter|unexpected pos|basic_ios|iostream|I/O error"


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8 by `write_atomically`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def remove_parts(folder: Path) -> None:
    """Deletes the partial files that killed processes left in `folder`; no other process may be writing there."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink(missing_ok=True)
