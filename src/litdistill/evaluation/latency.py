"""Latency, throughput, peak memory and energy of models, measured by turns in one process.

    python -m litdistill.evaluation.latency student.onnx 64 1

prints the peak memory of a process that runs an ONNX file on batches of 64 images with one thread. `peak_memory` starts
this command; it imports neither torch nor Lightning, whose memory would hide that of a small network.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], Any]  # (N, C, H, W) uint8 -> logits

ROUNDS = 20
SLICE_S = 0.02  # seconds that a model is timed for before the next model's turn
CALLS = 50  # maximum number of calls in a slice
RAPL = Path("/sys/class/powercap")
NOT_REPORTED = "not reported here"


def onnx_run(content: bytes | str, threads: int = 1) -> Run:
    """Returns a function that runs an ONNX file (bytes or path) on the CPU; the caller has verified the file."""
    session = _session(content, threads)
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images})[0]


def _session(content: bytes | str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def torch_run(net: Any, device: str) -> Run:
    """Returns a function that runs a network of one output or several on uint8 images on a device, both transfers included."""
    import torch

    net = net.to(device).eval()

    def run(images: np.ndarray) -> Any:
        with torch.inference_mode():
            found = net(torch.from_numpy(images).to(device))
            return [t.cpu() for t in ([found] if isinstance(found, torch.Tensor) else found)]  # .cpu() synchronizes

    return run


def time_models(
    runs: Mapping[str, Run],
    images: np.ndarray,
    reference: str | Mapping[str, str],
    rounds: int = ROUNDS,
    slice_s: float = SLICE_S,
    clock: Callable[[], float] = time.perf_counter,
    work_clock: Callable[[], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Returns each model's p50 and p95 latency in ms over all calls, images per second, and ratios to `reference`.

    Models take turns: each of `rounds` times every model for `slice_s`, in reverse order in every second round. A machine
    that slows down affects all models equally, so the ratio of a round's medians varies less than either median. `ratio` is
    the quartiles over rounds of time / reference time: below 1 is faster; `reference` names one model, or one for each.
    First, each model is warmed up for three slices.

    `work_clock`: the clock of the ratios, `clock` by default. The thread's CPU time (`time.thread_time`) does not count
    the time of other processes on the CPU, which interrupt long calls more often than short ones.
    """
    both = (clock, work_clock or clock)
    calls: dict[str, int] = {}
    taken: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for name, run in runs.items():
        calls[name] = _warm_up(run, images, slice_s, clock)
    there, back = list(runs), list(runs)[::-1]
    for turn in range(rounds):
        for name in back if turn % 2 else there:
            taken[name].append(np.array([_timed(runs[name], images, both) for _ in range(calls[name])]))
    work = {name: [np.median(times[:, 1]) for times in turns] for name, turns in taken.items()}
    found = {}
    for name, turns in taken.items():
        times = np.concatenate(turns)[:, 0]
        base = work[reference if isinstance(reference, str) else reference[name]]
        ratios = [own / its for own, its in zip(work[name], base, strict=True)]
        found[name] = {
            "p50_ms": 1e3 * float(np.percentile(times, 50)),
            "p95_ms": 1e3 * float(np.percentile(times, 95)),
            "images_per_s": len(images) * len(times) / float(times.sum()),
            "calls": len(times),
            "ratio": [float(np.percentile(ratios, q)) for q in (25, 50, 75)],
        }
    return found


def _warm_up(run: Run, images: np.ndarray, slice_s: float, clock: Callable[[], float]) -> int:
    """Warms a model up and returns how many calls fill a slice."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 3 * slice_s and len(times) < 3 * CALLS):
        times.append(_timed(run, images, (clock,))[0])
    return max(1, min(CALLS, int(slice_s / max(statistics.median(times), 1e-9))))


def _timed(run: Run, images: np.ndarray, clocks: Sequence[Callable[[], float]]) -> list[float]:
    """Returns the duration of one call by each clock, in seconds."""
    start = [clock() for clock in clocks]
    run(images)
    return [clock() - before for clock, before in zip(clocks, start, strict=True)]


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(path: str | Path, batch: int, threads: int = 1) -> int | None:
    """Returns the peak memory in bytes that a fresh process needs to load an ONNX file and run it on batches.

    The process imports numpy and onnxruntime before it starts to count, so only the model counts: its weights, its
    buffers and a batch. None where the system does not report a peak (it is read from Linux' /proc).
    """
    command = [sys.executable, "-m", "litdistill.evaluation.latency", str(path), str(batch), str(threads)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    grown: int | None = json.loads(found)["bytes"]
    return grown


def _grow(path: str, batch: int, threads: int) -> int | None:
    import onnxruntime  # noqa: F401

    before = _high_water()
    if before is None:
        return None
    session = _session(path, threads)
    (given,) = session.get_inputs()
    shape = [batch, *given.shape[1:]]
    images = np.zeros(shape, {"tensor(uint8)": np.uint8, "tensor(int64)": np.int64}.get(given.type, np.float32))
    for _ in range(3):
        session.run(None, {given.name: images})
    after = _high_water(reset=False)
    return None if after is None else after - before


def _high_water(reset: bool = True) -> int | None:
    """Returns the peak resident set size of this process in bytes; `reset` restarts the measurement first.

    getrusage does not serve here: its maximum is inherited from the parent process.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# -- energy ------------------------------------------------------------------------------------------------------------


def energy_per_1000(run: Run, images: np.ndarray, device: str = "cpu", seconds: float = 1.0) -> float | None:
    """Returns the joules that the CPU packages or the GPU use per 1,000 images; None where no counter is available.

    Counters measure the whole package: other processes and idle power are included.
    """
    meter = _rapl if device == "cpu" else _nvidia_smi
    reading = meter(lambda: _loop(run, images, seconds))
    if reading is None:
        return None
    joules, count = reading
    return 1000 * joules / count


def _loop(run: Run, images: np.ndarray, seconds: float) -> int:
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        run(images)
        count += len(images)
    return count


def _rapl(work: Callable[[], int]) -> tuple[float, int] | None:
    """Returns joules and images from the packages' RAPL counters (microjoules, which wrap around at their maximum)."""
    zones = [z for z in sorted(RAPL.glob("*-rapl:*")) if z.name.count(":") == 1]
    try:
        before = [int((z / "energy_uj").read_text()) for z in zones]
        ranges = [int((z / "max_energy_range_uj").read_text()) for z in zones]
        count = work() if zones else 0
        after = [int((z / "energy_uj").read_text()) for z in zones]
    except OSError:  # many systems let only root read them
        return None
    used = sum((a - b) % (r + 1) for a, b, r in zip(after, before, ranges, strict=True))
    return (used / 1e6, count) if zones else None


def _nvidia_smi(work: Callable[[], int]) -> tuple[float, int] | None:
    """Returns joules and images: the mean of the first GPU's power readings (10 Hz) times the duration."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "-i", "0", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        start = time.perf_counter()
        try:
            count = work()
        finally:  # it prints until it is ended, and the context waits for its end
            process.terminate()
        seconds = time.perf_counter() - start
        printed = process.communicate()[0]
    watts = [float(line) for line in printed.splitlines() if line.strip().replace(".", "", 1).isdigit()]
    return (statistics.mean(watts) * seconds, count) if watts else None


if __name__ == "__main__":
    print(json.dumps({"bytes": _grow(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}))
