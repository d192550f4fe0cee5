"""The sections of the page, each a pure function of what was collected."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from litdistill.evaluation.latency import NOT_REPORTED
from litdistill.report import plots
from litdistill.report.blocks import Block, Grid, Picture, Section, Table, Text, Thumb, Thumbs
from litdistill.report.collect import Group, Row, Seed, Settings
from litdistill.report.tables import spread
from litdistill.tasks import metrics

FAILURES = 8  # images a row


def each(row: Row, value: Callable[[Seed], float], factor: float = 100) -> list[float]:
    return [factor * value(seed) for seed in row.seeds]


def accuracy(seed: Seed) -> float:
    return seed.quality["accuracy"]


def names(group: Group) -> list[str]:
    return [style.name for style in looks(group)]


def looks(group: Group) -> list[plots.Style]:
    return plots.styles([r.label for r in group.rows], [r.teacher for r in group.rows])


def taught(row: Row, group: Group) -> list[tuple[Seed, Seed]]:
    """A row's runs, each with the teacher that it is compared with: its own, else the group's first.

    None for a teacher, nor where there is no teacher.
    """
    if row.teacher or group.teacher is None:
        return []
    teachers = {r.seeds[0].sha256: r.seeds[0] for r in group.rows if r.teacher}
    own = [str((seed.summary.get("teacher") or {}).get("sha256")) for seed in row.seeds]
    return [(seed, teachers.get(sha, group.teacher.seeds[0])) for seed, sha in zip(row.seeds, own, strict=True)]


def share(values: Sequence[float], of: float) -> str:
    """Quartiles as `0.31 (0.30–0.33)`."""
    low, middle, high = (v / of for v in values)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


# -- what they are worth -----------------------------------------------------------------------------------------------


def quality(group: Group, key: str) -> Section:
    head = ["model", "network", "starts from", "trained on", "seeds", "accuracy %", "last epoch %", "NLL", "ECE"]
    head += ["agreement %", "KL"]
    rows = []
    for name, row in zip(names(group), group.rows, strict=True):
        first = row.seeds[0].summary
        like = [metrics.agreement(seed.test, teacher.test) for seed, teacher in taught(row, group)]
        trained = [s.summary for s in row.seeds if s.summary.get("epochs")]  # else the last epoch is that of its start
        last = [100 * summary["student"]["test"]["accuracy"]["last"] for summary in trained]
        begun = (starts_from(first), f"{first['data']['train']:,}") if first else ("", "")
        rows.append(
            [
                *(name, row.about["name"], *begun, str(len({s.summary.get("seed") for s in row.seeds}))),
                *(spread(each(row, accuracy)), spread(last) if last else ""),
                *(spread([s.quality[k] for s in row.seeds], 3) for k in ("nll", "ece")),
                spread([100 * x["agreement"] for x in like]) if like else "",
                spread([x["kl"] for x in like], 3) if like else "",
            ]
        )
    chosen_on = min(len(s.val_targets) for r in group.rows for s in r.seeds)
    about = (
        f"On {group.facts['test']:,} test images that nothing was trained or chosen on. Accuracy is that of the weights "
        "that were best on the validation set, as they ship: rows that are int8 are measured as their int8 file. The "
        f"validation set has {chosen_on:,} images, of which one is {100 / chosen_on:.2g} points: the epoch that is best on "
        "so few is partly drawn by lot, and what it has before others there may be noise. So the last epoch, which nothing "
        "chose, stands beside it; a row that was only converted has none. Images are those of the row's own training: what "
        "it starts from may have seen more. "
        "Mean ± standard deviation over seeds. Agreement: the share of images that the teacher puts into the same class; "
        "KL: from the teacher, in nats."
    )
    blocks: list[Block] = [Text(about), Table(f"{key}quality", head, rows, 3)]
    return Section(f"{key}worth", "What each is worth", blocks)


def starts_from(summary: Mapping[str, Any]) -> str:
    """Whose weights a run began with, and how many images they had seen."""
    start = summary.get("start")
    if start is None:
        return "nothing"
    images = f"{start['images']:,} images" if start.get("images") else "unknown images"
    return {
        "teacher": f"the teacher ({images})",
        "published": "published weights",
    }.get(start.get("from"), f"a network of {images}" + (f" ({start['method']})" if "method" in start else ""))


def cost(group: Group, key: str, settings: Settings) -> Section:
    head = ["model", "precision", "parameters", "MACs", "file, kB", "of teacher's"]
    for batch in (1, 64):
        head += [f"batch {batch}: p50, ms", "p95, ms", "of teacher's (quartiles)"]
    head += ["images/s at 64", "peak memory, MB", "J per 1,000 images"]
    timed = [(n, r) for n, r in zip(names(group), group.rows, strict=True) if "cpu" in r.timing]
    reference = next((r for _, r in timed if r.teacher), None)
    rows = []
    for name, row in timed:
        t = row.timing
        cells = [name, row.precision, f"{row.about['params']:,}", f"{row.about['macs']:,}", f"{t['bytes'] / 1e3:,.1f}"]
        cells.append(f"{t['bytes'] / reference.timing['bytes']:.3f}" if reference else "")
        cells += times(t["cpu"], reference is not None)
        cells += [NOT_REPORTED if t["memory"] is None else f"{t['memory'] / 1e6:.1f}", joules(t["cpu"]["energy"])]
        rows.append(cells)
    about = (
        "All models, the teacher too, are ONNX files that take uint8 images, each that of its row's first seed, run by "
        f"onnxruntime on {settings.threads} CPU thread(s). They are warmed up and timed in turn: {settings.rounds} rounds "
        "through all of them, every other one backwards, and a ratio is that of a round's medians"
        f"{', of the time that the thread had the CPU' if settings.threads == 1 else ''} (median and quartiles over "
        "rounds; below 1 is faster than the teacher). Peak memory: by how much a fresh process grows that has "
        "onnxruntime loaded, loads the file and runs it on 64 images. Energy: of the whole CPU package, whatever else it "
        "does. Multiply-accumulates are those of one image. Parameters are those of the network that was trained: in int8 its "
        "batch normalisation is folded into the convolutions, which leaves fewer. Of networks as small as some here most of "
        "the latency is what a call of the runtime costs, whatever it computes, and int8 need not be faster there."
    )
    if timed:
        about += f" While it timed, this process had {timed[0][1].timing['cpu_share']:.2f} CPUs."
    blocks: list[Block] = [Text(about), Table(f"{key}cost", head, rows, 2)]
    blocks += _on_gpu(timed, reference, key)
    return Section(f"{key}costs", "What each costs", blocks)


def _on_gpu(timed: Sequence[tuple[str, Row]], reference: Row | None, key: str) -> list[Block]:
    on_gpu = [(n, r) for n, r in timed if "cuda" in r.timing]
    if not on_gpu:
        return [Text("GPU: none here.")]
    head = ["model"]
    for batch in (1, 64):
        head += [f"batch {batch}: p50, ms", "p95, ms", "of teacher's (quartiles)"]
    head += ["images/s at 64", "J per 1,000 images"]
    rows = [[n, *times(r.timing["cuda"], reference is not None), joules(r.timing["cuda"]["energy"])] for n, r in on_gpu]
    return [
        Text("On the GPU, by torch in float32, the way of the images there and of the logits back included."),
        Table(f"{key}gpu", head, rows),
    ]


def times(timing: Mapping[Any, Any], ratios: bool) -> list[str]:
    cells = []
    for batch in (1, 64):
        t = timing[batch]
        cells += [f"{t['p50_ms']:.3f}", f"{t['p95_ms']:.3f}", share(t["ratio"], 1) if ratios else ""]
    return [*cells, f"{timing[64]['images_per_s']:,.0f}"]


def joules(value: float | None) -> str:
    return NOT_REPORTED if value is None else f"{value:.3g}"


def tradeoffs(group: Group, key: str) -> Section:
    """The main picture: what accuracy costs."""
    timed = [(s, r) for s, r in zip(looks(group), group.rows, strict=True) if "cpu" in r.timing]
    blocks: list[Block] = []
    if timed:
        styles, rows, pictures = [s for s, _ in timed], [r for _, r in timed], []
        values = [each(r, accuracy) for r in rows]
        for name, xlabel, costs in (
            ("bytes", "file (kB)", [r.timing["bytes"] / 1e3 for r in rows]),
            ("latency", "latency, p50 of one image (ms)", [r.timing["cpu"][1]["p50_ms"] for r in rows]),
        ):
            front = plots.pareto(costs, [statistics.mean(v) for v in values])
            svg = plots.over_cost(styles, costs, values, xlabel, "test accuracy (%)")
            alt = f"Test accuracy over {xlabel}. On the Pareto front: {'; '.join(styles[i].name for i in front)}."
            pictures.append(Picture(f"{key}accuracy-over-{name}", svg, alt))
        blocks += [Grid(pictures, wide=True), *(Text(p.alt) for p in pictures)]
    return Section(f"{key}tradeoffs", "Accuracy over bytes and over latency", blocks)


def over_seeds(group: Group, key: str) -> Section:
    styles = looks(group)
    teacher = statistics.mean(each(group.teacher, accuracy)) if group.teacher else None
    values = [each(r, accuracy) for r in group.rows]
    about = "A mark a seed, a bar and a number their mean; dashed, the teacher's accuracy."
    svg = plots.dots(styles, values, "test accuracy (%)", teacher)
    pictures = [Picture(f"{key}accuracy", svg, "Test accuracy of each seed: " + listed(styles, values))]
    pairs = [(s, t) for s, r in zip(styles, group.rows, strict=True) if (t := taught(r, group))]
    if pairs:
        follow = [[100 * metrics.agreement(seed.test, t.test)["agreement"] for seed, t in each] for _, each in pairs]
        styles = [s for s, _ in pairs]
        alt = "Agreement with the teacher on the test set: " + listed(styles, follow)
        pictures.append(Picture(f"{key}agreement", plots.dots(styles, follow, "agreement with the teacher (%)"), alt))
    return Section(
        f"{key}seeds", "Accuracy and agreement with the teacher, over seeds", [Text(about), Grid(pictures, wide=True)]
    )


def listed(styles: Sequence[plots.Style], values: Sequence[Sequence[float]]) -> str:
    return "; ".join(f"{s.label} {spread(v)}" for s, v in zip(styles, values, strict=True)) + "."


def per_class(group: Group, key: str) -> Section:
    rows = []
    for name, row in zip(names(group), group.rows, strict=True):
        hits = torch.stack([class_accuracy(s.test, s.test_targets, len(group.classes)) for s in row.seeds]).mean(0)
        worst = int(hits.nan_to_num(2.0).argmin())  # a class without test images is none
        rows.append([name, group.classes[worst], *("" if h != h else f"{100 * h:.1f}" for h in hits.tolist())])
    about = "In per cent of the test images of that class, the mean over seeds."
    table = Table(f"{key}classes", ["model", "worst class", *group.classes], rows, 1)
    return Section(f"{key}per-class", "Accuracy of each class", [Text(about), table])


def class_accuracy(logits: Tensor, targets: Tensor, classes: int) -> Tensor:
    """(classes,): the share of each class's samples that are right, NaN for a class that has none."""
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
            metrics.reliability(torch.cat([s.test / (s.temperature if scaled else 1) for s in row.seeds]), targets)
            for scaled in (False, True)
        ]
        alt = f"Reliability of {row.label}: ECE {rows[-1][2]} as trained, {rows[-1][3]} after temperature scaling."
        pictures.append(
            Picture(f"{key}reliability-{style.number}", plots.reliability(bins[0], bins[1], style.name), alt)
        )
    about = (
        f"ECE: expected calibration error over {metrics.ECE_BINS} bins. The temperature is the one that makes the "
        "negative log-likelihood least on the validation set (Guo et al. 2017), and what is shown is its effect on the "
        "test set. A temperature above 1: the model was too sure. Diagrams hold the test images of all seeds."
    )
    return Section(f"{key}calibration", "Calibration", [Text(about), Table(f"{key}ece", head, rows), Grid(pictures)])


def failures(group: Group, key: str) -> Section:
    """Images that the teacher gets right and the student of the first seed does not."""
    blocks: list[Block] = [
        Text(
            "Test images that the teacher puts into the right class and the student, of the first seed, does not: those of "
            "which the student is surest."
        )
    ]
    for style, row in zip(looks(group), group.rows, strict=True):
        if not (pairs := taught(row, group)):
            continue
        seed, teacher = pairs[0]
        lost, won = failed(seed.test, teacher.test, seed.test_targets)
        thumbs = [
            Thumb(
                f"{key}failure-{style.number}-{i}",
                png(group.images[i]),
                f"is {group.classes[int(seed.test_targets[i])]}, taken for {group.classes[int(seed.test[i].argmax())]}",
            )
            for i in lost[:FAILURES]
        ]
        title = f"{style.name}: {len(lost)} that only the teacher has right, {len(won)} that only the student has"
        blocks.append(Thumbs(title, thumbs) if thumbs else Text(title))
    return Section(f"{key}failures", "Where the student fails and the teacher does not", blocks)


def failed(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[list[int], list[int]]:
    """Rows that only the teacher has right, those first of which the student is surest, and rows that only the student has."""
    own, other = student.argmax(1) == targets, teacher.argmax(1) == targets
    confidence = student.double().softmax(1).amax(1)
    lost = torch.nonzero(~own & other)[:, 0]
    order = confidence[lost].argsort(descending=True, stable=True)
    return lost[order].tolist(), torch.nonzero(own & ~other)[:, 0].tolist()


def png(image: Tensor) -> bytes:
    """(C, H, W) uint8 as a file."""
    file = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
