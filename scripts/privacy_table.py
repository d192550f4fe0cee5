"""Attacks students by training models: membership with 16 shadow runs, and copies by a thief; writes docs/security.md's tables.

    python scripts/privacy_table.py                          on the bundled digits
    python scripts/privacy_table.py jobs=8 parts=[membership]
    python scripts/privacy_table.py parts=[]                 writes the tables of what is kept and trains nothing

Runs are in runs/secure; what is finished there is not repeated. What was found is kept in runs/secure/security.json, from which
`litdistill report` shows it too; a table stands in the document between `<!-- part -->` and `<!-- end part -->`.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from litdistill.benchmarks import extraction, shadows
from litdistill.report.blocks import Fold, Section, Table
from litdistill.report.security import FILE, of_copies, of_shadows
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings, format_seconds

PARTS = {"extraction": (extraction.record, of_copies), "membership": (shadows.record, of_shadows)}
DEFAULTS = {
    **{"dataset": "digits", "shadows": 16, "seeds": 3, "jobs": 2, "runs": "runs/secure", "overrides": []},
    **{"parts": list(PARTS), "out": "docs/security.md"},
}


def markdown(section: Section, kept: Mapping[str, Any]) -> str:
    """Returns the table of a section, how it was measured, and what it took."""
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    parts = []
    for block in section.blocks:
        if isinstance(block, Table):
            rule = "|---" + "|---:" * (len(block.head) - 1) + "|"
            parts.append("\n".join([line(block.head), rule, *map(line, block.rows)]))
        if isinstance(block, Fold):
            parts += block.texts
    used = ", ".join(f"{k} {v}" for k, v in kept["versions"].items() if v is not None)
    return "\n\n".join([*parts, f"{format_seconds(kept['seconds'])} of runs with one thread, with {used}."])


def filled(document: str, part: str, text: str) -> str:
    """Returns a document with what stands between the marks of a part replaced. Raises `UserError` without the marks."""
    pattern = rf"(<!-- {part} -->\n).*?(<!-- end {part} -->)"
    found, count = re.subn(pattern, lambda m: m[1] + text + "\n" + m[2], document, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"The document needs a line <!-- {part} --> and a line <!-- end {part} -->.")
    return found


def main() -> None:
    filter_warnings()
    choices = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    assert isinstance(choices, DictConfig)
    if set(choices) != set(DEFAULTS) or not set(choices.parts) <= set(PARTS):
        raise UserError(f"Give {', '.join(f'{k}={v}' for k, v in DEFAULTS.items())} or other values.")
    keep = Path(choices.runs, FILE)
    kept = json.loads(keep.read_text()) if keep.is_file() else {}
    own = {key: choices[key] for key in ("runs", "dataset", "shadows", "jobs", "seeds")}
    for part in choices.parts:
        kept[part] = PARTS[part][0](shadows.Choices(**own, overrides=tuple(choices.overrides)))
        write_text(keep, json.dumps(kept) + "\n")
    document = Path(choices.out).read_text()
    for part, (_, section) in PARTS.items():
        if part in kept:
            document = filled(document, part, markdown(section(kept[part]), kept[part]))
    write_text(choices.out, document)
    print(f"Written to {choices.out} and {keep}")


if __name__ == "__main__":
    multiprocessing.freeze_support()
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
