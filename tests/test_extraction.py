"""Extraction: what is answered, what it is worth, and a thief's run of an exported student."""

import json

import numpy as np
import pytest
import torch

from litdistill.benchmarks import extraction
from litdistill.benchmarks.extraction import FORMS, LABELS, Victim, ask, copied, honest, job, write_answers
from litdistill.benchmarks.shadows import Choices, train_runs
from litdistill.distillation.outputs_tables import read_outputs
from litdistill.evaluation.evaluate import rebuild
from litdistill.evaluation.predictions import predict_split
from tests.test_privacy import TINY

ALL, ROUNDED, CLASS = FORMS


def test_answers_are_probabilities_these_rounded_or_the_class_alone():
    p = torch.tensor([[0.6049, 0.3951, 0.0], [0.004, 0.5, 0.496]], dtype=torch.float64)
    assert torch.equal(FORMS[ALL](p), p)
    torch.testing.assert_close(FORMS[ROUNDED](p), torch.tensor([[0.6, 0.4, 0], [0, 0.5, 0.5]], dtype=torch.float64))
    assert FORMS[CLASS](p).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_a_class_alone_costs_the_honest_user_what_its_closed_forms_say(tmp_path):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(400, 5, generator=generator, dtype=torch.float64).softmax(1)
    targets = torch.multinomial(p, 1, generator=generator)[:, 0]  # calibrated
    victim = Victim(tmp_path, [], torch.arange(0), p, p, targets)
    wrong = 1 - (p.argmax(1) == targets).double().mean().item()
    found = {form: honest(victim, form) for form in FORMS}
    assert found[CLASS]["ece"] == pytest.approx(wrong, abs=1e-6)  # certain of all, right of some
    assert found[CLASS]["brier"] == pytest.approx(2 * wrong, abs=1e-9)
    assert found[ALL]["brier"] == pytest.approx(
        (p - torch.nn.functional.one_hot(targets, 5)).square().sum(1).mean().item()
    )
    assert found[ALL]["ece"] < found[CLASS]["ece"]
    assert found[ROUNDED]["brier"] == pytest.approx(found[ALL]["brier"], abs=0.01)
    assert found[CLASS]["accuracy"] == found[ALL]["accuracy"] == 1 - wrong


def test_a_thief_learns_from_the_exported_file_alone(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    choices = Choices(runs=str(tmp_path), jobs=1, seeds=1, overrides=TINY)
    monkeypatch.setattr(extraction, "BUDGETS", (0.1,))
    monkeypatch.setattr(extraction, "train_runs", lambda choices, kinds, halves: {kinds[0]: _plain(choices, halves)})
    victim = ask(*_plain(choices, range(1)))
    data, distiller = rebuild(victim.file.parents[1])
    there = predict_split(distiller.deployed_student, data, "test", "cpu", distiller.task)[0].logits.double().softmax(1)
    torch.testing.assert_close(victim.test, there, atol=1e-5, rtol=0)
    write_answers(victim, ROUNDED, tmp_path / "answers.npz")
    table = read_outputs(tmp_path / "answers.npz").tables["train"]["logits"]
    assert table.kind == "probabilities"
    np.testing.assert_allclose(table.values.numpy(), victim.train.round(decimals=2).numpy())
    assert table.ids.tolist() == victim.ids.tolist()
    found = extraction.record(choices)
    assert set(found["copies"]) == {*FORMS, LABELS}
    for form, cells in found["copies"].items():
        ((images, cell),) = cells.items()
        assert 100 < int(images) < 130
        assert all(0 <= cell[key][0] <= 1 for key in ("accuracy", "agreement")), form
    summaries = [json.loads(p.read_text()) for p in tmp_path.glob("compare/copy-of-*/*/summary.json")]
    assert sorted(s["teacher"] is None for s in summaries) == [False, False, False, True]
    assert sum(s["method"] == "kd" for s in summaries) == 3


def test_a_copy_is_judged_by_its_last_weights(tmp_path):
    (folder,) = _plain(Choices(runs=str(tmp_path), jobs=1, overrides=TINY), range(1))
    logits, images = copied(folder)
    summary = json.loads((folder / "summary.json").read_text())
    data, _ = rebuild(folder)
    targets = torch.cat([batch.targets for batch in data.batches("test")])
    last = summary["student"]["test"]["accuracy"]["last"]
    assert (logits.argmax(1) == targets).double().mean().item() == pytest.approx(last, abs=1e-9)
    assert images == summary["data"]["train"]
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in kept["state_dict"].items():
        if name.startswith("student.") and value.shape[:1] == (10,):  # the classifier's
            value.zero_()
    torch.save(
        kept, folder / "checkpoints" / "last.ckpt"
    )  # other weights than the best, which are those of the same epoch
    assert not copied(folder)[0].any()


def test_a_thief_reads_no_label():
    overrides = job(Choices(), CLASS, 0.1, 2, extraction.Path("x.npz")).overrides
    assert {"method.hard=0", "teacher.outputs=x.npz", "data.subset_seed=1002"} <= set(overrides)
    odd = job(Choices(runs="a b"), CLASS, 0.1, 2, extraction.Path("t=1, [x].npz")).overrides
    assert {"runs='a b'", "teacher.outputs='t=1, [x].npz'"} <= set(odd)
    assert "teacher=null" in job(Choices(), LABELS, 0.1, 2, None).overrides


def _plain(choices, halves):
    return train_runs(choices, ["student alone"], halves)["student alone"]
