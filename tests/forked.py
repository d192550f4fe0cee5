"""The commands in processes that are forked from this one, which has imported everything: to kill, starve, signal them.

Each is what `python scripts/<command>.py` does after its imports, in a folder of its own and with its output in a file.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

import litdistill.training.train  # noqa: F401  once, before the forks
from litdistill.evaluation import figures as pictures
from litdistill.training.callbacks import EpochLogger

ROOT = Path(__file__).parents[1]

# A teacher of two epochs and a student of three, with four steps each: two groups, since every second step is logged.
TINY = [
    "data.per_class=12", "data.batch_size=32", "student.widths=[8,8]", "teacher.widths=[12,12]", "trainer=cpu",
    "trainer.max_epochs=3", "trainer.log_every_n_steps=2", "optimizer.lr=0.02", "+teacher.recipe.trainer.max_epochs=2",
    "+teacher.recipe.data.per_class=12", "teacher.allow_chance=true", "threads=1", "name=one",
]  # fmt: skip

Setup = Callable[[], object] | None


def start(script: str, arguments: Sequence[str], cwd: Path, setup: Setup = None) -> ForkProcess:
    """`python scripts/<script>.py <arguments>` in `cwd`, after a call of `setup` in that process."""
    cwd.mkdir(parents=True, exist_ok=True)
    how = multiprocessing.get_context("spawn" if setup is None and not _forks_can_train() else "fork")
    process: Any = how.Process(target=_command, args=(script, list(arguments), cwd, setup))
    process.start()
    return process  # type: ignore[no-any-return]


def _forks_can_train() -> bool:
    """Whether a process that is forked from this one can compute gradients: not once autograd has threads of its own here."""
    child = os.fork()
    if child == 0:
        try:
            torch.ones(2, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def finish(process: ForkProcess, seconds: float = 300) -> int:
    """The exit status, negative for a signal. Kills what takes longer than it may."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def call(script: str, arguments: Sequence[str], cwd: Path, setup: Setup = None) -> tuple[int, str]:
    """The exit status of a command and what all commands in `cwd` have printed."""
    status = finish(start(script, arguments, cwd, setup))
    return status, (cwd / "output").read_text()


def _command(script: str, arguments: list[str], cwd: Path, setup: Setup) -> None:
    os.chdir(cwd)
    sys.stdout = sys.stderr = open("output", "a", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    GlobalHydra.instance().clear()
    os.environ.pop("RUN_STAMP", None)  # conftest's
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a shell's background job ignores it
    sys.argv = [str(ROOT / "scripts" / f"{script}.py"), *arguments]
    if setup is not None:
        setup()
    runpy.run_path(sys.argv[0], run_name="__main__")


def no_pictures() -> None:
    """Most of the time of so small a run goes into its pictures."""
    pictures.show = lambda *_: None


def at_batch(number: int, act: Callable[[Path], object]) -> None:
    """Calls `act(run folder)` before the so manieth group of batches that this process trains on, its teacher's counted too."""
    _after(number, act, "on_train_batch_start")


def after_epoch(number: int, act: Callable[[Path], object]) -> None:
    """The same at the end of an epoch, before its checkpoint."""
    _after(number, act, "on_train_epoch_end")


def at_hook(hook: str, number: int, act: Callable[[Path], object]) -> None:
    """The same at another hook of a callback."""
    _after(number, act, hook)


def _after(number: int, act: Callable[[Path], object], hook: str) -> None:
    no_pictures()
    count = 0

    def called(callback: Callback, trainer: Trainer, *_: object) -> None:
        nonlocal count
        count += 1
        if count == number:
            act(Path(trainer.default_root_dir))

    setattr(EpochLogger, hook, called)


def as_rank(rank: int, port: int, setup: Setup = None) -> None:
    """Makes this process one of two ranks, as Lightning would have started it."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    here = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in here.items()}, RUN_STAMP="stamp")
    if rank:
        sys.argv += [f"hydra.job.name=train_ddp_process_{rank}", "hydra.output_subdir=null"]
    (setup or no_pictures)()


# -- points to be killed at ------------------------------------------------------------------------------------------


def at_changes(act: Callable[[int, str, tuple], None]) -> None:
    """Calls `act(number, event, arguments)` before each change of this process to the files in the working directory.

    Python tells its audit hooks of each: what is opened to be written, moved, deleted, made.
    """
    home, count, busy = os.getcwd(), 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, busy
        if busy or not _changes(event, arguments, home):
            return
        busy = True
        count += 1
        act(count, event, arguments)
        busy = False

    sys.addaudithook(hook)


def _changes(event: str, arguments: tuple, home: str) -> bool:
    """Whether this changes more than the length of a log."""
    if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or isinstance(arguments[0], int):
        return False
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if event == "open" and (not arguments[2] & (os.O_WRONLY | os.O_RDWR) or arguments[2] & os.O_APPEND):
        return False
    needless = (event == "os.mkdir" and os.path.isdir(path)) or (event == "os.remove" and not os.path.exists(path))
    return path.startswith(home) and not needless


def note_changes(into: Path) -> None:
    """Writes a line for each change."""
    no_pictures()

    def note(number: int, event: str, arguments: tuple) -> None:
        with into.open("a") as file:
            file.write(f"{event} {os.fsdecode(arguments[0])}\n")

    at_changes(note)


def killed_at_change(number: int) -> None:
    """Kills the process in the middle of its so manieth change: a file that was to be written is there, and empty."""
    no_pictures()

    def kill(count: int, event: str, arguments: tuple) -> None:
        if count < number:
            return
        if event == "open":
            path, _, flags = arguments
            os.open(path, flags, 0o666)
        os.kill(os.getpid(), signal.SIGKILL)

    at_changes(kill)


# -- what is left ----------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every number that a run ends with: the weights of its best and its last epoch, its optimiser, its teacher."""
    found: dict[str, torch.Tensor] = {}
    for name in ("best", "last"):
        saved = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        found |= {f"{name} {k}": v for k, v in saved["state_dict"].items()}
        for i, state in saved["optimizer_states"][0]["state"].items():
            found |= {f"{name} {i} {k}": torch.as_tensor(v) for k, v in state.items()}
        found[f"{name} steps"] = torch.tensor([saved["global_step"], saved["epoch"]])
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finished(cwd: Path, name: str = "one") -> list[Path]:
    """The folders of the finished runs below `cwd/runs/<name>`."""
    return sorted(p.parent for p in cwd.glob(f"runs/{name}/**/summary.json"))
