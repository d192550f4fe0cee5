"""The section of the page on what each model costs: parameters, bytes, latency with and without post-processing, energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from litdistill.evaluation.latency import NOT_REPORTED
from litdistill.export.latency import WITHOUT
from litdistill.report.blocks import Block, Fold, Section, Table, Text
from litdistill.report.collect import Group, Row, Settings
from litdistill.report.sections import MEASURED, counted, names, share
from litdistill.utils.units import quantity


def cost(group: Group, key: str, settings: Settings) -> Section:
    things = group.things
    timed = [(n, r) for n, r in zip(names(group), group.rows, strict=True) if "cpu" in r.timing]
    reference = next((r for _, r in timed if r.teacher), None)
    batches = [b for b in timed[0][1].timing["cpu"] if isinstance(b, int)] if timed else []
    head = ["model", "precision", "parameters", "MACs", "file, kB", "of teacher's", *times_head(batches, things)]
    head += ["peak memory, MB", f"J per 1,000 {things}"]
    rows = []
    for name, row in timed:
        t = row.timing
        cells = [
            name,
            row.precision,
            f"{row.about['params']:,}",
            counted(row.about["macs"]),
            f"{t['bytes'] / 1e3:,.1f}",
        ]
        cells.append(f"{t['bytes'] / reference.timing['bytes']:.3f}" if reference else "")
        cells += times(t["cpu"], reference is not None)
        cells += [NOT_REPORTED if t["memory"] is None else f"{t['memory'] / 1e6:.1f}", joules(t["cpu"]["energy"])]
        rows.append(cells)
    inputs = "uint8 images" if group.pictured else "samples as they are read"
    about = (
        f"All models, the teacher too, are ONNX files that take {inputs}, each that of its row's first seed, run by "
        f"onnxruntime on {quantity(settings.threads, 'CPU thread')}. They are warmed up and timed in turn: "
        f"{settings.rounds} rounds through all of them, every other one backwards, and a ratio is that of a round's medians"
        f"{', of the time that the thread had the CPU' if settings.threads == 1 else ''} (median and quartiles over "
        "rounds; below 1 is faster than the teacher). Peak memory: by how much a fresh process grows that has "
        "onnxruntime loaded, loads the file and runs it on the larger batch. Energy: of the whole CPU package, whatever else "
        f"it does. Multiply-accumulates are those of one {things[:-1]}. Parameters are those of the network that was "
        "trained: in int8 its batch normalization is folded into the convolutions, which leaves fewer. Of networks as small "
        "as some here most of the latency is what a call of the runtime costs, whatever it computes, and int8 need not be "
        "faster there."
    )
    if timed:
        about += f" While it timed, this process had {timed[0][1].timing['cpu_share']:.2f} CPUs."
    blocks: list[Block] = [Table(f"{key}cost", head, rows, (0, 1)), *_without(timed, batches, reference, key)]
    blocks += _on_gpu(timed, reference, key, things)
    blocks.append(Fold(MEASURED, [about]))
    return Section(f"{key}costs", "What each costs", blocks)


def _on_gpu(timed: Sequence[tuple[str, Row]], reference: Row | None, key: str, things: str) -> list[Block]:
    on_gpu = [(n, r) for n, r in timed if "cuda" in r.timing]
    if not on_gpu:
        return [Text("GPU: none here.")]
    batches = [b for b in on_gpu[0][1].timing["cuda"] if isinstance(b, int)]
    head = ["model", *times_head(batches, things), f"J per 1,000 {things}"]
    rows = [[n, *times(r.timing["cuda"], reference is not None), joules(r.timing["cuda"]["energy"])] for n, r in on_gpu]
    return [
        Text(f"On the GPU, by torch in float32, the way of the {things} there and of the outputs back included."),
        Table(f"{key}gpu", head, rows),
    ]


def _without(timed: Sequence[tuple[str, Row]], batches: Sequence[int], reference: Row | None, key: str) -> list[Block]:
    """Returns the times of the files without their post-processing; nothing where they have none."""
    bare = [
        (n, {b: r.timing["cpu"][b][WITHOUT] for b in batches})
        for n, r in timed
        if WITHOUT in r.timing["cpu"][batches[0]]
    ]
    if not bare:
        return []
    head, rows = ["model", *times_head(batches)], [[n, *each_time(t, reference is not None)] for n, t in bare]
    about = (
        "Without post-processing: the same files up to their last convolutions, timed in the same turns. What is left out is "
        "the decoding of boxes and their suppression, or the choice of a class for each pixel; ratios are to the teacher "
        "without it. A network that is unsure gives suppression more to do."
    )
    return [Text(about), Table(f"{key}bare", head, rows)]


def times_head(batches: Sequence[int], things: str | None = None) -> list[str]:
    """Returns the heads of the columns of `each_time`; with `things` those of `times`."""
    head = []
    for batch in batches:
        head += [f"batch {batch}: p50, ms", "p95, ms", "of teacher's (quartiles)"]
    return head if things is None else [*head, *(f"{things}/s at {batch}" for batch in batches[-1:])]


def times(timing: Mapping[Any, Any], ratios: bool) -> list[str]:
    """Returns the cells of a model's times by batch size, and how many samples it takes a second in the largest."""
    last = max(batch for batch in timing if isinstance(batch, int))
    return [*each_time(timing, ratios), f"{timing[last]['images_per_s']:,.0f}"]


def each_time(timing: Mapping[Any, Any], ratios: bool) -> list[str]:
    cells = []
    for t in (t for batch, t in timing.items() if isinstance(batch, int)):
        cells += [f"{t['p50_ms']:.3f}", f"{t['p95_ms']:.3f}", share(t["ratio"], 1) if ratios else ""]
    return cells


def joules(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:.3g}"
