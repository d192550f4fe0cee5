"""Texts as they are printed: those that somebody else wrote without what controls a terminal, and Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Control characters, line and paragraph separators, surrogates, and bidirectional formatting characters.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Returns the text with each control character but newlines and tabs replaced by a question mark."""
    return CONTROL_CHARACTERS.sub(lambda found: found[0] if found[0] in "\n\t" else "?", text)


def one_line(name: object) -> str:
    """Returns a file's name or path with each control character, newlines and tabs too, replaced by a question mark."""
    return CONTROL_CHARACTERS.sub("?", str(name))


def printable_values(node: Any) -> Any:
    """Returns plain values, as JSON has them, with `printable` applied to every text and key."""
    if isinstance(node, dict):
        return {printable_values(key): printable_values(value) for key, value in node.items()}
    if isinstance(node, list):
        return [printable_values(value) for value in node]
    return printable(node) if isinstance(node, str) else node


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Returns a Markdown table whose first `left` columns are left-aligned, without a newline at its end."""
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"  # noqa: E731
    return "\n".join([line(head), "|" + "---|" * left + "---:|" * (len(head) - left), *map(line, rows)])
