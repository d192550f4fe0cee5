"""Small pictures that tests draw themselves: shapes in white noise, and gray levels that decide a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw


def pictures(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """Smooth ones, noise, and one of a single level."""
    draw = torch.Generator().manual_seed(n + c + h + w)
    x = torch.nn.functional.interpolate(torch.rand(n, c, 4, 4, generator=draw), (h, w), mode="bicubic")
    x = (x * 200 + 30).clamp(0, 255).to(torch.uint8)
    x[0], x[1] = torch.randint(0, 256, (c, h, w), dtype=torch.uint8, generator=draw), 77
    return x


RIPENESS = {"1_green": 60, "2_turning": 110, "3_ripe": 160, "4_overripe": 210}


def shapes(root: Path, count: int, names: Mapping[str, str] | None = None) -> Path:
    """Folders of black shapes at random places, `count` of each; `names`: how a folder is called instead."""
    draws = np.random.default_rng(0)
    for kind in ("cross", "disk", "square", "triangle"):
        folder = root / (names or {}).get(kind, kind)
        folder.mkdir(parents=True)
        for i in range(count):
            picture = Image.new("L", (32, 32), 255)
            _draw(ImageDraw.Draw(picture), kind, *draws.integers(4, 12, 2).tolist(), int(draws.integers(10, 16)))
            values = np.asarray(picture).astype(int) + draws.integers(-6, 7, (32, 32))
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB").save(folder / f"{i:03}.png")
    return root


def _draw(canvas: ImageDraw.ImageDraw, kind: str, x: int, y: int, s: int) -> None:
    if kind == "disk":
        canvas.ellipse([x, y, x + s, y + s], fill=0)
    elif kind == "square":
        canvas.rectangle([x, y, x + s, y + s], fill=0)
    elif kind == "triangle":
        canvas.polygon([(x, y + s), (x + s, y + s), (x + s // 2, y)], fill=0)
    else:
        canvas.line([x, y, x + s, y + s], fill=0, width=3)
        canvas.line([x, y + s, x + s, y], fill=0, width=3)


def ripeness(root: Path, counts: Sequence[int]) -> Path:
    """Folders of noise around the gray level that decides the class, so many of each class."""
    draws = np.random.default_rng(0)
    for (name, level), count in zip(RIPENESS.items(), counts, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(count):
            values = np.full((32, 32, 3), level, float) + draws.normal(0, 18, (32, 32, 3)) + draws.normal(0, 8)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03}.png")
    return root
