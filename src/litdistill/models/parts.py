"""Functions shared by networks: initialization, a context of evaluation mode, and the check of input shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode


def he_init(net: nn.Module, linear_std: float | None = None) -> None:
    """Kaiming normal by fan-out for convolutions (He et al. 2015, arXiv 1502.01852), in place.

    `linear_std`: standard deviation of linear weights with zero bias; None keeps PyTorch's default initialization.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def require_size(name: str, input_shape: Sequence[int], smallest: int) -> None:
    """Raises `UserError` where height or width is below `smallest`: a feature map would be empty."""
    _, height, width = input_shape
    if min(height, width) < smallest:
        raise UserError(
            f"net={name} needs images of at least {smallest}x{smallest}, these are {height}x{width}. "
            "Use net=conv4 or another small network, or resize the images."
        )


def keep_inputs(net: nn.Module) -> nn.Module:
    """Turns `inplace` off in all modules, so that activations do not overwrite hooked pre-activations; returns `net`."""
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return net


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Context of eval mode, without gradients and fused attention; restores each module's mode afterwards.

    Fused attention is one opaque operation: it has no shape rule on the meta device, and FLOP counters do not count it.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eval_mode(net), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def check_fits(net: nn.Module, num_classes: int, input_shape: Sequence[int], name: str, remedy: str) -> nn.Module:
    """Returns `net` if a forward on the meta device gives (1, num_classes), else raises `UserError`."""
    state = {k: torch.empty_like(v, device="meta") for k, v in net.state_dict().items()}
    # Some buffers are not in the state dict.
    state |= {k: torch.empty_like(v, device="meta") for k, v in net.named_buffers()}
    given = "x".join(map(str, input_shape))
    try:
        with evaluating(net):
            logits = torch.func.functional_call(net, state, (torch.empty(1, *input_shape, device="meta"),))
    except Exception as error:  # networks raise many kinds of errors for unsupported sizes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot take images of {given} ({reason}). {remedy}") from error
    if tuple(logits.shape) != (1, num_classes):
        raise UserError(
            f"{name} gives {tuple(logits.shape)} for one image of {given} and not (1, {num_classes}). {remedy}"
        )
    return net


@contextmanager
def tensors_only() -> Iterator[None]:
    """Context in which every `torch.load` loads tensors and plain values only, whatever its caller requests."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    # The opposite variable; torch raises an error if both are set.
    opposite = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if opposite is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = opposite
