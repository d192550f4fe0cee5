"""Process launch: the name of a run's folder, and the Trainer's devices where torchrun or SLURM started the processes.

Lightning starts the ranks of one machine itself, as copies of this process. torchrun and SLURM start the ranks of several
machines at the same time, so these have to agree on a folder before a Trainer exists.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig

from litdistill.utils.errors import UserError

if TYPE_CHECKING:
    from lightning import Trainer


class Launch(NamedTuple):
    """The launcher of processes that Lightning did not start."""

    by: str  # "torchrun" or "srun"
    nodes: int
    tasks: int  # processes on each node


def launched() -> Launch | None:
    """Returns the launcher of this process (its counts may be 1), or None where the user or Lightning started it.

    Raises `UserError` for a SLURM job of several tasks that was not started by srun.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        tasks = int(env["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(env["WORLD_SIZE"]) // tasks, tasks)
    if not _in_slurm_job() or "SLURM_NTASKS" not in env:
        return None
    count, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
    if count > 1 and ("SLURM_STEP_ID" not in env or "SLURM_NTASKS_PER_NODE" not in env):
        raise UserError(
            f"This SLURM job has {count} tasks. Ask for them with --ntasks-per-node, and start the command with srun, "
            "which runs it in each: scripts/slurm/ddp.sbatch does so."
        )
    return Launch("srun", nodes, count // nodes)


def _in_slurm_job() -> bool:
    """Returns whether this is a SLURM batch job; as in Lightning, a shell of `srun --pty bash` or `salloc` is none."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def run_stamp() -> str:
    """Returns the name of a run's folder: the time and a random suffix.

    All ranks of a torchrun get the first rank's name, also after a restart. A SLURM job has its id and a hash of the command
    instead, so that a requeued job finds the folder of its first start.
    """
    if _in_slurm_job():
        typed = hashlib.sha256("\0".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode()).hexdigest()
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{typed[:12]}"
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S_") + secrets.token_hex(2)
    return _stamp_of_first_rank(stamp) if "TORCHELASTIC_RUN_ID" in os.environ else stamp


def _stamp_of_first_rank(stamp: str) -> str:
    """Returns the first rank's stamp, exchanged through torchrun's key-value store."""
    from torch.distributed import PrefixStore, TCPStore

    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError(
            "This torchrun shares no key-value store with its ranks: set RUN_STAMP to the same name on all nodes."
        )
    store = PrefixStore("litdistill", TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False))
    if env["RANK"] == "0":
        return store.compare_set("stamp", "", stamp).decode()
    return store.get("stamp").decode()  # blocks until the first rank has set it


def fit_to_launch(options: DictConfig) -> None:
    """Sets `devices` and `num_nodes` of a distributed trainer's options to the processes that the launcher started.

    Raises `UserError` where the options have other values, and where several processes would train on one device each.
    """
    launch, distributed = launched(), options.get("strategy") is not None
    if launch is not None and not distributed and launch.nodes * launch.tasks > 1:
        raise UserError(
            f"{launch.by} started {launch.nodes * launch.tasks} processes, and this trainer uses one: each would train "
            "the same run. Choose trainer=ddp, or start one process."
        )
    if not distributed:
        return
    if launch is not None:
        for key, started in (("devices", launch.tasks), ("num_nodes", launch.nodes)):
            if options.get(key) not in (None, "auto", -1, started):
                raise UserError(
                    f"trainer.{key}={options[key]}, but {launch.by} started {launch.tasks} process(es) on each of "
                    f"{launch.nodes} node(s). Leave the key out: it is taken from the launcher."
                )
            options[key] = started
    elif options.get("num_nodes") is None:
        options.num_nodes = 1


def init_process_group_early(trainer: Trainer) -> None:
    """Initializes the process group of torchrun's or SLURM's ranks, before rank 0 makes a decision for all."""
    if launched() is not None and trainer.world_size > 1:
        trainer.strategy.setup_environment()


def is_first_rank() -> bool:
    """Returns whether this process has rank 0; works before a Trainer exists."""
    from lightning.pytorch.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def broadcast_from_rank0(value: bool) -> bool:
    """Returns rank 0's `value` on all ranks that a launcher started (a collective call); otherwise returns `value`.

    Ranks that Lightning starts begin after rank 0 has decided and read its decision from the run's folder.
    """
    from torch import distributed

    if launched() is None or not (distributed.is_available() and distributed.is_initialized()):
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
