"""Hydra's record of a run, which each start writes anew: a resume that is refused leaves it as it was."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.forked import TINY, at_batch, call, finished, no_pictures

pytestmark = pytest.mark.process

ALONE = [*TINY, "method=supervised", "teacher=null"]


def hear(_: Path) -> None:
    signal.raise_signal(signal.SIGTERM)


def records(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in (folder / ".hydra").iterdir() if p.name in ("config.yaml", "overrides.yaml")}


def test_a_refused_resume_leaves_the_record_and_an_accepted_one_writes_it(tmp_path):
    assert call("train", ALONE, tmp_path, partial(at_batch, 3, hear))[0] == 143
    (folder,) = tmp_path.glob("runs/one/*")
    before = records(folder)
    for change in ("data.batch_size=16", "optimizer.lr=high", "net@student=nothing"):  # by us, by the schema, by Hydra
        status, printed = call("train", [f"resume={folder}", change], tmp_path, no_pictures)
        assert status == 2, printed
        assert records(folder) == before
    status, printed = call("train", [f"resume={folder}", "optimizer.lr=0.0001"], tmp_path, no_pictures)
    assert status == 0, printed
    assert OmegaConf.load(folder / ".hydra" / "config.yaml").optimizer.lr == 0.0001
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == 0.0001
    assert json.loads((folder / "summary.json").read_text())["options"]["train/lr"] == 0.0001
    after = records(folder)
    status, printed = call(
        "train", [f"resume={folder}", "trainer.max_epochs=9"], tmp_path, no_pictures
    )  # it is finished
    assert status == 2
    assert "is finished, and other options would change nothing in it: trainer.max_epochs was 3, and is 9" in printed
    assert records(folder) == after
    assert not (folder / ".hydra" / "before").exists()
    assert len(finished(tmp_path)) == 1


def test_a_start_that_a_finished_run_refuses_leaves_its_record(tmp_path):
    named = [*ALONE, "hydra.run.dir=runs/here"]
    assert call("train", named, tmp_path, no_pictures)[0] == 0
    folder = tmp_path / "runs" / "here"
    before = records(folder)
    for change in ("trainer.max_epochs=9", "optimizer.lr=high", "net@student=nothing"):
        status, printed = call("train", [*named, change], tmp_path, no_pictures)
        assert status == 2, printed
        assert records(folder) == before
    assert call("train", named, tmp_path, no_pictures)[0] == 0
    assert not (folder / ".hydra" / "before").exists()
    status, printed = call("evaluate", ["run=runs/here"], tmp_path)
    assert status == 0, printed
