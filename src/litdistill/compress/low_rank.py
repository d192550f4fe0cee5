"""Low-rank factorization of convolutions and linear layers by the singular value decomposition.

A convolution of O kernels of I x k x k, unfolded to a matrix (O, I·k·k), becomes r kernels of I x k x k and a 1x1
convolution from r to O. At rank r this is the best approximation of the matrix in the Frobenius norm (Eckart & Young
1936), with a squared error equal to the sum of the squared discarded singular values. Denton et al. 2014 (arXiv 1404.0736),
section 3.2, and Zhang et al. 2016 (arXiv 1505.06798), section 3.1 without the data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litdistill.compress.structure import tag_structure
from litdistill.models.parts import evaluating
from litdistill.models.profile import count_macs, count_parameters
from litdistill.utils.errors import UserError

MEASURES = ("parameters", "macs")


def low_rank(net: nn.Module, images: Tensor, budget: float, of: str = "parameters") -> nn.Module:
    """Factorizes layers of a trained network, in place, until it has the share `budget` of its `parameters` or `macs`.

    All layers share one budget (`choose_ranks`): the ranks minimize the sum over layers of the discarded share of the squared
    Frobenius norm. A layer that its factors would make larger is not factorized. `images`: a few (N, C, H, W) for a dry
    forward. Raises `UserError` for a budget that rank 1 everywhere exceeds.
    """
    check_budget(budget, of)
    uses = _uses(net, images) if of == "macs" else {}
    layers = [_layer(name, m, uses.get(name, 1)) for name, m in net.named_modules() if _factorable(m)]
    total = count_macs(net, images.shape[1:]) if of == "macs" else count_parameters(net)
    ranks = choose_ranks(layers, total, budget * total)
    return tag_structure(net, set_ranks(net, ranks), {"kind": "low_rank", "layers": ranks})


def check_budget(budget: float, of: str) -> None:
    """Raises `UserError` for a budget outside (0, 1], or a measure that is not in `MEASURES`."""
    if of not in MEASURES:
        raise UserError(f"compress.of={of}: a budget is a share of the network's {' or '.join(MEASURES)}.")
    if not 0 < budget <= 1:
        raise UserError(f"compress.budget={budget} is a share of the network's {of}: above 0 and at most 1.")


class Layer(NamedTuple):
    """The error and the cost of a layer by rank."""

    name: str
    tails: list[float]  # [r]: the share of the squared Frobenius norm that rank r discards
    cost: int  # of one rank, in parameters or multiply-accumulates
    whole: int  # cost of the unfactorized layer without its bias


def choose_ranks(layers: list[Layer], total: float, allowed: float) -> dict[str, int]:
    """Returns the ranks that discard the least at a network cost of at most `allowed`, by bisection of a Lagrange multiplier.

    `total`: the cost of the unfactorized network. The result omits layers that are not factorized.
    """

    def at(price: float) -> dict[str, int]:
        ranks = {}
        for layer in layers:
            small = range(1, min(len(layer.tails) - 1, (layer.whole - 1) // layer.cost) + 1)
            best = min(small, key=lambda r: layer.tails[r] + price * r * layer.cost, default=None)
            if best is not None and layer.tails[best] + price * best * layer.cost < price * layer.whole:
                ranks[layer.name] = best
        return ranks

    of = {layer.name: layer for layer in layers}
    cost = lambda ranks: total - sum(of[n].whole - r * of[n].cost for n, r in ranks.items())  # noqa: E731
    cheap, dear = 0.0, 1e6
    least = cost(at(dear))
    if total > allowed and least > allowed:
        raise UserError(
            f"compress.budget={allowed / total:.3g} is too small: rank 1 everywhere leaves {least / total:.3g} of this "
            "network. Give a larger budget, or choose a smaller network."
        )
    if total <= allowed:
        return {}
    for _ in range(100):
        price = (cheap * dear) ** 0.5 if cheap else dear / 1e3
        if price < 1e-15:
            break
        cheap, dear = (cheap, price) if cost(at(price)) <= allowed else (price, dear)
    return at(dear)


def set_ranks(net: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replaces the named layers, in place, by their factors of the given ranks. Raises `ValueError` for an invalid rank."""
    for name, rank in ranks.items():
        layer = net.get_submodule(name)
        if not _factorable(layer) or type(rank) is not int or not 1 <= rank <= min(unfolded(layer).shape):
            raise ValueError(f"{name} cannot have rank {rank}")
        net.set_submodule(name, factors(layer, rank))
    return net


def factors(layer: nn.Module, rank: int) -> nn.Sequential:
    """Returns a layer as two, `inner` to `rank` channels and `outer` to the outputs, by its truncated SVD in float64.

    Each factor is scaled by the square roots of the singular values, so that gradients of both have a similar scale.
    """
    u, s, vh = torch.linalg.svd(unfolded(layer).double(), full_matrices=False)
    root = s[:rank].sqrt()
    first, second = root[:, None] * vh[:rank], u[:, :rank] * root
    bias = layer.bias is not None
    like: dict[str, Any] = {"device": first.device, "dtype": unfolded(layer).dtype}
    inner: nn.Conv2d | nn.Linear
    outer: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
            like[key] = getattr(layer, key)
        inner = nn.Conv2d(layer.in_channels, rank, bias=False, **like)
        outer = nn.Conv2d(rank, layer.out_channels, 1, bias=bias, device=like["device"], dtype=like["dtype"])
    else:
        assert isinstance(layer, nn.Linear)
        inner = nn.Linear(layer.in_features, rank, bias=False, **like)
        outer = nn.Linear(rank, layer.out_features, bias=bias, **like)
    with torch.no_grad():
        inner.weight.copy_(first.reshape(inner.weight.shape))
        outer.weight.copy_(second.reshape(outer.weight.shape))
        if outer.bias is not None and layer.bias is not None:
            outer.bias.copy_(layer.bias)
    return nn.Sequential(OrderedDict(inner=inner, outer=outer)).train(layer.training)


def unfolded(layer: nn.Module) -> Tensor:
    """Returns the weight as a matrix (outputs, inputs of one output)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


def _factorable(module: nn.Module) -> bool:
    """Returns whether a module can be factorized; not for subclasses, whose code may read the weight."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def _layer(name: str, module: nn.Module, uses: int) -> Layer:
    energy = torch.linalg.svdvals(unfolded(module).double()) ** 2
    tails = [1.0, *(1 - energy.cumsum(0) / energy.sum().clamp(min=1e-300)).tolist()]
    outputs, inputs = unfolded(module).shape
    return Layer(name, tails, uses * (outputs + inputs), uses * outputs * inputs)


def _uses(net: nn.Module, images: Tensor) -> dict[str, int]:
    """Returns the number of positions (pixels or tokens, over all calls) at which each layer is applied for one image."""
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        channels = out.shape[1] if isinstance(layer, nn.Conv2d) else out.shape[-1]
        found[name] = found.get(name, 0) + out[0].numel() // channels

    layers = [(name, m) for name, m in net.named_modules() if _factorable(m)]
    handles = [m.register_forward_hook(partial(count, name)) for name, m in layers]
    with evaluating(net):
        net(images[:1])
    for handle in handles:
        handle.remove()
    return found
