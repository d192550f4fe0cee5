"""Figures of a language model: how much each token of some texts surprises both networks, and the loss over the position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litdistill.tasks.base import Samples
from litdistill.tasks.figures import STUDENT_COLOR, TEACHER_COLOR, any_names, new_figure
from litdistill.tasks.sequence import token_nll
from litdistill.types import Outputs
from litdistill.utils.modality import PADDING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXTS = 3  # that are drawn
COLUMNS = 92  # characters of a line
MOST = 8.0  # nats of the darkest color
BREAKS = {"\\n": "↵", "\\t": "→", "\\r": "←"}  # how they are drawn


def language_figures(samples: Samples) -> dict[str, Figure]:
    """Returns the two figures by name, for the student and, if there is one, the teacher."""
    both = [("student", samples.student), *([("teacher", samples.teacher)] if samples.teacher is not None else [])]
    nll = [(name, surprise(outputs, samples.targets)) for name, outputs in both]
    with any_names():
        return {
            "surprise": surprise_figure(nll, samples.targets, samples.names),
            "loss by position": position_figure(nll),
        }


def surprise(outputs: Outputs, targets: Tensor) -> Tensor:
    """Returns −log p of each target in nats, (N, T) float64, NaN at padding."""
    places = targets != PADDING
    found = torch.full(targets.shape, torch.nan, dtype=torch.float64)
    found[places] = token_nll(outputs.logits[places], targets[places])
    return found


def surprise_figure(nll: Sequence[tuple[str, Tensor]], targets: Tensor, names: Sequence[str]) -> Figure:
    """Returns a figure of some texts, each token the darker the more it surprises; one panel for each network.

    Texts are evenly spaced among those of median length and more. `names`: of the tokens.
    """
    lengths = (targets != PADDING).sum(1)
    long = (lengths >= lengths.median()).nonzero().flatten().tolist()
    chosen = long[:: max(1, len(long) // TEXTS)][:TEXTS]
    words = [[_drawn(names[t]) for t in targets[i][targets[i] != PADDING].tolist()] for i in chosen]
    lines = sum(_lines(text) + 1 for text in words)
    figure = new_figure(11, 0.24 * lines * len(nll) + 0.5 * len(nll) + 0.4)
    panels = figure.subplots(len(nll), 1, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, nll, strict=True):
        axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
        axes.set_axis_off()
        mean = values[~values.isnan()].mean().item()
        axes.set_title(
            f"{name}: {mean:.2f} nats a token; darker is more surprised, {MOST:g} nats and more darkest", fontsize=10
        )
        row = 0
        for i, text in zip(chosen, words, strict=True):
            row = _write(axes, text, values[i][~values[i].isnan()].tolist(), row, name) + 1
    return figure


def _drawn(token: str) -> str:
    return BREAKS.get(token, "∎" if token.startswith("<|") else token.replace("\\n", "↵"))


def _lines(text: Sequence[str]) -> int:
    """Returns the number of lines that a text of tokens takes."""
    count, column = 1, 0
    for token in text:
        if column + len(token) > COLUMNS:
            count, column = count + 1, 0
        column += len(token)
    return count


def _write(axes: Axes, text: Sequence[str], values: Sequence[float], row: int, name: str) -> int:
    """Draws the tokens from a row on, and returns the row behind them."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    color, column = to_rgb(STUDENT_COLOR if name == "student" else TEACHER_COLOR), 0
    for token, value in zip(text, values, strict=True):
        if column + len(token) > COLUMNS:
            row, column = row + 1, 0
        shade = 0.85 * min(value, MOST) / MOST
        axes.add_patch(Rectangle((column, row), len(token), 1, color=(*color, shade), linewidth=0))
        for i, character in enumerate(token):  # one by one, so that all are as wide as a column
            axes.text(column + i + 0.5, row + 0.5, character, ha="center", va="center", fontsize=8, family="monospace")
        column += len(token)
    return row + 1


def position_figure(nll: Sequence[tuple[str, Tensor]]) -> Figure:
    """Returns a figure of the mean loss at each position of the sequences: how much a network makes of a longer context."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    for name, values in nll:
        mean = values.nanmean(0)
        axes.plot(
            range(1, len(mean) + 1), mean, label=name, color=STUDENT_COLOR if name == "student" else TEACHER_COLOR
        )
    axes.set(xlabel="position in the sequence (tokens)", ylabel="mean loss (nats a token)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
