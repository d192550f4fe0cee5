"""How fast a distillation step is, against the loop that other projects write and against a bare loop.

    python scripts/benchmark.py                              all of it: a table, and benchmark.json
    python scripts/benchmark.py --pairs small --rounds 3     one pair, quickly

It measures on a CPU. On a GPU `make gpu` does, whose stages have a time limit each (`scripts/gpu.py`).

All variants of a pair run on one thread, in turn, every other round in reverse: other projects' loops in one process and this
project's in another, since the project sets its process's allocator (`litdistill.utils.allocator`). What is compared is
process CPU time a step, and figures are medians of each round's ratio, with quartiles: milliseconds drift on a shared machine,
ratios hardly.

`peers`: images augmented one by one by torchvision's transforms in a DataLoader, the teacher run anew in each step, the plain
optimizer, loss and accuracy read after each step. `torchdistill`: its distillation box on the same loader, where installed.
`live`: this project, the teacher run anew; `packed`: the same with `compile.teacher=prepacked`; `bf16`: the same with
`trainer.precision=bf16-mixed`, on a CPU that has instructions for it. `cached`: what the teacher says
is known. `hard`: this project with labels alone. `floor`: a bare loop over resident images and known outputs that logs
nothing. Networks, images and labels are random, which costs what real ones cost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmark_parts import PAIRS, Bench, Pair, budget, hushed, variants
from benchmark_questions import filled_by_views, growth, peak_memory, share_of_peak

from litdistill.benchmarks.tables import between_marks
from litdistill.utils.allocator import keep_freed_memory

TARGETS = {  # what the ratios are to reach, on two cores
    "small": {"peers/live": 4, "peers/cached": 15, "cached/floor": 1.10, "cached/hard": 1.05},
    "resnet50": {"peers/live": 1.6, "peers/cached": 12, "cached/floor": 1.05, "cached/hard": 1.05},
    "resnet50-3x3": {"peers/live": 1.5, "peers/cached": 50, "cached/floor": 1.05, "cached/hard": 1.05},
    "resnet32x4": {"peers/live": 1.35, "peers/cached": 3, "cached/floor": 1.05, "cached/hard": 1.05},
}

CPU = torch.device("cpu")
OTHERS = ["peers", "torchdistill"]
OTHER_RATIOS = [("peers", "packed"), ("peers", "bf16"), ("torchdistill", "cached")]  # without an aim
QUESTIONS = ["pairs", "filled", "data", "growth", "memory"]


def ratios(pair: Pair, rounds: int) -> dict[str, Any]:
    """Times all variants of a pair; medians in milliseconds, ratios with quartiles, and what a step is made of."""
    with contextlib.ExitStack() as at_end:
        run = served(pair, False, at_end) | served(pair, True, at_end)
        times: dict[str, list[float]] = {name: [] for name in run}
        for i in range(rounds):
            for name in list(run) if i % 2 == 0 else list(run)[::-1]:
                times[name].append(run[name]())
    found: dict[str, Any] = {"ms": {name: 1e3 * statistics.median(t) for name, t in times.items()}, "ratios": {}}
    others = [f"{over}/{under}" for over, under in OTHER_RATIOS if over in run and under in run]
    for name in [*TARGETS[pair.name], *others]:
        over, under = name.split("/")
        found["ratios"][name] = quartiles([a / b for a, b in zip(times[over], times[under], strict=True)])
    bench = Bench(pair, CPU)
    found["budget_ms"] = {name: 1e3 * seconds for name, seconds in budget(bench, rounds).items()}
    found["peak"] = share_of_peak(bench, found["budget_ms"]["teacher"] / 1e3, found["ms"]["live"] / 1e3)
    return found


def served(pair: Pair, own: bool, at_end: contextlib.ExitStack) -> dict[str, Callable[[], float]]:
    """This project's variants, or those of others, in a process of their own; by name, as `variants` gives them."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, pair, own))
    process.start()
    there.close()
    at_end.callback(process.join)
    at_end.callback(here.close)  # first: the other end then has nobody left to answer

    def ask(name: str) -> float:
        here.send(name)
        return float(here.recv())

    return {name: functools.partial(ask, name) for name in here.recv()}


def serve(pipe: Connection, pair: Pair, own: bool) -> None:
    """Runs what it is asked for by name, once it is warm: allocations, kernels, the loader's first images."""
    quiet(own)
    run = {name: step for name, step in variants(Bench(pair, CPU)).items() if (name not in OTHERS) == own}
    for step in run.values():
        step()
    pipe.send(list(run))
    with contextlib.suppress(EOFError):  # nobody is left to ask
        while True:
            pipe.send(run[pipe.recv()]())


def quiet(own: bool = True) -> None:
    """One thread and few words, and this project's allocator where it is its own time that is taken."""
    warnings.filterwarnings("ignore")
    hushed()
    torch.set_num_threads(1)
    if own:
        keep_freed_memory()


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    if len(values) < 2:
        return values * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def table(found: dict[str, Any]) -> str:
    """What `ratios` gave for each pair, as Markdown."""
    names = ["peers/live", "peers/cached", "cached/floor", "cached/hard"]
    lines = [
        "| pair | peers, ms | live, ms | cached, ms | " + " | ".join(n.replace("/", " ÷ ") for n in names) + " |",
        "|---|" + "---:|" * (3 + len(names)),
    ]
    for name, one in found.items():
        cells = [f"{one['ms'][v]:.1f}" for v in ("peers", "live", "cached")]
        for ratio in names:
            low, middle, high = one["ratios"][ratio]
            target = TARGETS[name][ratio]
            sign = "≤" if ratio.startswith("cached") else "≥"
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f}), aim {sign} {target:g}")
        lines.append(f"| {PAIRS[name].words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs_part(found: dict[str, Any]) -> list[str]:
    """The paragraphs on pairs of networks, by their names."""
    pairs = {PAIRS[name].words: one for name, one in found.items()}
    parts = [table(found)]
    parts.append("CPU milliseconds of the parts of a step, each by itself:")
    names = next(iter(pairs.values()))["budget_ms"]
    rows = [f"| {w} | " + " | ".join(f"{v:.2f}" for v in one["budget_ms"].values()) + " |" for w, one in pairs.items()]
    parts.append("\n".join(["| pair | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names), *rows]))
    shares = [
        f"{100 * one['peak']['teacher_share']:.0f} % and {100 * one['peak']['step_share']:.0f} % ({w})"
        for w, one in pairs.items()
    ]
    parts.append(
        "Floating-point operations a second of the teacher's forward and of the whole live step, in per cent of what large "
        "matrix products reach on the same device: " + "; ".join(shares) + "."
    )
    packed = [
        "{1:.2f} ({0:.2f}–{2:.2f}, {name})".format(*one["ratios"]["peers/packed"], name=w) for w, one in pairs.items()
    ]
    parts.append("With `compile.teacher=prepacked` peers ÷ live is: " + "; ".join(packed) + ".")
    if rounded := [
        "{1:.2f} ({0:.2f}–{2:.2f}, {name})".format(*one["ratios"]["peers/bf16"], name=w)
        for w, one in pairs.items()
        if "peers/bf16" in one["ratios"]
    ]:
        parts.append(
            "With `trainer.precision=bf16-mixed`, which rounds products to 8 bits and is no default on a CPU, on this one, "
            f"which has instructions for it, peers (in float32) ÷ live is: {'; '.join(rounded)}."
        )
    box = [f"{one['ratios']['torchdistill/cached'][1]:.1f} ({w})" for w, one in pairs.items()]
    parts.append("torchdistill's distillation box ÷ cached: " + ", ".join(box) + ".")
    return parts


def page(found: dict[str, Any]) -> str:
    """All figures of a benchmark.json as Markdown."""
    parts = pairs_part(found["pairs"]) if "pairs" in found else []
    if f := found.get("filled"):
        parts.append(
            "A cache that fills as views come up (ResNet-50 → ConvNet, ±2 pixels, 30 epochs): the first run is "
            f"{f['live/first']:.2f} times as fast as one that asks the teacher anew (aim ≥ 1.45), the next one, with "
            f"another seed, {f['live/next']:.1f} times (aim ≥ 8), and {f['live/next_same_views']:.1f} times where it sees the "
            "same views of an image (`data.view_seed=0`); weights differ from those of the run that asks anew by "
            f"at most {f['largest_difference_of_weights']:.0e} (aim ≤ 1e-5)."
        )
    if "data" in found:
        ratio = {name: "{1:.0f} times ({0:.0f}–{2:.0f})".format(*d["ratio"]) for name, d in found["data"].items()}
        words = "; ".join(f"{name}: {r}" for name, r in ratio.items())
        parts.append(f"A batch of augmented images, image by image ÷ here (aim ≥ 20 and ≥ 60): {words}.")
    for what, by in found.get("growth", {}).items():
        unit = (
            "Samples a second of a whole run on the digits, whose steps are shorter than an exchange of gradients"
            if what == "ranks"
            else "CPU milliseconds of a cached step"
        )
        digits = 0 if what == "ranks" else 2
        parts.append(f"{unit}, by {what}: " + ", ".join(f"{k}: {v:.{digits}f}" for k, v in by.items()) + ".")
    if m := found.get("memory"):
        parts.append(
            f"Peak memory: {m['images_bytes'] / 1e6:.0f} MB of images added {m['added_bytes'] / 1e6:.0f} MB to the process, "
            f"of which the cache of all 162 views {m['cache_bytes'] / 1e6:.0f} MB; without it {m['added/images']:.2f} "
            "times the images (aim ≤ 2)."
        )
    return "\n\n".join(parts)


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", choices=[*PAIRS], default=None, help="which pairs; all where left out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu; a GPU is measured by make gpu")
    parser.add_argument("--only", nargs="*", choices=QUESTIONS, default=None)
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where the figures go")
    parser.add_argument("--into", type=Path, default=None, help="a page whose part <!-- benchmark --> is written anew")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error(f"--device {args.device}: steps on a GPU are measured by `make gpu STAGES=equality,peers,steps`.")
    quiet()
    wanted = args.only or (["pairs"] if args.pairs is not None else QUESTIONS)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}

    def keep(key: str, value: Any) -> None:
        results[key] = value
        args.json.write_text(json.dumps(results, indent=1) + "\n")

    if "pairs" in wanted:
        found = results.get("pairs", {})
        for name in args.pairs or PAIRS:
            found[name] = ratios(PAIRS[name], args.rounds)
            print(name, json.dumps(found[name]), flush=True)
            keep("pairs", found)
        print(table(found))
    if "filled" in wanted:
        keep("filled", filled_by_views())
        print("filled by views:", json.dumps(results["filled"]), flush=True)
    if "data" in wanted:
        from benchmark_data import augmentation_ratios

        keep("data", augmentation_ratios(args.rounds))
        print("augmented input, image by image ÷ here:", json.dumps(results["data"]), flush=True)
    if "growth" in wanted:
        keep("growth", growth())
        print("growth:", json.dumps(results["growth"]), flush=True)
    if "memory" in wanted:
        keep("memory", peak_memory())
        print("memory:", json.dumps(results["memory"]), flush=True)
    if args.into is not None:
        args.into.write_text(between_marks(args.into.read_text(), "benchmark", page(results)))


if __name__ == "__main__":
    main()
