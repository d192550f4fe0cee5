"""A group of made-up models for tests of the page: what `litdistill.report.collect` would have measured."""

from __future__ import annotations

from pathlib import Path

import torch

from litdistill.evaluation.privacy import Membership
from litdistill.evaluation.robustness import ALL, CORRUPTIONS, STRENGTHS
from litdistill.report.collect import Group, Row, Seed, Settings
from litdistill.tasks import Classification
from litdistill.types import Outputs

HOSTILE = "<script>alert(1)</script>"
SETTINGS = Settings(epsilons=(4, 16))


def summary(seed: int, train: int = 1000) -> dict:
    return {
        "seed": seed,
        "method": "kd",
        "options": {"train/epochs": 5},
        "metric": {"name": "accuracy", "direction": "max"},
        "data": {"name": "digits", "train": train, "test": 60, "classes": 10, "input_shape": [1, 8, 8]},
        "student": {"name": "conv4-16x32x64", "test": {"accuracy": {"best": 0.9, "last": 0.8}}},
        "teacher": {"sha256": "t"},
        "time": {"total_s": 10.0 + seed, "teacher_s": 2.0, "fit_s": 8.0, "samples_per_s": 100.0},
        "epochs": 5,
        "steps": 50,
        "device": {"type": "cpu", "world_size": 1, "threads": 1},
        "command": f"python scripts/train.py method=kd seed={seed}",
    }


def seed(number: int, right: float, classes: int, sha: str, summary: dict, test: int = 60) -> Seed:
    """Logits of which about a share `right` is right; targets are the same for all models."""
    drawn = torch.Generator().manual_seed(number)
    targets = torch.arange(test) % classes
    logits = torch.randn(test, classes, generator=drawn)
    hit = torch.rand(test, generator=drawn) < right
    logits[torch.arange(test)[hit], targets[hit]] += 4
    made = {k: [0.9 - 0.05 * number % 0.3 - 0.1 * i for i in range(5)] for k in CORRUPTIONS}
    attacks = {k: [0.9, 0.5, 0.1] for k in STRENGTHS[SETTINGS.attacks]} | {ALL: [0.9, 0.45, 0.05]}
    folder = Path("/nowhere")
    outputs, found = Outputs.of(logits), {"corruptions": made, "attacks": attacks}
    betrayed = Membership(0.5 + 0.01 * (number % 7), 0.012, 500, test)
    return Seed(summary, folder, Classification(), outputs, targets, outputs, targets, 1.5, found, betrayed, sha)


TEACHER_MS = 0.06


def timing(bytes: int, ms: float) -> dict:
    ratio = [share * ms / TEACHER_MS for share in (0.9, 1.0, 1.1)]
    each = {"p50_ms": ms, "p95_ms": 1.2 * ms, "images_per_s": 1000 / ms, "calls": 100, "ratio": ratio}
    return {"bytes": bytes, "memory": 3_000_000, "cpu_share": 0.9, "cpu": {1: each, 64: each, "energy": None}}


def group(rows: int = 12, seeds: int = 2, classes: int = 10, name: str = HOSTILE) -> Group:
    """A teacher and `rows` kinds of student; the first is called `name`, the last is int8."""
    about = {"name": "conv4-16x32x64", "params": 24_058, "macs": 157_312}
    made = [
        Row("teacher", about, [seed(99, 0.95, classes, "t", {})], teacher=True, timing=timing(1_500_000, TEACHER_MS))
    ]
    for i in range(rows):
        label = name if i == 0 else f"distilled, pruned to {i} channels, then int8"
        each = [seed(10 * i + s, 0.6 + 0.02 * i, classes, f"s{i}-{s}", summary(s)) for s in range(seeds)]
        made.append(Row(label, about, each, timing=timing(20_000 * (i + 1), 0.01 * (i + 1))))
    made[-1].precision = "int8"
    for one in made[-1].seeds:
        one.summary["start"] = {"from": "network", "images": 50_000, "method": "label_smoothing"}
    facts = {"name": "digits", "classes": classes, "input_shape": [1, 8, 8], "test": 60}
    facts["metric"] = {"name": "accuracy", "direction": "max"}
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Group("digits", facts, made, images, tuple(map(str, range(classes))))


def write_page(out: Path, made: Group | None = None) -> Group:
    """The page of a made-up group, in `out`."""
    from litdistill.report.blocks import write
    from litdistill.report.build import chapter

    made = made or group()
    write(f"Students {HOSTILE}", [f"a fact {HOSTILE}"], chapter(made, "", SETTINGS), out)
    return made
