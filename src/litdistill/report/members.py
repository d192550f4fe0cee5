"""The section of teachers that are several networks: what each knows, how good it is there, and how much they disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litdistill.report.blocks import Block, Fold, Section, Table, Text
from litdistill.report.collect import Group
from litdistill.report.sections import MEASURED
from litdistill.utils.units import heading, quantity, shown, shown_mean

KNOWN = 10  # names of classes that are written out

ABOUT = (
    "Each network is measured on the samples of the classes that it knows, among these classes alone; guessing is what a "
    "network reaches there that ignores its inputs. The weight is its share in the mean. Disagreement is the share of samples "
    "for which two of them predict another class, and the Jensen-Shannon divergence is that of their distributions, from 0 to "
    "0.69 nats, both among the classes that the two know, on samples of these, and averaged over pairs."
)


def of_members(group: Group, key: str) -> list[Section]:
    """Returns the section of each run's teacher that is several networks; none where there is none."""
    teachers: dict[str, Mapping[str, Any]] = {}
    for row in group.rows:
        for seed in row.seeds:
            teacher = seed.summary.get("teacher") or {}
            if teacher.get("members"):
                teachers.setdefault(teacher["sha256"], teacher)
    if not teachers:
        return []
    metric = group.metric
    head = ["network", "weight", "knows", *(f"{word} {heading(metric)}" for word in ("validation", "test", "guessing"))]
    rows, said = [], []
    for number, teacher in enumerate(teachers.values(), 1):
        of = f"teacher {number}: " if len(teachers) > 1 else ""
        for i, member in enumerate(teacher["members"]):
            found = [(member.get(split) or {}).get("metrics") for split in ("val", "test")]
            chance = (member.get("test") or {}).get("chance")
            rows.append(
                [
                    f"{of}{i} {member['name']}",
                    f"{member['weight']:.3g}",
                    _known(member["classes"]),
                    *("" if metrics is None else shown_mean(metric, [metrics[metric]]) for metrics in found),
                    "" if chance is None else shown_mean(metric, [chance]),
                ]
            )
        said.append(f"{of}{disagreement_in_words(teacher['disagreement'].get('test') or {})}".capitalize())
    blocks: list[Block] = [Table(f"{key}members", head, rows, (0, 2)), *map(Text, said), Fold(MEASURED, [ABOUT])]
    return [Section(f"{key}members-of-teachers", "The networks of the teacher", blocks)]


def disagreement_in_words(found: Mapping[str, Any]) -> str:
    """Returns a sentence of how much the networks of a teacher disagree on a split."""
    if not found.get("pairs"):
        return "no two of its networks know two of the same classes, so that none can disagree."
    pairs = quantity(found["pairs"], "pair")
    if "decisions" not in found:
        measures = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if k not in ("pairs", "by_pair"))
        return f"its networks differ on the test set by {measures}, in the mean over {pairs}."
    return (
        f"its networks disagree on {shown('accuracy', found['decisions'])} of the test set, by {found['js']:.3g} nats "
        f"(Jensen-Shannon), in the mean over {pairs}."
    )


def _known(classes: list[str] | None) -> str:
    if classes is None:
        return "all classes"
    return ", ".join(classes[:KNOWN]) + (f" and {len(classes) - KNOWN} more" if len(classes) > KNOWN else "")
