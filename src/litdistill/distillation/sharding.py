"""A teacher that does not fit on one device: its frozen weights are sharded over all ranks and gathered block by block."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from litdistill.distillation.distiller import Distiller
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)


class ShardedTeacher(DDPStrategy):
    """DDP for the student, fully sharded data parallelism (FSDP2) for the teacher.

    Zhao et al. 2023 (arXiv 2304.11277) without the backward pass: each rank stores a shard of every block's weights, gathers
    the whole block before its forward, and frees it afterwards. All ranks must run the teacher at the same time, so its
    outputs cannot be cached.

    Args:
        block: minimum number of parameters that are gathered at once. Each rank needs memory for its shard of the teacher
            and for the largest block.
        options: arguments of Lightning's `DDPStrategy`.
    """

    def __init__(self, block: int = 10_000_000, **options: Any):
        super().__init__(**options)
        self.block = block

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        distiller = trainer.lightning_module
        if not isinstance(distiller, Distiller) or distiller.teacher is None:
            return  # this run trains the teacher, or a student without one
        if trainer.world_size < 2:
            raise UserError(
                "trainer=fsdp spreads the teacher over several devices, and there is one: choose trainer=auto."
            )
        teacher = distiller.teacher
        if teacher.run is not teacher.net:
            raise UserError("A teacher that is spread over devices is run as it is: FrozenTeacher(net, faster=False).")
        mesh = init_device_mesh(self.root_device.type, (trainer.world_size,))
        blocks = shard(teacher.net, mesh, self.block)
        log.info("The teacher lies on %d devices, in %d block(s).", trainer.world_size, blocks)


def shard(net: nn.Module, mesh: DeviceMesh, block: int) -> int:
    """Shards the weights of `net` over `mesh` in place, in units of at least `block` parameters; returns their number.

    The state dict remains that of the whole network, gathered on the CPU; all ranks must call `state_dict` together.
    """
    net.to(memory_format=torch.contiguous_format)  # the only memory format that can be sharded
    units = 0

    def visit(module: nn.Module) -> int:
        """Returns the number of parameters in `module` that belong to no unit yet."""
        nonlocal units
        left = sum(p.numel() for p in module.parameters(recurse=False))
        # nn.MultiheadAttention reads the weights of its output layer without calling the layer.
        parts = module.parameters(recurse=True) if isinstance(module, nn.MultiheadAttention) else ()
        left = sum(p.numel() for p in parts) or left + sum(visit(child) for child in module.children())
        if module is not net and (left < block or isinstance(module, (nn.ModuleList, nn.ModuleDict))):
            return left
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        units += 1
        return 0

    visit(net)
    net.register_state_dict_post_hook(_whole)
    return units


def _whole(net: nn.Module, state: dict[str, Any], *_: Any) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
