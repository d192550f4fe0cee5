"""The stages of `gpu.py` that measure steps, each in a process of its own: `python scripts/gpu_stages.py <stage> <options>`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import quiet
from benchmark_parts import Bench, trained
from benchmark_peers import peers
from benchmark_questions import share_of_peak
from gpu import Figures
from gpu_cells import cells_of_tables, hinton_on_mnist
from gpu_forms import compiled_student, many_students, same_batches
from gpu_graph import EventWatch, KernelWatch, bare_step, captured, pair_on, pairs_on, seconds_of
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from scale import measure_grid
from torch import Tensor

from litdistill.training.train import train
from litdistill.utils.command_line import literal
from litdistill.utils.paths import CONF

LONG = 1600  # steps: a hundred groups
EQUAL = 1e-4  # relative, in float32


# -- equality --------------------------------------------------------------------------------------------------------


class Losses(Callback):
    """The loss of each step, where each is a group of its own."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self.seen.append(loss.detach().clone())  # the next replay overwrites it


def losses_and_weights(bench: Bench, kind: str, captured: bool, steps: int) -> tuple[list[float], Tensor, int]:
    """Of some steps in float32, from the same weights on the same views: losses, weights, and how many steps were replayed."""
    losses = Losses()
    replayed = Replayed()
    student = trained(bench, kind, steps, [losses, replayed], 1, captured, "32-true").student
    weights = torch.cat([p.detach().flatten().double().cpu() for p in student.parameters()])
    return [float(loss) for loss in losses.seen], weights, replayed.count


class Replayed(Callback):
    """How many steps were replayed, counted at the end, before the Distiller lets go of its graphs."""

    count = 0

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.count = int(getattr(getattr(module, "captured", None), "replayed", 0))


def apart(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def same_training(bench: Bench, kind: str, steps: int) -> dict[str, Any]:
    """How far captured and eager training are from each other, beside two eager trainings."""
    torch.manual_seed(0)  # what a cache is filled with
    one = losses_and_weights(bench, kind, True, steps)
    torch.manual_seed(0)
    two = losses_and_weights(bench, kind, False, steps)
    torch.manual_seed(0)
    again = losses_and_weights(bench, kind, False, steps)
    return {
        "steps": len(one[0]),
        "replayed": one[2],
        "loss": apart(one[0], two[0]),
        "loss, eager twice": apart(again[0], two[0]),
        "weights": float((one[1] - two[1]).norm() / two[1].norm()),
        "weights, eager twice": float((again[1] - two[1]).norm() / two[1].norm()),
        "equal": len(one[0]) == steps and apart(one[0], two[0]) <= EQUAL,
    }


def equality(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """Captured and eager training, 20 steps in float32 without TF32, batches, and the accuracies of whole runs with both."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    steps = 20 if device.type == "cuda" else 4
    for name in pairs_on(device):
        bench = Bench(pair_on(name, device), device)
        for kind in ("live", "cached", "hard"):
            work = lambda bench=bench, kind=kind: same_training(bench, kind, steps)  # noqa: E731
            figures.measure("equality", f"{name} {kind}", work)
    figures.measure("equality", "augmented batches", lambda: same_batches(device))
    figures.measure("equality", "accuracy on the digits", lambda: accuracies(device, Path(given["runs"])))


def accuracies(device: torch.device, runs: Path) -> dict[str, Any]:
    """Validation accuracies of short runs on the digits with both, by seed, and whether their means differ by no more than the
    standard deviation over the seeds."""
    seeds, epochs = (range(5), 10) if device.type == "cuda" else (range(2), 1)
    found: dict[str, list[float]] = {"captured": [], "eager": []}
    for seed in seeds:
        for how, switch in {"captured": "auto", "eager": "off"}.items():
            with tempfile.TemporaryDirectory() as folder:
                config = digits(Path(folder) / "run", runs, seed, epochs, device, switch)
                found[how].append(round(train(config), 4))
    return {**found, "within_seeds": within_seeds(**found)}


def within_seeds(captured: Sequence[float], eager: Sequence[float]) -> bool:
    """Whether two means differ by no more than the larger standard deviation over their seeds."""
    spread = max(statistics.stdev(captured), statistics.stdev(eager))
    return abs(statistics.mean(captured) - statistics.mean(eager)) <= spread + 1e-12


def digits(folder: Path, runs: Path, seed: int, epochs: int, device: torch.device, capture: str) -> DictConfig:
    """The config of a short run on the digits."""
    small = [
        f"folder={literal(str(folder))}",
        f"runs={literal(str(runs))}",
        f"seed={seed}",
        f"trainer.max_epochs={epochs}",
        "logger=none",
    ]
    small += ["+teacher.recipe.trainer.max_epochs=5", "teacher.allow_chance=true"]
    small += ["trainer=auto" if device.type == "cuda" else "trainer=cpu", "trainer.precision=32-true"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*small, f"capture={capture}"])


# -- steps -----------------------------------------------------------------------------------------------------------


def loops_of_peers(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """The loop that most code has, with 8 workers of a DataLoader, in float32."""
    for name in pairs_on(device):
        bench = Bench(pair_on(name, device), device)

        def work(bench: Bench = bench) -> dict[str, float]:
            run = peers(bench, 8 if device.type == "cuda" else 0)
            run()
            return {"ms": 1e3 * run()}

        figures.measure("peers", f"{name} peers", with_pair(name, work))


def steps_of_ours(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """This project's steps as graphs and launched one by one, and a bare graph; what they launch, take and reach."""
    for name in pairs_on(device):
        bench = Bench(pair_on(name, device), device)
        for kind in ("live", "cached"):
            step = lambda kind=kind, bench=bench: bare(bench, kind == "cached")  # noqa: E731
            figures.measure("steps", f"{name} {kind} bare", with_pair(name, step))
        for kind in ("live", "cached", "hard"):
            for how in ("captured", "eager"):
                time_it = lambda kind=kind, how=how, bench=bench: one_kind(bench, kind, how == "captured")  # noqa: E731
                figures.measure("steps", f"{name} {kind} {how}", with_pair(name, time_it))
        for kind in ("live", "cached"):
            long = lambda kind=kind, bench=bench: long_run(bench, kind)  # noqa: E731
            figures.measure("steps", f"{name} {kind} long run", long)
        found = {f["what"]: f for f in figures.read() if "ms" in f}
        if live := found.get(f"{name} live captured"):
            share = lambda bench=bench, live=live: peak(bench, live["ms"] / 1e3)  # noqa: E731
            figures.measure("steps", f"{name} share of the peak", share)


def with_pair(name: str, work: Callable[[], Mapping[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Adds the name of the pair, by which the table finds its columns."""
    return lambda: {"pair": name, **work()}


def bare(bench: Bench, cached: bool) -> dict[str, float]:
    step = captured(bare_step(bench, cached), bench.device)
    return {"ms": 1e3 * seconds_of(bench, step, bench.pair.steps)}


def one_kind(bench: Bench, kind: str, captured: bool) -> dict[str, float]:
    """Milliseconds a step, kernels a step and their milliseconds, and the most memory."""
    steps, cuda = bench.pair.steps, bench.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch = EventWatch(bench, steps, 2 * steps)
    distiller = trained(bench, kind, 2 * steps, [watch, replayed := Replayed()], min(16, steps), captured)
    found = {"ms": 1e3 * watch.seconds, "replayed": float(replayed.count)}
    del distiller
    if cuda:
        found["peak_MB"] = torch.cuda.max_memory_reserved() / 1e6
        kernels = KernelWatch(64, 112)
        trained(bench, kind, 128, [kernels], 16, captured)
        found |= kernels.found()
    return found


def long_run(bench: Bench, kind: str) -> dict[str, float]:
    """Milliseconds a step over several epochs, and the share of them in which kernels run: their time in a profile of some of
    these steps over the time of a step without a profiler."""
    cuda = bench.device.type == "cuda"
    end = LONG if cuda else 3 * bench.pair.steps
    watch = EventWatch(bench, bench.pair.steps, end)
    start = time.perf_counter()
    trained(bench, kind, end, [watch], min(16, bench.pair.steps), True)
    found = {"long_ms": 1e3 * watch.seconds, "steps": end, "whole_fit_s": time.perf_counter() - start}
    if cuda:
        kernels = KernelWatch(64, 224)
        trained(bench, kind, 240, [kernels], 16, True)
        found["busy"] = kernels.found()["kernels_ms"] / found["long_ms"]
    return found


def peak(bench: Bench, seconds: float) -> dict[str, float]:
    """The FLOPs of a live step, and its share of what large products in bf16 reach here."""
    found = share_of_peak(bench, seconds, seconds)
    return {
        "TFLOP_per_s": found["peak_flops_per_s"] / 1e12,
        "GFLOP": found["step_flops"] / 1e9,
        "share": found["step_share"],
    }


def parts_by_size(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """The grid of docs/scale.md."""
    measure_grid(figures, device)


WORK = {
    "equality": equality,
    "peers": loops_of_peers,
    "steps": steps_of_ours,
    "grid": parts_by_size,
    "vmap": many_students,
    "compile": compiled_student,
    "mnist": hinton_on_mnist,
    "cells": cells_of_tables,
}


def main(stage: str, given: Mapping[str, str]) -> None:
    """Runs a stage; `given`: the options of `gpu.py`."""
    quiet(own=False)
    device = torch.device(given["device"])
    figures = Figures(Path(given["out"]) / "figures.jsonl")
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{stage}: on {card}, torch {torch.__version__}", flush=True)
    WORK[stage](figures, device, given)
    last = {f["what"]: f for f in figures.read() if f["stage"] == stage}
    sys.exit(int(any("error" in f for f in last.values())))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
