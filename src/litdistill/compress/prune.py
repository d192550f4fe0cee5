"""Structured pruning: removes whole channels from a trained network, which gives a smaller dense network.

Torch-Pruning finds the groups of coupled channels (through residual sums, for example): DepGraph, Fang et al. 2023
(arXiv 2301.12900). The importance of a group is the L2 norm of its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.compress.low_rank import check_budget
from litdistill.compress.structure import tag_structure
from litdistill.models.profile import count_macs, count_parameters
from litdistill.utils.errors import UserError

SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm1d: ("num_features",),
}
STEPS = 200  # pruning steps, each of which removes the share 1 / STEPS of every layer's channels


def prune(net: nn.Module, images: Tensor, budget: float, of: str = "parameters") -> nn.Module:
    """Returns a copy without the least important channels, an equal share of every layer's, of the share `budget` in size.

    `budget`: of the network's `parameters` or `macs`. The classifier's outputs are not pruned. `images`: two or more
    (N, C, H, W). Raises `UserError` for a network whose forward depends on the number of its channels, and for a budget that
    is too small.
    """
    from litdistill.features.feature_extractor import resolve_taps

    check_budget(budget, of)
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        raise UserError("Pruning needs torch-pruning: pip install 'litdistill[compress]'.") from error
    size = (lambda n: count_macs(n, images.shape[1:])) if of == "macs" else count_parameters
    small, example = copy.deepcopy(net).eval().requires_grad_(True), images[:2]
    if not isinstance(out := small(example), Tensor):
        raise _cannot(f"its outputs are several, {', '.join(out)}, and which layers make them is not known")
    head = resolve_taps(small, example, "pooled")[0].partition(":")[0]
    allowed, classes = budget * size(small), out.shape[1]
    try:
        pruner = tp.pruner.BasePruner(
            small,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1.0,
            max_pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[small.get_submodule(head)],
        )
        for _ in range(STEPS):
            if size(small) <= allowed:
                break
            pruner.step()
        fits = small(example).shape[1] == classes
    except (RuntimeError, ZeroDivisionError, IndexError, ValueError) as error:
        raise _cannot(str(error).splitlines()[0]) from error
    if not fits:
        raise _cannot("its classifier lost outputs")
    if size(small) > allowed:
        raise UserError(f"compress.budget={budget} is too small: one channel everywhere is still more than that.")
    before, after = sizes(net), sizes(small)
    layers = {name: after[name] for name in after if after[name] != before[name]}
    shapes = lambda n: {k: v.shape for k, v in n.state_dict().items()}  # noqa: E731
    if shapes(set_sizes(copy.deepcopy(net), layers)) != shapes(small):
        raise _cannot("it has parameters outside of convolutions, linear layers and batch normalization")
    for (_, old), (_, new) in zip(net.named_parameters(), small.named_parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return tag_structure(net, small.train(net.training), {"kind": "prune", "layers": layers})


def _cannot(reason: str) -> UserError:
    return UserError(
        f"This network cannot be pruned ({reason}). Use compress=low_rank, or another network (resnet, vgg)."
    )


def sizes(net: nn.Module) -> dict[str, dict[str, int]]:
    """Returns the sizes, by their attribute's name, of every layer that pruning may change, by the layer's name."""
    return {name: {k: getattr(m, k) for k in SIZES[type(m)]} for name, m in net.named_modules() if type(m) in SIZES}


def set_sizes(net: nn.Module, layers: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Replaces the named layers, in place, by new ones of the given sizes. Raises `ValueError` for sizes above the old."""
    for name, given in layers.items():
        layer = net.get_submodule(name)
        keys = SIZES[type(layer)]
        if set(given) != set(keys) or not all(type(n) is int and 1 <= n <= getattr(layer, k) for k, n in given.items()):
            raise ValueError(f"{name} cannot have the sizes {dict(given)}")
        net.set_submodule(name, _like(layer, given).train(layer.training))
    return net


def _like(layer: nn.Module, size: Mapping[str, int]) -> nn.Module:
    """Returns a new layer with the options of `layer` and another size, with PyTorch's initial weights."""
    options: dict[str, Any] = dict(size)
    if isinstance(layer, nn.Conv2d):
        kept = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options |= {k: getattr(layer, k) for k in kept} | {"bias": layer.bias is not None}
    elif isinstance(layer, nn.Linear):
        options["bias"] = layer.bias is not None
    else:
        options |= {k: getattr(layer, k) for k in ("eps", "momentum", "affine", "track_running_stats")}
    like = next(layer.parameters(), torch.empty(0))
    return type(layer)(**options, device=like.device, dtype=like.dtype)
