"""Shared by all tests: small runs in a temporary folder, on the bundled digits, in this process.

It imports no torch by itself: the process that gives tests to workers has no use for it, and they begin sooner.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from litdistill.config.origin import FOREIGN
from litdistill.utils.logging import filter_warnings
from tests.composed import composed

os.environ.setdefault("RUN_STAMP", "test")
# Which runs were made here is kept beside none of the user's own.
STATE = tempfile.TemporaryDirectory(prefix="litdistill-state-")
os.environ["LITDISTILL_STATE"] = STATE.name
filter_warnings()
# What another test has left is not collected in a process that is forked from this one: an onnxruntime session would wait
# there for threads that only this one has.
os.register_at_fork(after_in_child=gc.freeze)

# A run that takes a second: one that is enough for a property, not for an accuracy.
SMALL = [
    "data.per_class=12",
    "data.batch_size=32",
    "student.widths=[8,8]",
    "teacher.widths=[16,16]",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=2",
    "+teacher.recipe.trainer.max_epochs=3",
]


def compose_config(folder: Path, *overrides: str, root: str = "train") -> DictConfig:
    """The composed config of a command, its run in `folder`."""
    own = f"folder={folder}" if root == "train" else f"+folder={folder}"
    return composed(root, [f"runs={folder.parent}", own, *overrides])


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Ends what a command leaves in its process: `resume=` of a folder that was not made here, the cells of published tables,
    which Hydra copies each time that it composes, and a group of processes.

    Lightning keeps such a group until the process ends. What is forked then would take it for its own, and wait for good.
    """
    import torch

    yield
    for name in (FOREIGN, "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    ConfigStore.instance().repo.pop("experiment", None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_collectstart() -> None:
    """One thread in each process that runs tests: called for each file, of which the first imports torch."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the tests that may take minutes half an hour: pyproject.toml's limit is for all others."""
    for item in items:
        if any(item.get_closest_marker(name) for name in ("slow", "zoo", "network", "slurm")):
            item.add_marker(pytest.mark.timeout(1800))


def pytest_collection_finish() -> None:
    """Keeps all modules and the tests themselves out of each later collection of garbage: a million objects or more."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Gives back what was kept out, so that extensions that count their objects find none left at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def few_scenes() -> Iterator[None]:
    """Tests on 40 scenes of digits where a user has 500: in most runs these would take more time than the training."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("detection.scenes", "segmentation.data"):
            patch.setattr(f"litdistill.tasks.{module}.TESTED", 40)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_jobs() -> Iterator[None]:
    """Composes the runs of tables and comparisons by what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("litdistill.benchmarks.compare.compose", composed)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Leaves out the pictures of runs, which take two thirds of the time of so small a run: see `drawn`."""
    from litdistill.evaluation import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", undrawn(figures.show))
        yield


def undrawn(show: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(show)
    def nothing(*_: object) -> None: ...

    return nothing


@contextmanager
def drawing() -> Iterator[None]:
    """Draws the pictures of runs within, for a fixture of a module."""
    from litdistill.evaluation import figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "show", inspect.unwrap(figures.show))
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Draws the pictures of a test's runs."""
    with drawing():
        yield


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's runs keep their automatic teachers, so that each is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def small(teachers: Path, tmp_path: Path) -> Callable[..., DictConfig]:
    """`small(*overrides, name="a")`: the config of a small run in a folder of its own."""

    def make(*overrides: str, name: str = "run") -> DictConfig:
        cfg = compose_config(tmp_path / name, *SMALL, *overrides)
        cfg.runs = str(teachers)
        return cfg

    return make
