"""The section on robustness: accuracy under common corruptions and under attacks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from litdistill.evaluation import robustness
from litdistill.report import plots
from litdistill.report.blocks import Block, Fold, Grid, Picture, Section, Table, Text
from litdistill.report.collect import Group, Settings
from litdistill.report.sections import MEASURED, looks


def robust(group: Group, key: str, settings: Settings) -> Section:
    measured = [(s, r) for s, r in zip(looks(group), group.rows, strict=True) if all(x.robustness for x in r.seeds)]
    title, id = "Robustness to corruptions and to attacks", f"{key}robustness"
    if not measured:
        return Section(id, title, [Text("Not measured: robustness=0.")])
    styles, rows = [s for s, _ in measured], [r for _, r in measured]
    mean = lambda row, kind, name, i: statistics.mean(  # noqa: E731
        100 * (x[i] if i is not None else statistics.mean(x)) for s in row.seeds for x in [s.robustness[kind][name]]
    )
    kinds = list(robustness.CORRUPTIONS)
    table = []
    for style, row in measured:
        by_kind = [mean(row, "corruptions", k, None) for k in kinds]
        clean, corrupted = mean(row, "attacks", robustness.ALL, 0), statistics.mean(by_kind)
        table.append([style.name, *(f"{v:.1f}" for v in (clean, corrupted, clean - corrupted, *by_kind))])
    severity = [[statistics.mean(mean(r, "corruptions", k, i) for k in kinds) for i in range(5)] for r in rows]
    steps = range(len(settings.epsilons) + 1)
    names = [*robustness.STRENGTHS[settings.attacks], robustness.ALL]
    by_epsilon = {a: [[mean(r, "attacks", a, i) for i in steps] for r in rows] for a in names}
    count = min(settings.robustness, len(rows[0].seeds[0].test_targets))
    about = (
        f"Accuracy in per cent on {count:,} test images, evenly spaced among all, the mean over seeds and over five "
        "severities of each corruption. "
        "Corruptions after Hendrycks & Dietterich 2019 with the constants of CIFAR-10-C, the noise with ImageNet-C's; "
        "brightness is added to the gray level where images are gray, pixelation keeps two pixels a side at least, and the "
        "shift, by 5 to 25 % of the side, is after MNIST-C. Weather, camera and glass blurs are left out."
    )
    quantized = [s.label for s, r in measured if r.precision == "int8"]
    head = ["model", "clean", "all corruptions", "lost", *kinds]
    attack_head = ["model", *(f"{a}, ε {e}" for a in by_epsilon for e in settings.epsilons)]
    attack_rows = [
        [s.name, *(f"{v:.1f}" for a in by_epsilon for v in by_epsilon[a][i][1:])] for i, s in enumerate(styles)
    ]
    pictures = [
        Picture(
            f"{key}severity",
            plots.lines(styles, robustness.SEVERITIES, severity, "severity", "accuracy, mean of all corruptions (%)"),
            "Accuracy over the severity of corruptions, of which the table above has the mean.",
        ),
        Picture(
            f"{key}worst",
            plots.lines(
                styles,
                [0, *settings.epsilons],
                by_epsilon[robustness.ALL],
                "ε (levels of 255)",
                "accuracy, all attacks (%)",
            ),
            "Accuracy under all attacks at once over ε, whose numbers are in the table above.",
        ),
    ]
    tables = [Table(f"{key}corruptions", head, table), Table(f"{key}attacks", attack_head, attack_rows)]
    blocks: list[Block] = [*tables, Fold(MEASURED, [about, _attacks(settings, quantized)]), Grid(pictures, wide=True)]
    return Section(id, title, blocks)


PAPERS = {
    "quick": "FGSM (Goodfellow et al. 2015) and PGD (Madry et al. 2018: 10 steps, a random start)",
    "strong": "FGSM (Goodfellow et al. 2015), PGD (Madry et al. 2018: 20 steps, the worst of five random starts), APGD-CE "
    "(Croce & Hein 2020: 100 steps) and the black-box Square (Andriushchenko et al. 2020: 1,000 queries)",
}


def _attacks(settings: Settings, quantized: Sequence[str]) -> str:
    """Returns how the attacks of the table were made. `quantized`: the labels of int8 models."""
    text = (
        f"{PAPERS[settings.attacks]} change each pixel by ε at most, here {', '.join(map(str, settings.epsilons))} of 255 "
        f"levels, and leave whole levels. {robustness.ALL.capitalize()}: the share that is right as it is and under each of "
        "them. What follows a gradient follows that of the very model it attacks"
    )
    if quantized:
        text += (
            f". A rounded model has none: for {', '.join(quantized)} all are made on the network in torch that it was "
            "converted from, with the gradient passed straight through each rounding, and transferred to the int8 file, "
            "which may flatter it"
        )
    more = (
        " A stronger attack may leave less: attacks=strong adds restarts, APGD-CE and Square, which takes far longer."
    )
    return text + "." + (more if settings.attacks == "quick" else "")
