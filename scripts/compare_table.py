"""Writes the tables of a comparison of detectors into docs/detection.md, from the page that `litdistill compare` wrote.

    litdistill compare dataset=digit_scenes
    python scripts/compare_table.py

They stand in the document between `<!-- compare -->` and `<!-- end compare -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

from litdistill.benchmarks.tables import between_marks, read_options, run_script
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.text import markdown_table

DEFAULTS = {"page": "runs/compare/digit_scenes/report", "out": "docs/detection.md"}
QUALITY = ("mAP %", "mAP50 %", "over labels alone", "starts from")
COST = ("parameters", "file, kB", "batch 1: p50, ms", "of teacher's (quartiles)")


def main() -> None:
    options = read_options(DEFAULTS)
    page, out = Path(options.page, "report.md"), Path(options.out)
    if not page.is_file():
        raise UserError(
            f"There is no {page}: run litdistill compare dataset=digit_scenes first, or name its page=<folder>."
        )
    write_text(out, between_marks(out.read_text(), "compare", text_of(page.read_text())))
    print(f"Written into {out}")


def text_of(page: str) -> str:
    """Returns the table of the float networks and that of their int8 files, of the text of a page.

    Raises `UserError` for a page that is of no comparison of detectors.
    """
    worth, cost, small = (table(page, *head) for head in (("model", "mAP %"), ("model", "precision"), ("in int8",)))
    if not (worth and cost and small):
        raise UserError("This page has no table of detectors, of their costs or of their int8 files.")
    # Of columns with one name the first, those of one picture at a time.
    costs = {cells[0]: dict(zip(cost[0][::-1], cells[::-1], strict=True)) for cells in cost[1:]}
    head, rows = ["detector"], []
    shown = [name for name in QUALITY[:-1] if name in worth[0]]
    for cells in worth[1:]:
        row = dict(zip(worth[0], cells, strict=True))
        name = re.sub(r" \\\[!\\\]$", "", cells[0])
        if name.endswith(", then int8"):
            continue
        rows.append(
            [
                without_number(name),
                *(row[k] for k in shown),
                *(costs.get(name, {}).get(k, "") for k in COST),
                row[QUALITY[-1]],
            ]
        )
    head += [*shown, *COST[:-1], "of the teacher's", QUALITY[-1]]
    return "\n\n".join([markdown_table(head, rows), markdown_table(small[0], small[1:])])


def table(page: str, *head: str) -> list[list[str]]:
    """Returns the cells of the first table of a page whose head begins so, head first; empty without one."""
    lines = page.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(head) + " |")), None)
    if first is None:
        return []
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return [rows[0], *rows[2:]]


def without_number(name: str) -> str:
    """Returns the name of a row without the number that the page's pictures know it by."""
    return re.sub(r"^\d+ ", "", name)


if __name__ == "__main__":
    run_script(main)
