"""Detection of a network's stages and classifier from one recorded forward; `resolve_taps` resolves its aliases with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from litdistill.utils.errors import UserError

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus),
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASSING = (nn.Identity, *_DROPOUTS)  # never the end of a stage: in eval mode they return their input


class Call(NamedTuple):
    """The last call of one module in a dry forward. `start` and `end` are positions in the sequence of hook events."""

    name: str
    module: nn.Module
    start: int
    end: int
    given: Any  # the first tensor among its arguments
    output: Any

    @property
    def size(self) -> tuple[int, ...] | None:
        """Height and width of the output if it is a map, else None."""
        return map_size(self.output)


def map_size(x: Any) -> tuple[int, ...] | None:
    """Height and width of a map (N, C, H, W), None for anything else."""
    return tuple(x.shape[2:]) if isinstance(x, Tensor) and x.ndim == 4 else None


def stage_ends(calls: list[Call], logits: Tensor | None, image: tuple[int, ...] | None) -> list[Call]:
    """Returns the call that ends each stage, in the order of execution.

    It is the last map of each spatial size before the classifier, if a convolution made a map of that size (pooling alone
    makes no stage). Excluded are maps of 1x1, and maps inside a block that takes this size and returns another (the wide
    1x1 convolution of the next stage's first block). A stem of the first stage's size belongs to that stage; a stem of one
    strided convolution with a size of its own (before pooling) is dropped, as in the methods' published tables.
    `logits`: (N, classes), None of a network without classes; `image`: height and width of the input. Raises `UserError` where
    no stage is found.
    """
    head = None if logits is None else _classifier(calls, logits)
    calls = [c for c in calls if not isinstance(c.module, _PASSING) and (head is None or c.end < head.start)]
    ends: dict[tuple[int, ...], Call] = {}
    convs: dict[tuple[int, ...], int] = {}
    made = set()
    for c in calls:
        if c.size is None or c.size == (1, 1) or _mid_block(c, calls):
            continue
        ends[c.size] = c
        convs[c.size] = convs.get(c.size, 0) + (_own_weight_ndim(c.module) == 4)
        if type(c.module) is not nn.Sequential and any(_own_weight_ndim(m) == 4 for m in c.module.modules()):
            made.add(c.size)
    stages = sorted((c for size, c in ends.items() if size in made), key=lambda c: c.end)
    if len(stages) > 1 and image and (first := stages[0].size) and 2 * first[0] <= image[0] and convs[first] <= 1:
        stages = stages[1:]
    blocks = _token_blocks(calls)
    if blocks and (not stages or stages[-1].end < blocks[-1].end):
        return blocks
    stages = stages or _hidden(calls)
    if not stages:
        raise UserError("This network has no stage: no maps, no tokens, no hidden layers. Name its taps instead.")
    return stages


def _mid_block(call: Call, calls: list[Call]) -> bool:
    """Returns whether a map lies inside a block that takes a map of its size and returns one of another size."""
    for block in calls:
        if (
            block.start < call.start
            and call.end < block.end
            and type(block.module) is not nn.Sequential
            and map_size(block.given) == call.size
            and block.size not in (None, call.size)
            and any(c.end < block.start and c.size == call.size for c in calls)
        ):
            # more than two sizes inside: a whole encoder, not a block
            inside = {c.size for c in calls if block.start < c.start and c.end < block.end} - {None, (1, 1)}
            if len(inside) <= 2:
                return True
    return False


def _own_weight_ndim(module: nn.Module) -> int:
    weight = _own_weight(module)
    return 0 if weight is None else weight.ndim


def _own_weight(module: nn.Module) -> nn.Parameter | None:
    """Returns the module's own parameter `weight`; None if it has none."""
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)).get("weight")


def _token_blocks(calls: list[Call], most: int = 4) -> list[Call]:
    """Returns up to `most` evenly spaced calls of the outermost series of sibling blocks with outputs (N, tokens, C)."""
    rows: dict[tuple[str, type], list[Call]] = {}
    for c in calls:
        if isinstance(c.output, Tensor) and c.output.ndim == 3 and any(True for _ in c.module.children()):
            rows.setdefault((c.name.rpartition(".")[0], type(c.module)), []).append(c)
    row = min((r for r in rows.values() if len(r) > 1), key=lambda r: (r[0].name.count("."), -len(r)), default=[])
    n = min(most, len(row))
    return [row[round((i + 1) * len(row) / n) - 1] for i in range(n)]


def _hidden(calls: list[Call]) -> list[Call]:
    """Returns, for each linear layer before the classifier, the last output (N, C) before the next linear layer."""
    ends: list[Call] = []
    for c in calls:
        if isinstance(c.output, Tensor) and c.output.ndim == 2:
            if isinstance(c.module, nn.Linear):
                ends.append(c)
            elif ends:
                ends[-1] = c
    return ends


def _classifier(calls: list[Call], logits: Tensor) -> Call | None:
    """Returns the last layer whose weight has one output per class; None if there is none."""
    for c in reversed(calls):
        weight = _own_weight(c.module)
        if (
            weight is not None
            and weight.ndim in (2, 4)
            and weight.shape[0] == logits.shape[-1 if logits.ndim == 3 else 1]
        ):
            return c
    return None


def pooled(calls: list[Call], logits: Tensor) -> str:
    """Returns the tap of the classifier's input, (N, C), or (N, T, C) for logits (N, T, classes).

    Raises `UserError` where no classifier is found.
    """
    head = _classifier(calls, logits)
    if head is None or not isinstance(head.given, Tensor):
        raise UserError("tap 'pooled' is the input of the classifier, and this network has none. Name it instead.")
    return head.name + (":in" if head.given.ndim == 2 or logits.ndim == 3 else ":pool")


def outermost(calls: list[Call], stage: Call) -> str:
    """Returns the name of the outermost module with this very tensor as output: `layer1` rather than `layer1.1.relu`."""
    tokens = stage.output.ndim == 3  # tokens: the block itself, not the sequence that ends with it
    same = [c for c in calls if c.output is stage.output and not isinstance(c.module, _PASSING) and not tokens]
    return min(same or [stage], key=lambda c: (c.name.count("."), c.end)).name


def before_activation(calls: list[Call], stage: Call) -> str | None:
    """Returns the tap before the activation whose output is this very tensor, or else before the next activation.

    Between tensor and next activation there may be a norm: there pre-activation networks (WRN, DenseNet) threshold a
    stage's output. None if there is neither.
    """
    x = stage.output
    normed = [c.output for c in calls if c.given is x and isinstance(c.module, nn.BatchNorm2d)]
    acts = [c for c in calls if isinstance(c.module, _ACTIVATIONS) and isinstance(c.output, Tensor)]
    ending = [c for c in acts if c.output is x]
    opening = [c for c in acts if any(c.given is y for y in (x, *normed)) and c.output.shape == x.shape]
    return f"{(ending or opening)[0].name}:in" if ending or opening else None
