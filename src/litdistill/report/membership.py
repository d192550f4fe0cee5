"""The section on privacy: what a model betrays about which samples it was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from litdistill.evaluation.privacy import FALSE_POSITIVES, Membership
from litdistill.report.blocks import Fold, Section, Table, Text
from litdistill.report.collect import Group
from litdistill.report.sections import MEASURED, looks
from litdistill.utils.units import spread


def privacy(group: Group, key: str) -> Section:
    """Returns the section with the success of membership inference for each model."""
    rows = [(s.name, [x.membership for x in r.seeds]) for s, r in zip(looks(group), group.rows, strict=True)]
    measured = [(name, [m for m in found if m is not None]) for name, found in rows if None not in found]
    title, id = "Privacy: who was in the training set?", f"{key}privacy"
    if not measured:
        return Section(id, title, [Text("Not measured: these data do not show their training samples by id.")])
    share = f"{100 * FALSE_POSITIVES:.0f} %"
    table = [[name, spread([m.auc for m in found], 3), _found(found), *_counts(found)] for name, found in measured]
    about = (
        "The attack takes samples on which a model has a small loss for members of its training set (Yeom et al. 2018, arXiv "
        "1709.01604). The area under its curve is the probability that a member has a smaller loss than a test sample: 0.5 if "
        f"it learns nothing. Beside it stands the share of members that it finds while it takes {share} of the test samples "
        f"for members, too (Carlini et al. 2022, arXiv 2112.03570): {share} if it learns nothing. Members are the labelled "
        f"training {group.things} of a student's run, as they are, and for a teacher those of its first student. This is the "
        "weakest of attacks: one that trains models of its own finds more."
    )
    head = ["model", "area under the curve", f"members found at {share} false ones", "members", "others"]
    return Section(id, title, [Table(f"{key}membership", head, table), Fold(MEASURED, [about])])


def _found(found: Sequence[Membership]) -> str:
    shares = [100 * m.found for m in found if m.found is not None]
    return f"{spread(shares)} %" if len(shares) == len(found) else "too few samples"


def _counts(found: Sequence[Membership]) -> tuple[str, str]:
    return f"{found[0].members:,}", f"{found[0].others:,}"
