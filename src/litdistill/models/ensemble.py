"""Several networks as one teacher, each with its own preprocessing, classes and weight.

    teacher = Ensemble([first, second], weights=[2, 1])
    teacher = Ensemble([low, high], columns=[[0, 1, 2, -1, -1], [-1, -1, -1, 0, 1]])     each knows some of five classes

A single network whose classes are others than the data's is an ensemble of one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.features.outputs import run_network
from litdistill.models.preprocess import preprocessing
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256

UNKNOWN = -1  # the column of a class that a network does not know
MAPS = 5  # axes of the logits of each member, where these are maps


class Ensemble(nn.Module):
    """Returns one prediction of several networks: logits (N, classes), and where a member does not know all classes, `members`.
    Maps of logits (N, classes, H, W) are averaged at each place, resized to the largest of the members' (bilinear).

    With weights w that sum to 1 and the members' logits z, over the members that know class c:

    - average="logits": the mean Σ w·z / Σ w, which is the geometric mean of their distributions (Hinton, Vinyals & Dean 2015,
      arXiv 1503.02531, section 3, allow either mean). Where a member does not know all classes, the logits of each are first
      normalized to the logarithms of its probabilities among the classes that it knows.
    - average="probabilities": the logarithm of Σ w·p / Σ w.

    A class that no member knows has the logit −∞. `members` is (N, members, classes): log(w·p), the logarithm of the joint
    probability of a member drawn by its weight and of its class; −∞ for a class that it does not know. What a member says is
    only which of *its* classes an input is most likely of, and methods compare no more than that
    (`litdistill.losses.members_kl`).

    Args:
        members: each is called with the inputs, and preprocesses them itself. A tap of member i is named `i.layer3`.
        weights: one for each, above 0, of any sum; None: equal.
        average: "logits" or "probabilities".
        columns: for each member, the column of its outputs for each class in order, `UNKNOWN` where it has none; None for a
            member, or for all: its outputs are the classes.
        kind: how logits are read, as of `litdistill.tasks.base.Task.kind`: "categorical", "bernoulli" (labels are known or not
            one by one) or "real".
        names: of the members, for messages.

    Raises `UserError` for weights that are not positive and one each, and for members that do not fit together.
    """

    place: Tensor
    share: Tensor
    log_weights: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        average: str = "logits",
        columns: Sequence[Sequence[int] | None] | None = None,
        kind: str = "categorical",
        names: Sequence[str] | None = None,
    ):
        super().__init__()
        if not members or len({id(member) for member in members}) < len(members):
            raise UserError("An ensemble has one network or more, each of them once; weights make one count more.")
        self.weights = normalized(weights, len(members))
        self.average, self.kind = average, kind
        self.names = list(names) if names is not None else [str(i) for i in range(len(members))]
        if average not in ("logits", "probabilities") or (average == "probabilities" and kind == "real"):
            raise UserError(
                f"average={average}: choose logits or probabilities, of which values of a regression have none."
            )
        known = _known(columns, len(members))
        for i, member in enumerate(members):
            self.add_module(str(i), member)
        self._some = known is not None and not bool(known.all())
        self.partial = self._some and kind == "categorical"  # whether `members` are among the outputs
        if self._some and (kind == "real" or (not self.partial and not bool(known.any(0).all()))):  # type: ignore[union-attr]
            raise UserError(
                "A teacher of a regression gives all values of the data, and each label of several is known by one teacher at "
                "least: add such a teacher, or choose data with the values and labels that these give."
            )
        mapped = columns is not None and any(c is not None for c in columns)
        width = 0 if known is None else known.shape[1]
        full = list(range(width))
        place = [list(full if c is None else c) for c in columns or ()] if mapped else []
        shares = torch.tensor(self.weights, dtype=torch.float64)[:, None] * (1.0 if known is None else known)
        shares = shares / shares.sum(0).clamp(min=1e-300)
        self.mapped = mapped
        # Not persistent: they follow from the arguments, and a state dict holds the members alone.
        self.register_buffer("place", torch.tensor(place, dtype=torch.long), persistent=False)
        self.register_buffer("share", shares.float(), persistent=False)
        self.register_buffer("log_weights", torch.tensor(self.weights).log(), persistent=False)

    def parts(self) -> dict[str, nn.Module]:
        """Returns the members by the name that a tap begins with."""
        return {str(i): self.get_submodule(str(i)) for i in range(len(self.weights))}

    @property
    def name(self) -> str:
        """Returns the names of the members, each once, with how many have it: "2 conv4-8 + mlp-32"."""
        return " + ".join(f"{n} {name}" if n > 1 else name for name, n in Counter(self.names).items())

    @property
    def known(self) -> Tensor:
        """Returns which classes each member knows, booleans (members, classes), or (members, 1) where all know all."""
        return self.share > 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        heads = self.heads(self.each(*inputs, **named))
        return heads if self.partial else heads["logits"]

    def heads(self, each: Tensor) -> dict[str, Tensor]:
        """Returns the heads for the logits of each member, as `each` gives them."""
        heads = {"logits": self.mean_of(each)}
        if self.partial:
            heads["members"] = each.log_softmax(-1) + self.log_weights.to(each.device)[:, None]
        return heads

    def each(self, *inputs: Any, **named: Any) -> Tensor:
        """Returns the logits of each member for each class, (N, members, classes), or of maps (N, H, W, members, classes); −∞
        for a class that it does not know."""
        return self.arranged(
            by_place([run_network(member, named or inputs).logits for member in self.parts().values()])
        )

    def mean_of(self, each: Tensor) -> Tensor:
        """Returns the mean of what `each` gives, (N, classes), or a map (N, classes, H, W)."""
        mean = self.combined(each)
        if each.ndim != MAPS:
            return mean
        if self.partial:
            raise UserError(
                "A teacher of masks that knows some of the classes only says nothing of the pixels of the others: use one that "
                "knows all of them, or data of the classes that it knows."
            )
        return mean.movedim(-1, 1)

    def arranged(self, found: list[Tensor]) -> Tensor:
        """Returns the outputs (N, …) of each member, as they are, as `each` does."""
        if not self.mapped:
            if any(x.shape[-1] != found[0].shape[-1] for x in found):
                shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip(self.names, found, strict=True))
                raise UserError(
                    f"The members of an ensemble give outputs of other shapes ({shapes}): give their columns."
                )
            return torch.stack(found, -2)
        # The column before the first is that of the classes that a member does not know.
        places = (self.place + 1).to(found[0].device)
        padded = [F.pad(x, (1, 0), value=-math.inf) for x in found]
        return torch.stack([x.index_select(-1, place) for x, place in zip(padded, places, strict=True)], -2)

    def combined(self, each: Tensor) -> Tensor:
        """Returns the mean of the members' logits (N, members, classes) as (N, classes)."""
        share = self.share.to(each)
        if self.kind == "categorical" and (self.partial or self.average == "probabilities"):
            each = each.log_softmax(-1)
        if self.average == "logits":
            mean = (share * (each.masked_fill(share == 0, 0.0) if self._some else each)).sum(-2)
            return mean.masked_fill((share == 0).all(0), -math.inf) if self.partial else mean
        if self.kind == "categorical":
            return (each + share.log()).logsumexp(-2)
        return torch.logit((share * each.sigmoid().masked_fill(share == 0, 0.0)).sum(-2), eps=1e-7)


class Members(nn.Module):
    """An ensemble whose outputs include those of each member: heads `logits` (N, classes) and `members`, (N, members, classes),
    the logits of each, as `Ensemble.each` gives them."""

    def __init__(self, ensemble: Ensemble):
        super().__init__()
        self.ensemble, self.training = ensemble, ensemble.training

    def forward(self, *inputs: Any, **named: Any) -> Outputs:
        each = self.ensemble.each(*inputs, **named)
        return Outputs({"logits": self.ensemble.mean_of(each), "members": each})


def with_members(net: nn.Module) -> nn.Module:
    """Returns an ensemble as `Members`, and any other network as it is."""
    return Members(net) if isinstance(net, Ensemble) else net


def by_place(found: list[Tensor]) -> list[Tensor]:
    """Returns maps of logits (N, classes, h, w) as (N, H, W, classes), resized to the largest of them; others as they are."""
    if any(x.ndim != 4 for x in found):
        return found
    size = max((tuple(x.shape[2:]) for x in found), key=math.prod)
    resize = lambda x: F.interpolate(x, size, mode="bilinear", align_corners=False)  # noqa: E731
    return [(x if tuple(x.shape[2:]) == size else resize(x)).movedim(1, -1) for x in found]


def check_apart(members: Sequence[nn.Module]) -> None:
    """Raises `UserError` where two members are the same network: the same weights, on the same inputs."""
    facts = [(weights_sha256(member.state_dict()), preprocessing(member)) for member in members]
    for i, own in enumerate(facts):
        if own in facts[:i]:
            raise UserError(
                f"Members {facts.index(own)} and {i} of teacher.ensemble are the same network with the same weights: leave "
                "one out, and give the other more of teacher.ensemble_weights if it should count more."
            )


def normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    """Returns the weights of an ensemble's members divided by their sum; None: equal ones.

    Raises `UserError` for a weight that is not above 0, or another number of them.
    """
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count:
        raise UserError(
            f"weights={list(weights or ())} are {len(given)}, and the ensemble has {count}: give one for each."
        )
    if not all(0 < w < math.inf for w in given):
        raise UserError(
            f"weights={list(weights or ())} must be above 0 each: leave a network out that is not to count."
        )
    return [w / sum(given) for w in given]


def _known(columns: Sequence[Sequence[int] | None] | None, count: int) -> Tensor | None:
    """Returns which classes each member knows, booleans (members, classes); None where no columns are given."""
    given = [c for c in columns or () if c is not None]
    if columns is None or not given:
        return None
    width = len(given[0])
    if len(columns) != count or any(len(c) != width for c in given):
        raise UserError("An ensemble's columns are one list for each member, with a column for each class.")
    known = torch.tensor([[i >= 0 for i in (range(width) if c is None else c)] for c in columns])
    if int(known.sum(1).min()) < 1:
        raise UserError(f"Member {int(known.sum(1).argmin())} of the ensemble knows none of the classes: leave it out.")
    return known
