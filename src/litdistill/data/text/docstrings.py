"""The docstrings of Python's standard library, as texts to train a language model on. Every machine with Python has them.

They are read from the sources of the Python that runs, so that another version of Python has other texts: two runs are of the
same data where the digests of their samples agree (`TensorData.identity`). It needs nothing but the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text

log = logging.getLogger(__name__)

# Folders of the standard library that hold tests, programs, or what others installed.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
SHARES = 20  # one twentieth of the modules is tested on, and one is validated on


class Docstring(NamedTuple):
    """A docstring, without the indentation of its source, and the top-level module that it is first found in."""

    module: str
    text: str

    @property
    def part(self) -> str:
        """Returns "train", "val" or "test", by a hash of the module: no module is in two of them."""
        share = hashlib.sha256(self.module.encode()).digest()[0] % SHARES
        return {0: "test", 1: "val"}.get(share, "train")


def read(root: str | Path) -> list[Docstring]:
    """Returns the distinct docstrings of the standard library, in the order of its files.

    The first call of a version of Python parses the sources, which takes seconds, and keeps what it found in `root`.
    Raises `UserError` where this Python comes without its sources.
    """
    path = Path(root) / "docstrings" / f"{platform.python_implementation().lower()}-{platform.python_version()}.json"
    try:
        found = [Docstring(str(module), str(text)) for module, text in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # absent or damaged
        found = list(collect(Path(sysconfig.get_paths()["stdlib"])))
        if not found:
            raise UserError(
                f"This Python has no sources of its standard library in {sysconfig.get_paths()['stdlib']}: take "
                "data=token_sequences with texts of yours."
            ) from None
        write_text(path, json.dumps(found, ensure_ascii=False, indent=0))
    log.info(
        "The docstrings of Python %s: %d distinct ones, of %d modules. Another version of Python has others.",
        *(platform.python_version(), len(found), len({one.module for one in found})),
    )
    return found


def collect(library: Path) -> Iterator[Docstring]:
    """Yields each distinct docstring below a folder once, in the order of the files' names and of the lines in them."""
    seen = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if LEFT_OUT & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # a file that is meant to be broken
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = (ast.get_docstring(node) or "").strip()
                if text and text not in seen:
                    seen.add(text)
                    yield Docstring(parts[0].removesuffix(".py"), text)
