"""Figures of a classifier: its worst mistakes, confusion matrices, reliability diagrams."""

from __future__ import annotations

import logging
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litdistill.tasks import metrics
from litdistill.tasks.base import Samples
from litdistill.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)


def classification_figures(samples: Samples) -> dict[str, Figure]:
    """Returns the three figures by name, for the student and, if there is one, the teacher."""
    with any_names():
        return _figures(samples)


def _figures(samples: Samples) -> dict[str, Figure]:
    targets, logits = samples.targets, samples.student.logits
    teacher = samples.teacher.logits if samples.teacher is not None else None
    both = [("student", logits), *([("teacher", teacher)] if teacher is not None else [])]
    return {
        "worst mistakes": worst_mistakes(samples.inputs, samples.words, targets, logits, teacher, samples.names),
        "confusion": confusion_matrices([(n, metrics.confusion(x, targets)) for n, x in both], samples.names),
        "reliability": reliability_diagrams([(n, *metrics.reliability(x, targets)) for n, x in both]),
    }


FONTS = (  # that have the scripts of East Asia, as matplotlib calls them, by system
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "IPAGothic", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("Hiragino Sans", "Arial Unicode MS", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic"),
)


@contextmanager
def any_names() -> Iterator[None]:
    """Draws names of classes as they are: none is a formula, and a script that no font has gives one line in the log."""
    import matplotlib as mpl
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in FONTS if font in installed)]
    with (
        warnings.catch_warnings(record=True) as caught,
        mpl.rc_context({"text.parse_math": False, "font.family": fonts}),
    ):
        warnings.filterwarnings("always", "Glyph .* missing from")
        yield
    missing = [w for w in caught if re.match(r"Glyph .* missing from", str(w.message))]
    for other in (w for w in caught if w not in missing):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if missing:
        log.warning(
            "No installed font has all characters of the classes' names: pictures show boxes for some. A font for them, such "
            "as Debian's fonts-noto-cjk, helps, after `rm -r ~/.cache/matplotlib`."
        )


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of this size in inches, without a window and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Writes a figure, as a PNG or what the file's ending says; readers never see a part. `options`: those of `savefig`."""
    form = Path(path).suffix[1:] or "png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=form, **options))


def draw_input(axes: Axes, given: Tensor | None, words: str | None) -> None:
    """Draws a sample's input: an image (C, H, W), uint8 or floats from 0 to 1, over its `words`; or these alone."""
    if given is not None and given.ndim == 3 and len(given) in (1, 3):
        axes.imshow(given.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
        if words is not None:
            line = textwrap.shorten(words, 36)
            axes.text(0.5, -0.05, line, fontsize=6, ha="center", va="top", transform=axes.transAxes)
    elif words is not None:
        lines = textwrap.wrap(words, 30, max_lines=12, placeholder=" …")
        axes.text(0, 1, "\n".join(lines), fontsize=7, va="top", transform=axes.transAxes)
    axes.set_axis_off()


def worst_mistakes(
    image: Callable[[int], Tensor | None],
    words: Callable[[int], str | None],
    targets: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    names: Sequence[str],
    count: int = 12,
) -> Figure:
    """Returns a figure of the samples that the student misclassifies with the highest confidence, with both predictions.

    `image(i)`: (C, H, W) uint8, or floats from 0 to 1; another sample is shown as `words(i)`, where there are any.
    `targets` (N,), logits (N, classes).
    """
    p = student.double().softmax(1)
    confidence, predicted = p.max(1)
    wrong = torch.where(predicted != targets, confidence, -1.0)
    chosen = wrong.argsort(descending=True, stable=True)[: min(count, int((wrong >= 0).sum()))].tolist()
    q = teacher.double().softmax(1) if teacher is not None else None
    figure = new_figure(12, 2.9 * max(1, -(-len(chosen) // 4)))
    if not chosen:
        figure.text(0.5, 0.5, "no mistake on the validation set", ha="center", va="center", fontsize=14)
        return figure
    cells = figure.subfigures(-(-len(chosen) // 4), 4, squeeze=False).ravel()
    for cell, i in zip(cells, chosen, strict=False):
        left, right = cell.subplots(1, 2, width_ratios=[1, 1.3])
        draw_input(left, image(i), words(i))
        left.set_title(f"is {shorter(names[int(targets[i])])}", fontsize=9, loc="left")
        top = (p[i] + (q[i] if q is not None else 0)).topk(min(3, p.shape[1])).indices.tolist()
        rows = range(len(top))
        right.barh(
            [r - 0.2 for r in rows], [float(p[i, c]) for c in top], height=0.36, color=STUDENT_COLOR, label="student"
        )
        if q is not None:
            right.barh(
                [r + 0.2 for r in rows],
                [float(q[i, c]) for c in top],
                height=0.36,
                color=TEACHER_COLOR,
                label="teacher",
            )
        right.set_yticks(list(rows), [shorter(names[c]) for c in top], fontsize=8)
        right.set_xlim(0, 1)
        right.invert_yaxis()
        right.tick_params(axis="x", labelsize=7)
        right.spines[["top", "right"]].set_visible(False)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


STUDENT_COLOR, TEACHER_COLOR = "#0072B2", "#E69F00"  # of Okabe & Ito's palette for color blindness


NAMED = 40  # classes at most whose names and counts are drawn
LONGEST = 18  # characters of a class name beside a matrix


def confusion_matrices(matrices: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> Figure:
    """Returns a figure of counts (classes, classes), one panel per model side by side; rows are labels.

    Only mistakes are shaded, on one scale for all panels. TensorBoard shows figures in cards twice as wide as high.
    """
    classes, drawn = len(names), len(names) <= NAMED
    shown = [shorter(name) for name in names]
    size = 10.0 if classes <= 12 else 7.0  # of the text, in points
    # Cards are small, and text grows as the figure shrinks.
    side = min(max(4.2, 0.24 * classes), 10.0) if drawn else 6.0
    written = 0.009 * size * max(map(len, shown)) if drawn else 0.0  # inches of the longest name
    figure = new_figure(side * len(matrices) + 1.6 + written, side + 0.8 + written)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)  # inches; names are at the edge
    wrong = [matrix.clone().double().fill_diagonal_(0) for _, matrix in matrices]
    most = max(1.0, *(float(w.max()) for w in wrong))
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axes, (name, matrix), mistakes in zip(panels, matrices, wrong, strict=True):
        image = axes.imshow(mistakes, cmap="Blues", vmin=0, vmax=most, interpolation="nearest")
        axes.set_title(f"{name}: {int(matrix.trace()):,} of {int(matrix.sum()):,} right")
        axes.set_xlabel("predicted")
        if not drawn:
            continue
        upright = max(map(len, shown)) <= 2
        axes.set_xticks(range(classes), shown, rotation=0 if upright else 90, fontsize=size)
        axes.set_yticks(range(classes), shown, fontsize=size)
        for row, column in matrix.nonzero().tolist():
            dark = row != column and mistakes[row, column] > 0.6 * most
            axes.text(
                *(column, row, int(matrix[row, column])),
                ha="center", va="center", fontsize=size, color="white" if dark else "black",
            )  # fmt: skip
    panels[0].set_ylabel("label")
    ticks = sorted({0, round(most / 2), round(most)})
    figure.colorbar(image, ax=list(panels), label="mistakes", shrink=0.6, aspect=30, ticks=ticks)
    return figure


def shorter(name: str) -> str:
    """Returns a class name of at most `LONGEST` characters, in one line, with its end where it is cut."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 6]}…{line[-5:]}"


def reliability_diagrams(models: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> Figure:
    """Returns a figure of accuracy over confidence, one panel per model: (name, confidence, accuracy, count), each (bins,)."""
    figure = new_figure(3.6 * len(models), 3.6)
    for axes, (name, confidence, accuracy, count) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models, strict=True
    ):
        full = count > 0
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
        axes.plot(
            confidence[full],
            accuracy[full],
            marker="o",
            color=STUDENT_COLOR if name == "student" else TEACHER_COLOR,
            label=name,
        )
        axes.bar(
            (torch.arange(len(count)) + 0.5) / len(count), count / count.sum(),
            width=1 / len(count), color="0.85", label="share of samples",
        )  # fmt: skip
        ece = float(((confidence - accuracy).abs() * count)[full].sum() / count.sum())
        axes.set(title=f"{name}: ECE {ece:.3f}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)
    return figure
