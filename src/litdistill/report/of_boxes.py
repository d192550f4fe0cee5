"""The sections of detectors: average precision of each class, and pictures of what only the teacher finds."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from litdistill.report.blocks import Block, Section, Text, Thumb, Thumbs
from litdistill.report.collect import Group, Row, Seed
from litdistill.report.sections import FAILURES, class_names, looks, of_each, with_teachers
from litdistill.tasks.detection.boxes import LABEL
from litdistill.tasks.detection.matching import SURE, matched, missed, names_of
from litdistill.tasks.detection.metrics import Split, curves
from litdistill.tasks.figures import STUDENT_COLOR
from litdistill.utils.units import quantity

SIDE = 256  # pixels of the longer side of a picture with boxes
MISSED_COLOR = "#D55E00"


def of_boxes(group: Group, key: str) -> list[Section]:
    """Returns the sections of a group of detectors."""
    found = [per_class(group, key)]
    return found + ([only_teacher(group, key)] if group.pictured and group.teacher is not None else [])


def split_of(seed: Seed) -> Split:
    """Returns the detections and the objects of the test set."""
    return Split.of(seed.test.heads["detections"], seed.test_targets)


def per_class(group: Group, key: str) -> Section:
    """Returns the section of the average precision of each class, in a table and as bars."""
    means = [_precisions(row, len(class_names(group))) for row in group.rows]
    about = (
        f"In per cent, the mean over seeds, on the test {group.things}: COCO's average precision of each class, over IoUs from "
        "0.5 to 0.95; their mean is mAP. A class without an object in the test set is left empty. Classes with few objects "
        "have low and high values by chance alone."
    )
    return of_each(group, key, means, "average precision", about)


def _precisions(row: Row, classes: int) -> list[float]:
    """Returns the average precision in per cent of each class, averaged over seeds; NaN for one without an object."""
    found = []
    for seed in row.seeds:
        curve = curves(split_of(seed))
        each = dict(zip(curve.classes, curve.average.tolist(), strict=True))
        found.append([100 * each.get(c, math.nan) for c in range(classes)])
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


def only_teacher(group: Group, key: str) -> Section:
    """Returns the section of the pictures with the most objects that the teacher finds and the first seed's student misses."""
    assert group.inputs is not None
    blocks: list[Block] = [
        Text(
            f"Test pictures with objects that the teacher finds and the student, of the first seed, does not: in orange, with "
            f"their class. In blue what the student finds there. Found: a box of the class with a score of at least {SURE:g} "
            "that overlaps the object by an IoU of at least 0.5."
        )
    ]
    for style, row in zip(looks(group), group.rows, strict=True):
        if row.converted or not (pairs := with_teachers(row, group)):
            continue
        student, teacher = (split_of(seed) for seed in pairs[0])
        lost, won, total = only_one(student, teacher), only_one(teacher, student), sum(len(t) for t in student.truth)
        worst = [i for i, _, only in missed(student, teacher) if only][:FAILURES]
        thumbs = [_thumb(f"{key}miss-{style.number}-{i}", group, student, teacher, i) for i in worst]
        title = (
            f"{style.name}: of {quantity(total, 'object')}, {lost} only the teacher finds and {won} only the student"
        )
        blocks.append(Thumbs(title, thumbs, large=True) if thumbs else Text(title))
    return Section(f"{key}misses", "What the teacher finds and the student misses", blocks)


def only_one(without: Split, finding: Split) -> int:
    """Returns how many objects the second network finds and the first one does not."""
    pairs = zip(without.found, finding.found, without.truth, strict=True)
    return sum(int((~matched(a, truth).hit & matched(b, truth).hit).sum()) for a, b, truth in pairs)


def _thumb(name: str, group: Group, student: Split, teacher: Split, i: int) -> Thumb:
    assert group.inputs is not None
    own, its = matched(student.found[i], student.truth[i]), matched(teacher.found[i], student.truth[i])
    lost = own.objects[~own.hit & its.hit]
    words = names_of(lost, LABEL, class_names(group))
    png = drawn(group.inputs[i], [(own.found[:, :4], STUDENT_COLOR, []), (lost[:, :4], MISSED_COLOR, words)])
    return Thumb(name, png, f"misses {', '.join(words)}")


def drawn(image: Tensor, boxes: Sequence[tuple[Tensor, str, Sequence[str]]]) -> bytes:
    """Returns a (C, H, W) uint8 picture with boxes (K, 4) in a color each, and words at them, as the bytes of a PNG file.

    Small pictures are enlarged by whole factors, large ones reduced, so that boxes and words are legible.
    """
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    longer = max(picture.size)
    scale = float(max(1, SIDE // longer)) if longer <= SIDE else SIDE / longer
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = picture.resize([round(scale * side) for side in picture.size], how)
    pen = ImageDraw.Draw(picture)
    for of, color, words in boxes:
        for k, box in enumerate(of.tolist()):
            x1, y1, x2, y2 = (scale * v for v in box)
            pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=2)
            if k < len(words):
                place = (x1 + 3, y1 + 2)
                pen.rectangle(pen.textbbox(place, words[k]), fill=color)
                pen.text(place, words[k], fill="white")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
