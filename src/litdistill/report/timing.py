"""Times all rows of a group by turns, in one process and one runtime, and measures file size and peak memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from litdistill.evaluation import latency as measure
from litdistill.report.collect import Group, Row, Settings

BATCHES = (1, 64)


def time_rows(group: Group, settings: Settings) -> None:
    """Fills `Row.timing`: "bytes", "memory" (bytes or None), the times of each batch size and "energy" for "cpu" and "cuda",
    and "cpu_share": the mean number of CPUs this process used. Below its threads, other processes competed for the CPU.

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
            "memory": measure.peak_memory(row.file, BATCHES[-1], settings.threads),
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
    runs = {row.label: make(row) for row in rows}
    for row in rows:
        row.timing[device] = {}
    start = time.perf_counter(), time.process_time()
    for batch in BATCHES:
        assert group.inputs is not None
        images = group.inputs[torch.arange(batch) % len(group.inputs)].numpy()
        alone = device == "cpu" and settings.threads == 1
        times_of = measure.time_models(
            runs, images, reference.label, settings.rounds, work_clock=time.thread_time if alone else None
        )
        for name, times in times_of.items():
            next(r for r in rows if r.label == name).timing[device][batch] = times
    share = (time.process_time() - start[1]) / (time.perf_counter() - start[0])
    for row in rows:
        if device == "cpu":
            row.timing["cpu_share"] = share
        row.timing[device]["energy"] = measure.energy_per_1000(runs[row.label], images, device)


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
