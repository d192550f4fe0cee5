"""Any layers of two networks, each pair by any loss, in one list: what a user states instead of a method of a paper.

`Pairs([Pair("layer2", "layer3", "mse"), Pair("logits", "logits", "kl", 0.9, options={"temperature": 4.0})])`, or
`method=pairs 'method.pairs=[{student: layer2, teacher: layer3, loss: mse, weight: 1.0}]'`.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from litdistill.features.feature_extractor import resolve_taps
from litdistill.features.pyramid import PYRAMID
from litdistill.losses.layouts import align
from litdistill.losses.named import LOSSES, Loss
from litdistill.methods.base import ALL_KINDS, Method, paired_levels, say_unpaired, summed
from litdistill.methods.layers import BatchNorm, regressor
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError

HEADS = ("logits", "embedding")  # nodes that are outputs of the network and no modules of it
PROJECTORS = ("auto", "none", "linear", "norm", "regressor")


class Pair(NamedTuple):
    """One node of the student, one of the teacher, and the loss between them.

    student, teacher: the name of a module (its output), with `:in` or `:pool` behind it or an alias as in
        `litdistill.features.feature_extractor.resolve_taps`, or a head: `logits`, `embedding`. An alias of several features
        (`stages`) pairs them counted from the last, the levels of a pyramid (`pyramid`) by their stride; their losses are
        added.
    loss: a name of `litdistill.losses.named.LOSSES`, or a function (student, teacher) -> scalar, which gets both features
        in one shape.
    weight: of the loss.
    projector: of the student's feature to the teacher's channels. `auto`: linear (a 1x1 convolution) where they differ and
        the loss needs them equal; `none`; `linear`; `norm`: linear and BatchNorm; `regressor`: that of FitNets, a
        convolution that also changes the size, BatchNorm and ReLU.
    options: arguments of the loss by name, such as temperature.
    name: of the term in logs and schedules; by default the loss's and the student's node's.
    """

    student: str
    teacher: str
    loss: str | Callable[[Tensor, Tensor], Tensor] = "mse"
    weight: float = 1.0
    projector: str = "auto"
    options: Mapping[str, Any] = {}
    name: str | None = None


class Pairs(Method):
    """`hard` · labels' loss + Σ over `pairs` of weight · loss(projector(student's node), teacher's node).

    `pairs`: `Pair`s or mappings of their fields, where any further key is an option of the loss. How features of two shapes
    are compared is said in `litdistill.losses.layouts.align`. Projectors are trained beside the student and not deployed.
    Raises `UserError` for a node, loss, option or projector that does not exist, and for shapes that cannot be paired.
    """

    def __init__(self, pairs: Sequence[Any], hard: float = 1.0):
        super().__init__(hard)
        if not pairs or isinstance(pairs, (str, Mapping)):
            raise UserError("pairs is a list of pairs: [{student: layer2, teacher: layer3, loss: mse, weight: 1.0}].")
        given = {f"pairs[{i}]": _pair(pair, f"pairs[{i}]") for i, pair in enumerate(pairs)}
        if not hard and not any(pair.weight for pair in given.values()):
            raise UserError("hard=0, and so is the weight of each pair: nothing is learned. Give one of them a weight.")
        self.pairs = {place: pair for place, pair in given.items() if pair.weight}
        self.losses = {place: _loss(pair, place) for place, pair in self.pairs.items()}
        of_logits = [self.losses[k] for k, pair in self.pairs.items() if "logits" in (pair.student, pair.teacher)]
        self.kinds = tuple(kind for kind in ALL_KINDS if all(loss.kind in (None, kind) for loss in of_logits))
        self.fewest_classes = max([Method.fewest_classes, *(loss.fewest_classes for loss in of_logits)])
        self.takes_places = all(loss.layout != "samples" for loss in self.losses.values())
        if not self.kinds:
            raise UserError("pairs has losses of logits for one label and for several labels: keep those of one kind.")
        self.names = dict(zip(self.pairs, _term_names(list(self.pairs.values())), strict=True))
        self.needs_teacher = bool(self.pairs)
        self.found: dict[
            str, tuple[list[str], list[str]]
        ] = {}  # by pair: the names of student's and teacher's features
        self.nodes: dict[str, list[tuple[str, str]]] = {}  # by pair: the names to compare, two by two

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        """Finds the features that each pair names; the student is unchanged."""
        for place, pair in self.pairs.items():
            s = _resolve(student, example, pair.student, f"{place}.student")
            t = _resolve(teacher, example, pair.teacher, f"{place}.teacher")
            if PYRAMID not in (pair.student, pair.teacher):
                n = min(len(s), len(t))
                s, t = s[-n:], t[-n:]
            self.found[place] = s, t
        return student

    def taps(self) -> Taps:
        if not self.pairs:
            return Taps()
        if len(self.found) < len(self.pairs):
            raise UserError("Pairs finds its nodes in prepare(student, teacher, example): call it before taps().")
        sides = zip(*self.found.values(), strict=True)
        student, teacher = ([n for n in dict.fromkeys(itertools.chain(*side)) if n not in HEADS] for side in sides)
        return Taps(student, teacher)

    def own_weights(self) -> set[str]:
        return {self.names[place] for place, pair in self.pairs.items() if pair.weight != 1}

    def build(self, student: Outputs, teacher: Any, targets: Tensor | None) -> None:
        """Creates the projectors, and computes each loss once, which shows whether the shapes can be paired."""
        self.comparisons = nn.ModuleDict()
        for place, pair in self.pairs.items():
            self.nodes[place] = _partners(place, pair, student, teacher, *self.found[place])
            built = []
            for names, s, t in self._features(place, student, teacher):
                try:
                    built.append(Comparison(pair, self.losses[place], s, t).to(s.device))
                    value = built[-1].eval()(s, t)
                    built[-1].train()
                    if not isinstance(value, Tensor) or value.ndim:
                        raise UserError("the loss should be a scalar tensor.")
                except (UserError, RuntimeError, IndexError, TypeError, ValueError) as error:
                    shapes = f"{names[0]} {_shape(s)} of the student and {names[1]} {_shape(t)} of the teacher"
                    raise UserError(f"{place} cannot compare {shapes} by {_called(pair)}: {error}") from error
            self.comparisons[self.names[place]] = nn.ModuleList(built)

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        terms = {}
        for place, pair in self.pairs.items():
            name = self.names[place]
            features = self._features(place, student, teacher)
            parts: Any = self.comparisons[name]
            terms[name] = pair.weight * summed([part(s, t) for part, (_, s, t) in zip(parts, features, strict=True)])
        return terms

    def _features(self, place: str, student: Outputs, teacher: Outputs) -> list[tuple[tuple[str, str], Tensor, Tensor]]:
        """Returns the names and features of a pair: one, or as many as its aliases name."""
        return [
            ((s, t), _read(student, s, f"{place}.student"), _read(teacher, t, f"{place}.teacher"))
            for s, t in self.nodes[place]
        ]


class Comparison(nn.Module):
    """The loss of one pair of features, with the projector of the student's; returns a scalar, not weighted."""

    def __init__(self, pair: Pair, loss: Loss, student: Tensor, teacher: Tensor):
        super().__init__()
        self.function, self.options, self.layout = loss.function, dict(pair.options), loss.layout
        self.resizes = pair.projector == "regressor" and student.ndim == teacher.ndim == 4
        if self.resizes:
            self.projector: nn.Module = regressor(student, teacher, relu=True)
        else:
            needed = loss.widths and (
                isinstance(pair.loss, str) or pair.projector != "none"
            )  # one's own loss may need none
            self.projector = _projector(pair.projector, *align(student, teacher, loss.layout), needed)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.resizes:
            return self.function(*align(self.projector(student), teacher, self.layout), **self.options)
        s, t = align(student, teacher, self.layout)
        if not isinstance(self.projector, nn.Identity):
            as_map = s if s.ndim == 4 else s.flatten(2)[..., None] if s.ndim == 3 else s[:, :, None, None]
            s = self.projector(as_map).reshape(len(s), -1, *s.shape[2:])
        return self.function(s, t, **self.options)


def _projector(kind: str, student: Tensor, teacher: Tensor, widths: bool) -> nn.Module:
    """Returns the layer between two features in one layout, (N, C, ...), which takes a map (N, C, H, W)."""
    a, b = student.shape[1], teacher.shape[1]
    if kind == "none" and widths and a != b:
        raise UserError(f"{a} and {b} channels need a projector: leave projector out.")
    if kind == "none" or (kind == "auto" and (a == b or not widths)):
        return nn.Identity()
    if kind == "regressor":
        return nn.Sequential(nn.Conv2d(a, b, 1), BatchNorm(b), nn.ReLU())
    if kind == "norm":
        return nn.Sequential(nn.Conv2d(a, b, 1, bias=False), BatchNorm(b))
    return nn.Conv2d(a, b, 1)


def _pair(given: Any, place: str) -> Pair:
    """Returns a `Pair` of a pair or of a mapping. Raises `UserError` for one that names no nodes or no such projector."""
    if not isinstance(given, Pair):
        if not isinstance(given, Mapping) or not {"student", "teacher"} <= given.keys():
            raise UserError(
                f"{place} names a student's node and a teacher's: {{student: layer2, teacher: layer3, loss: mse}}."
            )
        fields = {key: value for key, value in given.items() if key in Pair._fields}
        own = {key: value for key, value in given.items() if key not in Pair._fields}
        given = Pair(**fields | {"options": {**(fields.get("options") or {}), **own}})
    if not isinstance(given.student, str) or not isinstance(given.teacher, str):
        raise UserError(f"{place}: student and teacher are names, of a module or a head; one pair has one of each.")
    if isinstance(given.weight, bool) or not isinstance(given.weight, (int, float)):
        raise UserError(f"{place}.weight={given.weight} is no number.")
    if not given.weight >= 0:
        raise UserError(f"{place}.weight={given.weight} cannot be negative. Use 0 to leave the pair out.")
    if given.projector not in PROJECTORS:
        raise UserError(f"{place}.projector={given.projector}: {_nearest(str(given.projector), PROJECTORS)}")
    return given


def _loss(pair: Pair, place: str) -> Loss:
    """Returns the loss that a pair names. Raises `UserError` for a name or an option that does not exist."""
    if not isinstance(pair.loss, str):
        if not callable(pair.loss):
            raise UserError(f"{place}.loss={pair.loss} is neither a name nor a function of (student, teacher).")
        return Loss(pair.loss)
    if pair.loss not in LOSSES:
        raise UserError(f"{place}.loss={pair.loss}: {_nearest(pair.loss, LOSSES)}")
    loss = LOSSES[pair.loss]
    takes = list(inspect.signature(loss.function).parameters)[2:]
    for name, value in pair.options.items():
        if name not in takes:
            of_pair = [field for field in Pair._fields if field not in ("student", "teacher", "options")]
            near = difflib.get_close_matches(name, [*takes, *of_pair], 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(takes) or 'none'}."
            raise UserError(f"{place}: {pair.loss} has no option {name}: {hint}")
        if name in ("temperature", "gamma", "beta", "exponent") and not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"{place}.{name}={value} must be a number above 0.")
    return loss


def _term_names(pairs: Sequence[Pair]) -> list[str]:
    """Returns a name of each pair's term: its own, or loss and student's node, and what else tells equal ones apart."""
    plain = lambda text: re.sub(r"\W+", "_", text).strip("_")  # noqa: E731
    short = [p.name or f"{_called(p)}_{plain(p.student)}" for p in pairs]
    names = [
        f"{name}_{plain(p.teacher)}" if short.count(name) > 1 and not p.name else name
        for name, p in zip(short, pairs, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"pairs: two terms are called {name}. Give one of them another name, name: <text>.")
        if not name.isidentifier() or name == "hard":
            raise UserError(f"pairs: name: {name} is no name of a term. Use letters, digits and underscores.")
    return names


def _called(pair: Pair) -> str:
    """Returns the name of a pair's loss, that of its class or function where it is one's own."""
    if isinstance(pair.loss, str):
        return pair.loss
    function = getattr(pair.loss, "func", pair.loss)  # of a partial function
    name = getattr(function, "__name__", type(function).__name__)
    return name.lower() if name.isidentifier() else "own"


def _resolve(net: nn.Module, example: Any, node: str, place: str) -> list[str]:
    """Returns the names of the features of a node. Raises `UserError` with those that are near, for one that is not there."""
    if node in HEADS:
        return [node]
    try:
        return resolve_taps(net, example, node)
    except UserError as error:
        raise UserError(f"{place}={node}: {error} Heads are {', '.join(HEADS)}.") from error


def _partners(
    place: str, pair: Pair, student: Outputs, teacher: Outputs, names_s: list[str], names_t: list[str]
) -> list[tuple[str, str]]:
    """Returns the names of features that belong together: by stride if either is a pyramid, else in their order."""
    if PYRAMID not in (pair.student, pair.teacher):
        return list(zip(names_s, names_t, strict=True))
    s = {n: _read(student, n, f"{place}.student") for n in names_s}
    t = {n: _read(teacher, n, f"{place}.teacher") for n in names_t}
    if not all(x.ndim == 4 for x in (*s.values(), *t.values())):
        raise UserError(f"{place}: a pyramid is paired with maps (N, C, H, W) alone: name maps of both networks.")
    pairs = paired_levels(list(s.values()), list(t.values()), place)
    say_unpaired(s, t, place)
    return [(names_s[i], names_t[j]) for i, j in pairs]


def _read(outputs: Outputs, node: str, place: str) -> Tensor:
    if node not in HEADS:
        return outputs.features[node]
    if node not in outputs.heads:
        raise UserError(f"{place}={node}: this network has no such head, it gives {', '.join(outputs.heads)}.")
    return outputs.heads[node]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."


def _shape(x: Tensor) -> str:
    return f"({', '.join(['N', *map(str, x.shape[1:])])})"
