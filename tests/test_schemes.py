"""The schemes of conf/experiment/schemes in short runs: each trains the networks it speaks of, from one another.

pytest -m zoo tests/test_schemes.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from litdistill.config.build import build_data, build_net
from litdistill.config.recipes import teacher_config
from litdistill.data.sources import Split
from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.evaluation.summary import method_name
from litdistill.models.preprocess import bare
from litdistill.training import train as train_module
from litdistill.utils.paths import CONF
from tests.conftest import compose_config
from tests.test_zoo import equal, run, weights

pytestmark = pytest.mark.zoo

SHORT = [
    "trainer=cpu",
    "trainer.max_epochs=3",
    "data.epoch_size=256",
    "optimizer.lr=3e-3",
    "trainer.log_every_n_steps=8",
]
SMALL_TEACHER = "teacher.widths=[16,24,32]"


def scheme(folder: Path, name: str, *overrides: str, callbacks: Sequence[Callback] = ()) -> tuple[Path, dict[str, Any]]:
    """Runs it in folder/run, with folder/teachers for what it trains before; the run and its summary."""
    finished = run(compose_config(folder / "run", f"experiment=schemes/{name}", *SHORT, *overrides), *callbacks)
    return finished, load_run(finished)[1]


def trained_before(folder: Path) -> list[dict[str, Any]]:
    """The summaries of the teachers in the order in which they were finished."""
    paths = sorted((folder / "teachers").glob("*/summary.json"), key=lambda p: p.stat().st_mtime_ns)
    return [json.loads(p.read_text()) for p in paths]


def test_every_scheme_is_tested():
    names = {p.stem for p in (CONF / "experiment" / "schemes").glob("*.yaml")}
    assert {f"test_{name}" for name in names} <= globals().keys()


def test_self(tmp_path):
    folder, last = scheme(tmp_path, "self")
    first, second = trained_before(tmp_path)
    assert [s["method"] for s in (first, second, last)] == ["supervised", "kd", "kd"]
    assert first["teacher"] is None
    assert second["teacher"]["sha256"] == first["student"]["sha256"]
    assert last["teacher"]["sha256"] == second["student"]["sha256"]
    assert len({s["student"]["name"] for s in (first, second, last)}) == 1
    assert len({s["seed"] for s in (first, second, last)}) == 3  # or all would begin as the same network
    assert differences(evaluate(folder, device="cpu"), last) == []


def test_a_chain_of_three_generations_ends_with_labels(tmp_path):
    cfg, chain = compose_config(tmp_path / "run", "experiment=schemes/self", "teacher.generations=3"), []
    while cfg.teacher is not None:
        cfg = teacher_config(cfg)
        chain.append((cfg.seed, method_name(cfg), list(cfg.student.widths)))
    widths = list(compose_config(tmp_path / "run", "net@student=conv4").student.widths)
    assert chain == [(100, "kd", widths), (101, "kd", widths), (102, "supervised", widths)]


def test_assistant(tmp_path):
    folder, student = scheme(tmp_path, "assistant", "teacher.recipe.teacher.widths=[32,64,64]")
    teacher, assistant = trained_before(tmp_path)
    assert [s["method"] for s in (teacher, assistant, student)] == ["supervised", "kd", "kd"]
    assert teacher["teacher"] is None
    assert assistant["teacher"]["sha256"] == teacher["student"]["sha256"]
    assert student["teacher"]["sha256"] == assistant["student"]["sha256"]
    assert teacher["student"]["params"] > assistant["student"]["params"] > student["student"]["params"]
    assert differences(evaluate(folder, device="cpu"), student) == []


def test_patient(tmp_path):
    folder, student = scheme(tmp_path, "patient")
    (teacher,) = trained_before(tmp_path)
    assert (teacher["method"], student["method"]) == ("supervised", "kd")
    assert student["teacher"]["sha256"] == teacher["student"]["sha256"]
    assert differences(evaluate(folder, device="cpu"), student) == []


def test_ensemble(tmp_path):
    folder, student = scheme(tmp_path, "ensemble", SMALL_TEACHER)
    members = sorted((tmp_path / "teachers").glob("*/summary.json"))
    assert [s["seed"] for s in trained_before(tmp_path)] == [0, 1, 2]
    data, distiller = rebuild(folder)
    batch = next(data.batches("test"))
    logits = []
    for path in members:
        cfg, _ = load_run(path.parent)
        logits.append(build_net(cfg.student, data, "student", path.parent).eval()(batch.inputs).detach().double())
    assert not torch.allclose(logits[0], logits[1])
    assert distiller.teacher is not None
    taught = distiller.teacher(batch).logits
    assert torch.allclose(taught.double(), (logits[0] + logits[1] + logits[2]) / 3, atol=1e-5)
    assert student["teacher"]["params"] == 3 * load_run(members[0].parent)[1]["student"]["params"]
    assert differences(evaluate(folder, device="cpu"), student) == []


def test_parts(tmp_path):
    folder, student = scheme(tmp_path, "parts")
    members = student["teacher"]["members"]
    assert [m["classes"] for m in members] == [list("01234"), list("56789")]
    assert all(m["test"]["metrics"]["accuracy"] > m["test"]["chance"] for m in members)
    assert [s["data"]["classes"] for s in trained_before(tmp_path)] == [5, 5]
    assert differences(evaluate(folder, device="cpu"), student) == []


def test_sizes(tmp_path):
    folder, student = scheme(tmp_path, "sizes")
    assert [p["size"] for p in student["teacher"]["preprocess"]] == [[12, 12]]
    assert student["data"]["input_shape"] == [1, 8, 8]
    _, distiller = rebuild(folder)
    seen = []
    bare(distiller.student).register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[2:])))
    distiller.student(torch.zeros(1, 1, 8, 8))
    assert seen == [(5, 5)]
    assert differences(evaluate(folder, device="cpu"), student) == []


def test_mutual(tmp_path):
    folder, summary = scheme(tmp_path, "mutual")
    assert summary["teacher"] is None
    assert not (tmp_path / "teachers").exists()
    state = weights(folder)
    cohort = [part(state, f"student.{name}.") for name in ("student", "peers.0", "peers.1")]
    assert len({tuple(net) for net in cohort}) == 1
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(cohort[a]["fc.weight"], cohort[b]["fc.weight"])
    cfg, _ = load_run(folder)
    data, _ = build_data(cfg)
    for net in cohort:  # all of them have learned, from one another and from labels
        assert accuracy(cfg, data, net) > 0.3
    assert load_file(folder / "student.safetensors").keys() == cohort[0].keys()


class Averaged(Callback):
    """The running average of a student's weights, each batch's first weights in turn, in float64."""

    def __init__(self, decay: float):
        self.decay, self.average = decay, None

    def on_train_batch_start(self, trainer, module, *_):
        now = {k: v.detach().double().clone() for k, v in module.student.student.named_parameters()}
        before = self.average or now
        self.average = {k: self.decay * before[k] + (1 - self.decay) * now[k] for k in now}


def test_online(tmp_path):
    watch = Averaged(0.9)
    folder, summary = scheme(tmp_path, "online", "method.decay=0.9", callbacks=[watch])
    assert summary["teacher"] is None
    assert not (tmp_path / "teachers").exists()
    state = weights(folder)
    student, average = part(state, "student.student."), part(state, "student.average.")
    assert student.keys() == average.keys() == load_file(folder / "student.safetensors").keys()
    for name, expected in watch.average.items():
        assert torch.allclose(average[name].double(), expected, atol=1e-5)
        assert not torch.allclose(student[name], average[name])


@pytest.mark.parametrize("method", ["feature_only", "kd"])
def test_feature_only(tmp_path, monkeypatch, method):
    """Without the right labels it ends with the same weights to the bit; a method that reads labels does not."""
    run_with = (SMALL_TEACHER, f"method={method}")
    right, summary = scheme(tmp_path, "feature_only", *run_with)
    build = train_module.build_data

    def with_wrong_labels(cfg):
        data, task = build(cfg)
        images, targets = data.source.train
        wrong = targets.clone()
        wrong[data.train_ids] = targets[data.train_ids[torch.randperm(len(data.train_ids))]]
        data._source = data.source._replace(train=Split(images, wrong))
        return data, task

    monkeypatch.setattr(train_module, "build_data", with_wrong_labels)
    cfg = compose_config(tmp_path / "wrong", "experiment=schemes/feature_only", *SHORT, *run_with)
    wrong = run(cfg)
    assert len(trained_before(tmp_path)) == 1
    assert equal(weights(right), weights(wrong)) == (method == "feature_only")
    if method == "feature_only":
        assert equal(load_file(right / "student.safetensors"), load_file(wrong / "student.safetensors"))
        assert summary["student"]["test"]["accuracy"]["last"] > 0.3
        teacher = load_file(next((tmp_path / "teachers").glob("*/student.safetensors")))
        assert torch.equal(load_file(wrong / "student.safetensors")["classifier.weight"], teacher["fc.weight"])


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def accuracy(cfg, data, state: dict[str, Tensor]) -> float:
    net = build_net(cfg.student, data, "student").eval()
    net.load_state_dict(state)
    hits = [(net(b.inputs).argmax(1) == b.targets).float() for b in data.batches("test")]
    return torch.cat(hits).mean().item()


def test_backbone(tmp_path):
    short = ["net@teacher=conv4", SMALL_TEACHER, "teacher.preprocess.size=12", "student.recipe.trainer.max_epochs=2"]
    folder, student = scheme(tmp_path, "backbone", *short)
    (path,) = (tmp_path / "students").glob("*/summary.json")
    first = json.loads(path.read_text())
    assert (first["task"], first["method"], first["metric"]["name"]) == ("Embedding", "cosine", "spearman")
    assert first["data"]["train"] > student["data"]["train"] == 100
    assert student["start"]["run"] == path.parent.name
    assert student["method"] == "supervised"
    assert differences(evaluate(folder, device="cpu"), student) == []
