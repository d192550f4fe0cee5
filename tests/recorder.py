"""A CPU stand-in for CUDA graphs: what torch's dispatcher runs while a step is recorded, run again on the same tensors.

As in a graph, numbers of Python are constants, nothing of Python is run again, and all tensors keep their addresses. What a
graph refuses is refused: values that are read on the host, and shapes that depend on values.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

T = TypeVar("T")
aten = torch.ops.aten
HOST = {  # these read values, or give shapes that depend on them
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.equal,
    aten.bincount,
}

UNMARKED = {
    aten.native_batch_norm,
    aten.cudnn_batch_norm,
}  # these write running statistics, and their schemas do not say so


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for one in found:
            yield from tensors(one)
    elif isinstance(found, dict):
        yield from tensors(list(found.values()))


def reads_on_host(func: Any, args: Any) -> bool:
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1]))
    return func.overloadpacket in HOST


class Operations(TorchDispatchMode):
    """Notes each operation; with `undo` what it overwrites, too."""

    def __init__(self, undo: bool):
        super().__init__()
        self.undo, self.steps, self.refused = undo, [], []
        self._made: set[int] = set()  # storages that the recorded operations allocated
        self._before: dict[tuple, tuple[Tensor, Tensor]] = {}  # by view

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads_on_host(func, args):
            self.refused.append(str(func))
        if torch.Tag.inplace_view in func.tags:
            self._keep_shape(args[0])
            return func(*args, **kwargs)
        known = {x.untyped_storage().data_ptr() for x in tensors([args, kwargs])}
        if self.undo and (func._schema.is_mutable or func.overloadpacket in UNMARKED):
            for x in tensors([args, kwargs]):
                place = x.untyped_storage().data_ptr()
                view = (place, x.storage_offset(), x.shape, x.stride())
                if place not in self._made and view not in self._before:
                    self._before[view] = (x, x.clone())
        out = func(*args, **kwargs)
        fresh = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in known and x.numel()]
        self._made |= {x.untyped_storage().data_ptr() for x in fresh}
        self.steps.append((func, args, kwargs, out, {id(x) for x in fresh}))
        return out

    def _keep_shape(self, x: Tensor) -> None:
        """Has the operations before one that gives a tensor another shape in place use it with the shape that it had."""
        was = x.detach()
        put = lambda found: tree_map(lambda y: was if y is x else y, found)  # noqa: E731
        self.steps = [
            (func, put(args), put(kwargs), put(out), fresh | ({id(was)} if id(x) in fresh else set()))
            for func, args, kwargs, out, fresh in self.steps
        ]

    def take_back(self) -> None:
        for x, value in reversed(self._before.values()):  # of what several views show, the value before the first
            x.data.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out, fresh in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if id(old) in fresh:
                    old.copy_(new)


class Replays:
    """See the module's docstring; a `litdistill.distillation.cuda_graphs.Recorder`."""

    device = "cpu"

    def __init__(self) -> None:
        self.recorded = 0

    def watch(self, step: Callable[[], T]) -> tuple[T, str | None]:
        with Operations(undo=False) as operations:
            taken = step()
        return taken, operations.refused[0] if operations.refused else None

    def record(self, step: Callable[[], T]) -> tuple[T, Callable[[], Any]]:
        self.recorded += 1
        state = torch.get_rng_state()
        with Operations(undo=True) as operations:
            taken = step()
        assert not operations.refused
        operations.take_back()
        torch.set_rng_state(state)
        return taken, operations.replay
