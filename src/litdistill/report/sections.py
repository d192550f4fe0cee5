"""The sections of the page, pure functions of the measured groups."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from litdistill.evaluation.predictions import agreement
from litdistill.report import headline, plots, points
from litdistill.report.blocks import Block, Fold, Grid, Picture, Section, Table, Text, Thumb, Thumbs
from litdistill.report.collect import Group, Row, Seed
from litdistill.report.converted import beside_float
from litdistill.tasks import Detection, metrics
from litdistill.utils.units import SHARES, axis, factor, heading, named, quantity, shown_mean, spread

FAILURES = 8  # images per row
DRAWN = 30  # classes or labels at most that have bars; the table has all
MEASURED = "How this was measured"


def scores(row: Row) -> list[float]:
    """Returns the monitored metric of each seed, fractions in percent."""
    return [seed.score for seed in row.seeds]


def capitalized(text: str) -> str:
    """Returns the text with a capital first letter; abbreviations (mAP) are unchanged."""
    return text[:1].upper() + text[1:] if text.islower() else text


def follows(pairs: Sequence[tuple[Seed, Seed]]) -> list[dict[str, float]]:
    """Returns the agreement of each run with its teacher on the test set."""
    return [agreement(seed.task, seed.test, teacher.test, seed.test_targets) for seed, teacher in pairs]


def names(group: Group) -> list[str]:
    return [style.name for style in looks(group)]


def looks(group: Group) -> list[plots.Style]:
    return plots.styles([r.label for r in group.rows], [r.teacher for r in group.rows])


def with_teachers(row: Row, group: Group) -> list[tuple[Seed, Seed]]:
    """Returns a row's runs, each with its teacher, or with the group's first where it has none.

    Empty for a teacher's row, and where the group has no teacher.
    """
    if row.teacher or group.teacher is None:
        return []
    teachers = {r.seeds[0].sha256: r.seeds[0] for r in group.rows if r.teacher}
    own = [str((seed.summary.get("teacher") or {}).get("sha256")) for seed in row.seeds]
    return [(seed, teachers.get(sha, group.teacher.seeds[0])) for seed, sha in zip(row.seeds, own, strict=True)]


def share(values: Sequence[float], of: float) -> str:
    """Returns quartiles relative to `of` as `0.31 (0.30–0.33)`, with two digits of a small one: `0.0012 (0.0011–0.0013)`."""
    low, middle, high = (v / of for v in values)
    digits = 2 if not 0 < middle < 0.1 else 1 - math.floor(math.log10(middle))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


# -- what they are worth -----------------------------------------------------------------------------------------------


def quality(group: Group, key: str) -> Section:
    """Returns the section of the main table: the metric comes first, and what it is compared with."""
    metric = group.metric
    followed = [follows(with_teachers(row, group)) for row in group.rows]
    others = list(dict.fromkeys(k for row in group.rows for k in row.seeds[0].quality if k not in (metric, "brier")))
    like = list(dict.fromkeys(k for found in followed for one in found for k in one))
    agreed = [k for k in like if k in SHARES]
    columns: dict[str, list[str]] = {}
    add = lambda name, cell: columns.setdefault(name, []).append(cell)  # noqa: E731
    marked = [i for i, row in enumerate(group.rows) if any(headline.findings(seed, group) for seed in row.seeds)]
    for i, (name, row, found) in enumerate(zip(names(group), group.rows, followed, strict=True)):
        first, measures = row.seeds[0].summary, [seed.quality for seed in row.seeds]
        # Without epochs, "last" is the starting point's
        last = [s.summary["student"]["test"][metric]["last"] for s in row.seeds if s.summary.get("epochs")]
        add("model", f"{name} [!]" if i in marked else name)
        add(heading(metric), shown_mean(metric, [q[metric] for q in measures]))
        add(
            "against its teacher",
            headline.signed(group, headline.against(row, group, headline.teacher_row(row, group))),
        )
        add("over labels alone", headline.signed(group, headline.against(row, group, headline.control(row, group))))
        add("last epoch" + (" %" if metric in SHARES else ""), shown_mean(metric, last) if last else "")
        for k in agreed:
            add(heading(k), shown_mean(k, known) if (known := [one[k] for one in found if k in one]) else "")
        add("seeds", str(len({s.summary.get("seed") for s in row.seeds})))
        add("trained on", counted(first["data"]["train"]) if first else "")
        for k in others:
            add(heading(k), shown_mean(k, [q[k] for q in measures]))
        for k in (k for k in like if k not in agreed):
            add(heading(k), shown_mean(k, known) if (known := [one[k] for one in found if k in one]) else "")
        add("network", row.about["name"])
        add("starts from", starts_from(first, group.things) if first else "")
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    left = [i for i, name in enumerate(columns) if name in ("model", "network", "starts from")]
    table = Table(f"{key}quality", list(columns), list(zip(*columns.values(), strict=True)), left, marked)
    blocks: list[Block] = [table, *beside_float(group, key), Fold(MEASURED, [_worth(group, like)])]
    return Section(f"{key}worth", "What each is worth", blocks)


def _worth(group: Group, like: Sequence[str]) -> str:
    """Returns the text above the table of `quality`."""
    things, metric = group.things, named(group.metric)
    chosen_on = min(len(s.val_targets) for r in group.rows for s in r.seeds)
    tested = len(group.rows[0].seeds[0].test_targets)
    one = f", of which one is {100 / chosen_on:.2g} points" if group.metric == "accuracy" else ""
    text = (
        f"On {tested:,} test {things} that nothing was trained or chosen on. {capitalized(metric)} is that of the weights "
        "that were best on the validation set, as they ship: rows that are int8 are measured as their int8 file. The "
        f"validation set has {chosen_on:,} {things}{one}: the epoch that is best on "
        "so few is partly drawn by lot, and what it has before others there may be noise. So the last epoch, which nothing "
        f"chose, stands beside it; a row that was only converted has none. {capitalized(things)} are those of the row's own "
        "training: what it starts from may have seen more. Mean ± standard deviation over seeds. Over labels alone: the "
        f"difference from the same network trained on the same {things} at the same budget without a teacher, in pairs of one "
        "seed; it stands where there is such a run, and of several that is the best on the validation set."
    )
    if group.less_is_better:
        text += f" Of {metric} less is better."
    if "agreement" in like:
        if isinstance(group.rows[0].seeds[0].task, Detection):
            text += " Agreement: the mAP of the student's boxes against those that the teacher gives a score of at least 0.5."
        else:
            text += (
                f" Agreement: the share of {things} for which the student decides as the teacher does; KL: from the "
            )
            text += "teacher, in nats."
    return text


def counted(number: int | None) -> str:
    """Returns the number with thousands separators; empty for None."""
    return "" if number is None else f"{number:,}"


def starts_from(summary: Mapping[str, Any], things: str = "images") -> str:
    """Returns a text on a run's initial weights and the number of their training samples."""
    start = summary.get("start")
    if start is None:
        return "nothing"
    images = f"{start['images']:,} {things}" if start.get("images") else f"unknown {things}"
    return {
        "teacher": f"the teacher ({images})",
        "published": "published weights",
    }.get(start.get("from"), f"a network of {images}" + (f" ({start['method']})" if "method" in start else ""))


def tradeoffs(group: Group, key: str) -> Section:
    """Returns the section of the main figure: the metric over file size and latency."""
    timed = [(s, r) for s, r in zip(looks(group), group.rows, strict=True) if "cpu" in r.timing]
    blocks: list[Block] = []
    metric = axis(group.metric)
    if timed:
        styles, rows, pictures = [s for s, _ in timed], [r for _, r in timed], []
        values = [scores(r) for r in rows]
        row = headline.chosen(group)
        chosen = rows.index(row) if row in rows else None
        for name, xlabel, costs in (
            ("bytes", "file (kB)", [r.timing["bytes"] / 1e3 for r in rows]),
            ("latency", f"latency, p50 of one {group.things[:-1]} (ms)", [r.timing["cpu"][1]["p50_ms"] for r in rows]),
        ):
            plane = points.Plane(styles, costs, values, group.less_is_better, chosen)
            svg = points.over_cost(plane, xlabel, f"test {metric}")
            best = "; ".join(styles[i].name for i in plane.front)
            alt = f"Test {named(group.metric)} over {xlabel}. On the Pareto front: {best}."
            pictures.append(Picture(f"{key}{group.metric}-over-{name}", svg, alt))
        blocks += [Grid(pictures, wide=True), *(Text(p.alt) for p in pictures)]
        if chosen is not None:
            blocks.append(Text(f"Ringed: {styles[chosen].name}, of the card above."))
    else:
        blocks.append(Text("Not timed: these students cannot be exported."))
    return Section(f"{key}tradeoffs", f"{capitalized(named(group.metric))} over bytes and over latency", blocks)


def over_seeds(group: Group, key: str) -> Section:
    styles, metric = looks(group), group.metric
    form = ".1f" if metric in SHARES else ".4g"
    teacher = statistics.mean(scores(group.teacher)) if group.teacher else None
    values = [scores(r) for r in group.rows]
    about = f"A mark a seed, a bar and a number their mean; dashed, the teacher's {named(metric)}."
    svg = plots.dots(styles, values, f"test {axis(metric)}", teacher, form)
    pictures = [Picture(f"{key}{metric}", svg, f"Test {named(metric)} of each seed: " + listed(styles, group))]
    pairs = [(s, follows(t)) for s, r in zip(styles, group.rows, strict=True) if (t := with_teachers(r, group))]
    between = ""
    for name in dict.fromkeys(k for _, found in pairs for one in found for k in one if k != "kl"):
        measured = [(s, known) for s, found in pairs if (known := [one[name] for one in found if name in one])]
        styles, found, by = [s for s, _ in measured], [known for _, known in measured], factor(name)
        words = "; ".join(f"{s.label} {shown_mean(name, v)}" for s, v in zip(styles, found, strict=True))
        form = ".1f" if name in SHARES else ".4g"
        between = f"{named(name)} {'with' if name == 'agreement' else 'from'} the teacher"
        svg = plots.dots(styles, [[by * x for x in v] for v in found], between + (" (%)" if by > 1 else ""), form=form)
        alt = f"{capitalized(between)} on the test set: {words}."
        pictures.append(Picture(f"{key}{name}", svg, alt))
    title = f"{capitalized(named(metric))}{' and ' + between if between else ''}, over seeds"
    return Section(f"{key}seeds", title, [Text(about), Grid(pictures, wide=True)])


def listed(styles: Sequence[plots.Style], group: Group) -> str:
    """Returns the metric of each row as text."""
    found = [[seed.quality[group.metric] for seed in row.seeds] for row in group.rows]
    return "; ".join(f"{s.label} {shown_mean(group.metric, v)}" for s, v in zip(styles, found, strict=True)) + "."


def per_class(group: Group, key: str) -> Section:
    classes = len(class_names(group))
    means = []
    for row in group.rows:
        hits = [class_accuracy(s.test.logits, s.test_targets, classes) for s in row.seeds]
        means.append((100 * torch.stack(hits).mean(0)).tolist())
    about = f"In per cent of the test {group.things} of that class, the mean over seeds."
    return of_each(group, key, means, "accuracy", about, drawn=False)


def of_each(
    group: Group,
    key: str,
    means: Sequence[Sequence[float]],
    measure: str,
    about: str,
    noun: str = "class",
    drawn: bool = True,
) -> Section:
    """Returns the section of a measure of each class or label, in a table and as bars.

    `means`: of each row of the group the measure in per cent, averaged over seeds; NaN where there is none, which is left empty
    and never the worst.
    """
    styles, each = looks(group), class_names(group)
    rows = []
    for style, values in zip(styles, means, strict=True):
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        worst = each[min(known, key=values.__getitem__)] if known else ""
        rows.append([style.name, worst, *("" if math.isnan(v) else f"{v:.1f}" for v in values)])
    head = ["model", f"worst {noun}", *each]
    blocks: list[Block] = [Table(f"{key}each-{noun}", head, rows), Fold(MEASURED, [about])]
    if drawn and len(each) <= DRAWN:
        svg = plots.levels(styles, means, each, f"{measure} (%)", (0, 100))
        alt = f"{capitalized(measure)} of each of {quantity(len(each), noun)}; the numbers are in the table above."
        blocks.append(Picture(f"{key}bars-{noun}", svg, alt))
    return Section(f"{key}per-{noun}", f"{capitalized(measure)} of each {noun}", blocks)


def class_names(group: Group) -> Sequence[str]:
    """Returns the names of all outputs; indices where the data has no names."""
    count = group.rows[0].seeds[0].test.main.shape[1]
    return group.classes if group.classes else [str(i) for i in range(count)]


def class_accuracy(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Returns the accuracy of each class, (classes,); NaN for a class without samples."""
    right = logits.argmax(1) == targets
    return torch.bincount(targets[right], minlength=classes).double() / torch.bincount(targets, minlength=classes)


def calibration(group: Group, key: str) -> Section:
    head = ["model", "temperature", "ECE as trained", "ECE scaled", "NLL as trained", "NLL scaled"]
    rows, pictures = [], []
    for style, row in zip(looks(group), group.rows, strict=True):
        before, after = [s.quality for s in row.seeds], [s.calibrated for s in row.seeds]
        rows.append(
            [
                *(style.name, spread([s.temperature for s in row.seeds])),
                *(spread([q[k] for q in qs], 3) for k in ("ece", "nll") for qs in (before, after)),
            ]
        )
        targets = torch.cat([s.test_targets for s in row.seeds])
        bins = [
            metrics.reliability(
                torch.cat([s.test.logits / (s.temperature if scaled else 1) for s in row.seeds]), targets
            )
            for scaled in (False, True)
        ]
        alt = f"Reliability of {row.label}: ECE {rows[-1][2]} as trained, {rows[-1][3]} after temperature scaling."
        pictures.append(
            Picture(f"{key}reliability-{style.number}", plots.reliability(bins[0], bins[1], style.name), alt)
        )
    about = (
        f"ECE: expected calibration error over {metrics.ECE_BINS} bins. The temperature is the one that makes the "
        "negative log-likelihood least on the validation set (Guo et al. 2017), and what is shown is its effect on the "
        f"test set. A temperature above 1: the model was too sure. Diagrams hold the test {group.things} of all seeds."
    )
    return Section(
        f"{key}calibration", "Calibration", [Table(f"{key}ece", head, rows), Fold(MEASURED, [about]), Grid(pictures)]
    )


def failures(group: Group, key: str) -> Section:
    """Returns the section of images that the teacher classifies correctly and the first seed's student does not."""
    assert group.inputs is not None
    inputs, classes = group.inputs, class_names(group)
    blocks: list[Block] = [
        Text(
            "Test images that the teacher puts into the right class and the student, of the first seed, does not: those of "
            "which the student is surest."
        )
    ]
    for style, row in zip(looks(group), group.rows, strict=True):
        if not (pairs := with_teachers(row, group)):
            continue
        seed, teacher = pairs[0]
        lost, won = failed(seed.test.logits, teacher.test.logits, seed.test_targets)
        thumbs = [
            Thumb(
                f"{key}failure-{style.number}-{i}",
                png(inputs[i]),
                f"is {classes[int(seed.test_targets[i])]}, taken for {classes[int(seed.test.logits[i].argmax())]}",
            )
            for i in lost[:FAILURES]
        ]
        title = f"{style.name}: {len(lost)} that only the teacher has right, {len(won)} that only the student has"
        blocks.append(Thumbs(title, thumbs) if thumbs else Text(title))
    return Section(f"{key}failures", "Where the student fails and the teacher does not", blocks)


def failed(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[list[int], list[int]]:
    """Returns the samples that only the teacher has right, by the student's confidence, and those only the student has."""
    own, other = student.argmax(1) == targets, teacher.argmax(1) == targets
    confidence = student.double().softmax(1).amax(1)
    lost = torch.nonzero(~own & other)[:, 0]
    order = confidence[lost].argsort(descending=True, stable=True)
    return lost[order].tolist(), torch.nonzero(own & ~other)[:, 0].tolist()


def png(image: Tensor) -> bytes:
    """Returns a (C, H, W) uint8 image as the bytes of a PNG file."""
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
