"""Structured pruning: removes whole channels from a trained network, which gives a smaller dense network.

Torch-Pruning finds the groups of coupled channels (through residual sums, for example): DepGraph, Fang et al. 2023
(arXiv 2301.12900). The importance of a group is the L2 norm of its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
    nn.GroupNorm: ("num_channels",),
}
STEPS = 200  # pruning steps, each of which removes the share 1 / STEPS of every layer's channels


def prune(net: nn.Module, images: Tensor, budget: float, of: str = "parameters") -> nn.Module:
    """Returns a copy without the least important channels, an equal share of every layer's, of the share `budget` in size.

    `budget`: of the network's `parameters` or `macs`. The layers that make its outputs keep these. `images`: two or more
    (N, C, H, W). Raises `UserError` for a network whose forward depends on the number of its channels, and for a budget that
    is too small.
    """
    check_budget(budget, of)
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        raise UserError("Pruning needs torch-pruning: pip install 'litdistill[compress]'.") from error
    size = (lambda n: count_macs(n, images.shape[1:])) if of == "macs" else count_parameters
    small, example = copy.deepcopy(net).eval().requires_grad_(True), images[:2]
    outputs, allowed = _outputs(small(example)), budget * size(small)
    try:
        pruner = tp.pruner.BasePruner(
            small,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1.0,
            max_pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=last_layers(small, outputs),
        )
        for _ in range(STEPS):
            if size(small) <= allowed:
                break
            pruner.step()
        fits = [t.shape for t in _outputs(small(example))] == [t.shape for t in outputs]
    except (RuntimeError, ZeroDivisionError, IndexError, ValueError) as error:
        raise _cannot(str(error).splitlines()[0]) from error
    if not fits:
        raise _cannot("it lost outputs")
    if size(small) > allowed:
        raise UserError(f"compress.budget={budget} is too small: one channel everywhere is still more than that.")
    before, after = sizes(net), sizes(small)
    layers = {name: after[name] for name in after if after[name] != before[name]}
    shapes = lambda n: {k: v.shape for k, v in n.state_dict().items()}  # noqa: E731
    if shapes(set_sizes(copy.deepcopy(net), layers)) != shapes(small):
        raise _cannot("it has parameters outside of convolutions, linear layers and normalization by batch or group")
    for (_, old), (_, new) in zip(net.named_parameters(), small.named_parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return tag_structure(net, small.train(net.training), {"kind": "prune", "layers": layers})


def _outputs(given: Any) -> list[Tensor]:
    """Returns the outputs of a network as a list: a tensor, or tensors by name."""
    return [given] if isinstance(given, Tensor) else list(given.values())


def last_layers(net: nn.Module, outputs: Sequence[Tensor]) -> list[nn.Module]:
    """Returns the convolutions and linear layers that make the outputs of `net`: the last ones on each path to them."""
    kinds = (nn.Conv2d, nn.Linear)
    owner = {id(p): m for m in net.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    found: dict[int, nn.Module] = {}
    todo, seen = [t.grad_fn for t in outputs], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [step for step, _ in node.next_functions]
        layers = [owner[id(p)] for step in before if id(p := _parameter(step)) in owner]
        found |= {id(layer): layer for layer in layers}
        todo += [] if layers else before
    return list(found.values())


def _parameter(node: Any) -> Tensor | None:
    """Returns the parameter that a node of autograd's graph passes on by itself, perhaps transposed; None for others."""
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


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
    elif isinstance(layer, nn.GroupNorm):
        options |= {k: getattr(layer, k) for k in ("num_groups", "eps", "affine")}
    else:
        options |= {k: getattr(layer, k) for k in ("eps", "momentum", "affine", "track_running_stats")}
    like = next(layer.parameters(), torch.empty(0))
    return type(layer)(**options, device=like.device, dtype=like.dtype)
