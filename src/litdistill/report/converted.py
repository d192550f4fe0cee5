"""The table of the int8 files that were made after training, each beside the file of its float network."""

from __future__ import annotations

from litdistill.report.blocks import Block, Table, Text
from litdistill.report.collect import Group, Row
from litdistill.utils.units import heading, shown_mean


def beside_float(group: Group, key: str) -> list[Block]:
    """Returns a text and a table with a row for each row of such files: how many decisions are those of the float network, and
    the metric, bytes and latency of both. Nothing where there are none."""
    pairs = [(group.rows[i - 1], row) for i, row in enumerate(group.rows) if row.converted]
    if not pairs:
        return []
    decided = pairs[0][1].seeds[0].summary["check"]["compared"][1]
    about = (
        f"In int8 after training, its ranges by training {group.things}. Same: how many {decided}, of those of the file and "
        "of its float network, on the test set. Where these are fewer than litdistill export asks for there is no file."
    )
    head = [
        "in int8",
        "same %",
        heading(group.metric),
        "in float",
        "file, kB",
        "in float",
        "batch 1: p50, ms",
        "in float",
    ]
    return [Text(about), Table(f"{key}int8", head, [_cells(group, *pair) for pair in pairs])]


def _cells(group: Group, whole: Row, small: Row) -> list[str]:
    checks = [seed.summary["check"] for seed in small.seeds]
    cells = [whole.label, shown_mean("agreement", [c["agreement"] for c in checks])]
    cells += [shown_mean(group.metric, [c[who] for c in checks]) for who in ("exported", "student")]
    timed = "cpu" in small.timing and "cpu" in whole.timing
    cells += [f"{row.timing['bytes'] / 1e3:,.1f}" if timed else "" for row in (small, whole)]
    return cells + [f"{row.timing['cpu'][1]['p50_ms']:.3f}" if timed else "" for row in (small, whole)]
