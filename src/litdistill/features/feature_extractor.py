"""Feature extraction: taps are resolved from names or aliases, and features are read through hooks.

    names = resolve_taps(net, images, "stages")   # ["layer1", "layer2", "layer3", "layer4"] for a ResNet
    outputs = FeatureExtractor(net, names)(images)
    outputs.logits, outputs.features["layer1"]

The network is never rewritten or wrapped, so its parameter names, its mode and `net.compile()` are unchanged. Names are
those of the network without its preprocessing (`litdistill.models.preprocess`).
`litdistill.features.stages.stage_ends` defines the stages; any module can be named instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.features.outputs import first_tensor, run_network
from litdistill.features.pyramid import PYRAMID, pyramid
from litdistill.features.stages import Call, before_activation, map_size, outermost, pooled, stage_ends
from litdistill.types import EMBEDDING, Outputs
from litdistill.utils.errors import UserError
from litdistill.utils.modes import eval_mode

ALIASES = ("stages", "stages:pre", "last", "pooled", PYRAMID)
OF_HEAD = f":{EMBEDDING}"  # the tap of a network's head `embedding`


def resolve_taps(
    net: nn.Module,
    example: Any,
    taps: Sequence[str] | str,
    forward: Callable[[nn.Module, Any], Outputs] = run_network,
) -> list[str]:
    """Returns the tap names for `taps`: each a module of `net.named_modules()` for its output, or with a suffix for its input.

    `taps`: one of the aliases below, a name, or a sequence of either. `example`: the inputs of a small batch for one dry
    forward in eval mode, which leaves modes, buffers, random states and hooks unchanged. `forward`: runs the network on the
    example, where a plain call does not.

    - `"stages"`: the end of each stage, in the order of execution. Maps (N, C, H, W): the last of each spatial size.
      Networks that end in tokens (ViT): up to four evenly spaced encoder blocks (N, tokens, C), the last one included.
      Without either (MLP): the output of each hidden layer (N, C).
    - `"stages:pre"`: the same before the activation that ends the stage (`"layer1.1.relu:in"`), in pre-activation
      networks (WRN) before the next activation; without such an activation module, the stage's output.
    - `"last"`: the last of the stages.
    - `"pooled"`: the input of the classifier, (N, C); for a convolutional classifier (SqueezeNet) averaged over positions. Of
      a network without classes its embedding.
    - `"pyramid"`: the levels of a torchvision `FeaturePyramidNetwork`, finest first; see `litdistill.features.pyramid`.

    Suffixes: `":in"` the module's input, `":pool"` its input averaged over positions or tokens to (N, C); then `"@0"` its first
    call in a forward, `"@1"` its second, where a head is called once for each level of a pyramid (`"head.conv.3:in@2"`).

    A network of several (`litdistill.models.ensemble.Ensemble`, which names them by `parts()`) is told whose: `"0.layer3"`,
    `"1.stages"`; with one part its number may be left out.
    Raises `UserError` for an unknown name, for a module that the forward does not call or that returns no single
    tensor, and where an alias matches nothing.
    """
    requested = [taps] if isinstance(taps, str) else list(taps)
    if not requested:
        return []
    if callable(parts := getattr(net, "parts", None)):
        return _taps_of_parts(parts(), example, requested, forward)
    modules = dict(net.named_modules())
    for tap in requested:
        if tap not in (*ALIASES, OF_HEAD):
            _resolve(modules, tap)
    calls, outputs, size = _dry_forward(net, example, forward)
    logits = outputs.main if EMBEDDING not in outputs.heads else None
    found: list[str] = []
    for tap in requested:
        if tap == "pooled":
            found.append(OF_HEAD if logits is None else pooled(calls, logits))
        elif tap == PYRAMID:
            found += pyramid(net, calls)
        elif tap in ALIASES:
            stages = stage_ends(calls, logits, size)
            if tap == "stages:pre":
                found += [before_activation(calls, stage) or outermost(calls, stage) for stage in stages]
            else:
                found += [outermost(calls, stage) for stage in (stages[-1:] if tap == "last" else stages)]
        else:
            found.append(tap if tap == OF_HEAD else _called(tap, calls))
    return list(dict.fromkeys(found))


def _called(tap: str, calls: list[Call]) -> str:
    """Returns a tap that names a module. Raises `UserError` where the forward does not call it or it gives no single tensor."""
    name = tap.partition("@")[0].partition(":")[0]
    where = ":" in tap
    call = next((c for c in calls if c.name == name), None)
    if call is None or not isinstance(call.given if where else call.output, Tensor):
        why = "is not called in the forward of this network" if call is None else "is no single tensor there"
        near = ", ".join(c.name for c in calls if c.name.startswith(name.split(".")[0]))
        raise UserError(f"Tap {tap!r} {why}. Take another: {near or ', '.join(c.name for c in calls)}.")
    return tap


def _taps_of_parts(
    parts: dict[str, nn.Module], example: Any, taps: list[str], forward: Callable[[nn.Module, Any], Outputs]
) -> list[str]:
    """Returns the names of `resolve_taps` for a network of several: each part's own, behind its name."""
    found: list[str] = []
    for tap in taps:
        name, _, inside = tap.partition(".")
        if name not in parts or not inside:
            if len(parts) > 1:
                shown = " or ".join(f"{part}.{tap}" for part in list(parts)[:3])
                raise UserError(
                    f"Tap {tap!r}: the teacher is {len(parts)} networks, counted from 0. Say whose features, as in "
                    f"teacher_taps={shown}."
                )
            (name,), inside = parts, tap
        if hasattr(parts[name], "taps_for"):
            raise UserError(
                f"Tap {tap!r}: member {name} of the teacher is a file of outputs, which has no features to tap. Name another."
            )
        found += [f"{name}.{own}" for own in resolve_taps(parts[name], example, inside, forward)]
    return list(dict.fromkeys(found))


class FeatureExtractor:
    """Calls `net` and returns `Outputs` with its heads and the named features, in their order.

    Hooks are registered once on the live modules. Where a module is called several times in a forward, its last call counts,
    unless a tap says which (`"@0"`). Features keep their graph; no reference is held after the call. Hooks act only during a
    call of this object: `net(x)` itself, and copies of `net`, take no features. In-place activations of a tapped network are
    made out-of-place, since they would overwrite their input; in-place operations outside modules (`out += x`) still change the
    features. Tap a network before its first compiled forward (`net.compile()`), which fixes hooks.
    Raises `UserError` for an unknown name and, when called, for a tap that the forward did not reach.
    """

    def __init__(self, net: nn.Module, names: Sequence[str]):
        self.net, self.names = net, tuple(names)
        self._state = _State()
        self._handles = []
        self._inplace = [m for m in net.modules() if getattr(m, "inplace", False) is True] if self.names else []
        modules = dict(net.named_modules())
        for name in self.names:
            if name == OF_HEAD:  # no module's: it is read from the outputs
                continue
            module, where = _resolve(modules, name)
            if where:
                hook: Any = partial(_save_input, self._state, name, where)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(partial(_save_output, self._state, name)))
        for m in self._inplace:
            m.inplace = False  # type: ignore[assignment]

    def __call__(self, inputs: Any) -> Outputs:
        """Returns the network's outputs on these inputs, with the features."""
        return self.run(lambda net: run_network(net, inputs))

    def run(self, forward: Callable[[nn.Module], Outputs]) -> Outputs:
        """Returns the outputs of `forward(net)`, with the features of that forward."""
        if not self.names:
            return forward(self.net)
        try:
            self._state.active = True
            outputs = forward(self.net)
            taken = dict(self._state.features) | {OF_HEAD: outputs.heads.get(EMBEDDING)}
        finally:
            self._state.active = False
            self._state.features.clear()
            self._state.calls.clear()
        for name in self.names:
            if not isinstance(taken.get(name), Tensor):
                why = "gave no single tensor" if name in taken else "was not reached in this forward"
                raise UserError(
                    f"Tap {name!r} {why}. Take another module, and tap a network before its first compiled forward."
                )
        return outputs._replace(features={name: taken[name] for name in self.names})

    def remove(self) -> None:
        """Removes all hooks and restores the `inplace` flags of the network's activations."""
        for handle in self._handles:
            handle.remove()
        for m in self._inplace:
            m.inplace = True  # type: ignore[assignment]
        self._handles, self._inplace = [], []


class _State:
    """Storage that the hooks write to. A deep copy of a network copies it too, which keeps the copy's hooks apart."""

    def __init__(self) -> None:
        self.active = False
        self.features: dict[str, Any] = {}
        self.calls: dict[str, int] = {}  # so far in this forward, of taps that name one of several

    def takes(self, name: str) -> bool:
        """Returns whether this call of a module is the one that a tap names: `"@1"` its second; any, where none is named."""
        number = name.rpartition("@")[2] if "@" in name else ""
        if not self.active or not number:
            return self.active
        self.calls[name] = self.calls.get(name, -1) + 1
        return self.calls[name] == int(number)


def _save_output(state: _State, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    if state.takes(name):
        state.features[name] = output


def _save_input(state: _State, name: str, where: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if state.takes(name):
        x = _first_tensor(args, kwargs)
        state.features[name] = _average(x) if where == "pool" and x is not None else x


def _average(x: Tensor) -> Tensor:
    """Averages a map (N, C, H, W) over positions or tokens (N, tokens, C) over tokens; flattens anything else to (N, C)."""
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x.flatten(1)


def _first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def _resolve(modules: dict[str, nn.Module], tap: str) -> tuple[nn.Module, str]:
    place, at, number = tap.partition("@")
    name, colon, where = place.partition(":")
    whole = (not colon or where in ("in", "pool")) and (not at or number.isdecimal())
    if name and name in modules and whole:
        return modules[name], where
    names = [n for n in modules if n]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(
        f"No tap {tap!r}. Nearest modules: {', '.join(near)}; suffixes are ':in' or ':pool', and '@0' for a first call; "
        f"aliases are {', '.join(ALIASES)}. All modules: [name for name, _ in net.named_modules()]."
    )


@contextmanager
def _eval_state(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in eval mode without in-place activations or gradients; restores every flag and random state on exit."""
    inplace = [m for m in net.modules() if getattr(m, "inplace", False) is True]
    forked: Any = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        for m in inplace:
            m.inplace = False  # type: ignore[assignment]
        with eval_mode(net), torch.no_grad(), torch.random.fork_rng(**forked), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for m in inplace:
            m.inplace = True  # type: ignore[assignment]


def _dry_forward(
    net: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Outputs]
) -> tuple[list[Call], Outputs, tuple[int, ...] | None]:
    """Returns the last call of each submodule, sorted by its end; the outputs; and the height and width of the network's own
    input (behind its preprocessing), None if it is no map.
    """
    clock = iter(range(1 << 62))
    starts: dict[str, int] = {}
    calls: dict[str, Call] = {}
    sizes: list[tuple[int, ...] | None] = []

    def begin(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        starts[name] = next(clock)
        if not name:
            sizes.append(map_size(_first_tensor(args, kwargs)))

    def end(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if name:
            calls[name] = Call(name, module, starts[name], next(clock), _first_tensor(args, kwargs), output)

    handles = []
    try:
        for name, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(partial(begin, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(end, name), with_kwargs=True))
        with _eval_state(net, first_tensor(example).device):
            outputs = forward(net, example)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls.values(), key=lambda c: c.end), outputs, sizes[-1]
