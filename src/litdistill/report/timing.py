"""Times all rows of a group by turns, in one process and one runtime, and measures file size and peak memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from litdistill.evaluation import latency as measure
from litdistill.export import latency as postprocessing
from litdistill.report.collect import Group, Row, Settings

BATCHES = (1, 64)


def batches_of(group: Group) -> tuple[int, ...]:
    """Returns the batch sizes that a group is timed with: smaller ones of files with post-processing, which give pictures."""
    own = any(postprocessing.has_postprocessing(s.task) for row in group.rows for s in row.seeds)
    return postprocessing.BATCHES if own else BATCHES


def time_rows(group: Group, settings: Settings) -> None:
    """Fills `Row.timing`: "bytes", "memory" (bytes or None), the times of each batch size and "energy" for "cpu" and "cuda",
    those without post-processing on the CPU (`litdistill.export.latency.WITHOUT`) of files that have some, and "cpu_share":
    the mean number of CPUs this process used. Below its threads, other processes competed for the CPU.

    On the CPU all models, teachers included, are ONNX files in onnxruntime; on the GPU they are networks in torch, without
    int8. Ratios are to the group's first teacher, or to its first row where there is none.
    """
    rows = [r for r in group.rows if r.file is not None]
    if not rows or group.inputs is None:
        return
    reference = next((r for r in rows if r.teacher), rows[0])
    for row in rows:
        assert row.file is not None
        row.timing |= {
            "bytes": row.file.stat().st_size,
            "memory": measure.peak_memory(row.file, batches_of(group)[-1], settings.threads),
        }
    _on(group, rows, reference, "cpu", lambda row: measure.onnx_run(row.file.read_bytes(), settings.threads), settings)  # type: ignore[union-attr]
    nets = [r for r in rows if r.net is not None]
    if torch.cuda.is_available() and reference in nets:
        _on(group, nets, reference, "cuda", lambda row: measure.torch_run(row.net, "cuda"), settings)


def _on(
    group: Group,
    rows: list[Row],
    reference: Row,
    device: str,
    make: Callable[[Row], measure.Run],
    settings: Settings,
) -> None:
    runs, bare, batches = {row.label: make(row) for row in rows}, {}, batches_of(group)
    if device == "cpu" and batches == postprocessing.BATCHES:
        files = {row.label: row.file.read_bytes() for row in rows if row.file is not None}
        cut = {name: postprocessing.without_postprocessing(content) for name, content in files.items()}
        bare = {name: measure.onnx_run(content, settings.threads) for name, content in cut.items()}
    start = time.perf_counter(), time.process_time()
    assert group.inputs is not None
    clock = time.thread_time if device == "cpu" and settings.threads == 1 else None
    found = postprocessing.time_batches(runs, bare, group.inputs, reference.label, batches, settings.rounds, clock)
    for row in rows:
        row.timing[device] = found[row.label]
    largest = group.inputs[torch.arange(batches[-1]) % len(group.inputs)].numpy()
    share = (time.process_time() - start[1]) / (time.perf_counter() - start[0])
    for row in rows:
        if device == "cpu":
            row.timing["cpu_share"] = share
        row.timing[device]["energy"] = measure.energy_per_1000(runs[row.label], largest, device)


def machine() -> dict[str, Any]:
    """Returns the CPU, the number of its cores, the system and the GPU of this machine."""
    facts = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.system()}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
