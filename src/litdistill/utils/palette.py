"""Colors of classes, for masks that are drawn and for files of them."""

from __future__ import annotations

import colorsys


def palette(classes: int) -> list[tuple[int, int, int]]:
    """Returns a color for each class: black for the first, which is mostly ground, then hues by the golden ratio."""
    hues = [(0.09 + i * 0.618034) % 1 for i in range(classes - 1)]
    colors = [colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * (i % 2), 0.95) for i, hue in enumerate(hues)]
    return [(0, 0, 0), *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colors)]
