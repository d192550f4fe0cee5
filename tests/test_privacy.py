"""Membership inference by the loss and with shadow runs: against scikit-learn and scipy, and on networks that remember."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from litdistill.benchmarks.shadows import (
    DISTILLED,
    KINDS,
    PLAIN,
    TEACHER,
    Choices,
    Scores,
    attack,
    job,
    scores,
    train_runs,
)
from litdistill.evaluation.privacy import likelihood_ratio, log_odds, losses, membership
from tests.composed import composed


@settings(max_examples=30, deadline=None)
@given(st.integers(100, 400), st.integers(100, 400), st.floats(0, 2), st.integers(0, 1000), st.booleans())
def test_area_and_true_positives_are_scikit_learns(members, others, shift, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(members, generator=generator) - shift, torch.randn(others, generator=generator)
    if ties:
        a, b = a.round(decimals=1), b.round(decimals=1)
    found = membership(a, b)
    labels = [1] * members + [0] * others
    scores = (-torch.cat([a, b])).tolist()
    assert found.auc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert found.found == pytest.approx(max(true[false <= 0.01 + 1e-12]), abs=1e-12)


def test_few_samples_have_an_area_alone():
    found = membership(torch.zeros(99), torch.ones(500))
    assert (found.auc, found.found) == (1.0, None)
    assert membership(torch.zeros(200), torch.zeros(200)).auc == 0.5
    assert membership(torch.zeros(200), torch.zeros(200)).found == 0.0


def test_a_network_that_learned_its_samples_by_heart_betrays_them_and_a_new_one_does_not():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(400, 64, generator=generator), torch.randint(10, (400,), generator=generator)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    attack = lambda: membership(*losses(net(inputs), targets).detach().split(200))  # noqa: E731
    assert attack().auc == pytest.approx(0.5, abs=0.1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs[:200]), targets[:200]).backward()
        optimizer.step()
    found = attack()
    assert found.auc > 0.95
    assert found.found is not None
    assert found.found > 0.5


def test_log_odds_are_those_of_the_label_in_float64_and_stay_exact_for_a_confident_network():
    logits, targets = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    p = logits.double().softmax(1).gather(1, targets[:, None])[:, 0].numpy()
    np.testing.assert_allclose(log_odds(logits, targets).numpy(), scipy.special.logit(p), rtol=1e-10)
    sure = torch.tensor([[100.0, 0.0, 0.0]])
    assert log_odds(sure, torch.tensor([0])).item() == pytest.approx(100 - np.log(2), rel=1e-12)
    assert log_odds(sure.requires_grad_(), torch.tensor([1])).item() == pytest.approx(-100, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 16), st.integers(5, 40), st.integers(0, 1000))
def test_the_likelihood_ratio_is_scipys_sample_by_sample(count, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    shadows = 3 * torch.randn(count, samples, generator=generator)
    trained = torch.rand(count, samples, generator=generator) < 0.5
    trained[:2, 0], trained[2:4, 0] = True, False
    scores = torch.randn(samples, generator=generator)
    found = likelihood_ratio(scores, shadows, trained).numpy()
    x, y, s = shadows.double().numpy(), trained.numpy(), scores.double().numpy()
    known = [i for i in range(samples) if 2 <= y[:, i].sum() <= count - 2]
    expected = np.full(samples, np.nan)
    deviations = []
    for side in (True, False):
        residuals = np.concatenate([x[y[:, i] == side, i] - x[y[:, i] == side, i].mean() for i in known])
        free = sum((y[:, i] == side).sum() - 1 for i in known)
        deviations.append(np.sqrt((residuals**2).sum() / free))
    for i in known:
        means = [x[y[:, i] == side, i].mean() for side in (True, False)]
        one, other = (scipy.stats.norm.logpdf(s[i], m, d) for m, d in zip(means, deviations, strict=True))
        expected[i] = one - other
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


def test_shadow_runs_find_what_the_difficulty_of_samples_hides_and_as_much_as_the_best_test_can():
    generator = torch.Generator().manual_seed(0)
    runs, samples, gap = 129, 2000, 1.5
    difficulty = 20 * torch.randn(samples, generator=generator)  # far wider than what membership adds
    trained = torch.rand(runs, samples, generator=generator) < 0.5
    odds = difficulty + gap * trained + torch.randn(runs, samples, generator=generator)
    found = attack([Scores(o, -o, t, 0.9) for o, t in zip(odds[:65], trained[:65], strict=True)])
    best = scipy.stats.norm.cdf(gap / 2**0.5)  # of two normal distributions whose means are `gap` apart
    assert statistics.mean(one.auc for one in found["shadows"]) == pytest.approx(best, abs=0.01)
    assert statistics.mean(one.auc for one in found["threshold"]) == pytest.approx(0.52, abs=0.02)
    power = scipy.stats.norm.sf(scipy.stats.norm.isf(0.01) - gap)
    assert statistics.mean(one.found for one in found["shadows"]) == pytest.approx(power, abs=0.03)
    nothing = attack([Scores(o - gap * t, gap * t - o, t, 0.9) for o, t in zip(odds[:17], trained[:17], strict=True)])
    assert statistics.mean(one.auc for one in nothing["shadows"]) == pytest.approx(0.5, abs=0.01)


def test_a_run_is_no_shadow_of_itself():
    generator = torch.Generator().manual_seed(1)
    trained = torch.rand(9, 400, generator=generator) < 0.5
    odds = torch.randn(9, 400, generator=generator)
    runs = [Scores(o, -o, t, 0.9) for o, t in zip(odds, trained, strict=True)]
    first = attack(runs)["shadows"][0]
    ratio = likelihood_ratio(odds[0], odds[1:], trained[1:])
    known = ~ratio.isnan()
    assert first == membership(-ratio[known & trained[0]], -ratio[known & ~trained[0]])
    assert first.auc < 0.6  # with itself among the shadows it would give its samples away


TINY = (
    *("net@student=conv4", "student.widths=[8,8,8]", "trainer.max_epochs=1", "data.epoch_size=1024"),
    *("data.val_size=0.1", "optimizer.lr=1.0e-2"),
)


def test_runs_are_ordinary_ones_on_known_halves_with_teachers_of_the_same_half(tmp_path, monkeypatch):
    choices = Choices(runs=str(tmp_path), jobs=1, overrides=TINY)
    kinds = [TEACHER, PLAIN, DISTILLED]
    monkeypatch.setitem(KINDS, TEACHER, ("scratch", ["teacher=null"]))
    monkeypatch.setitem(KINDS, DISTILLED, ("distilled", ["teacher.widths=[8,8,8]"]))
    folders = train_runs(choices, kinds, range(2))
    found = {kind: [scores(folder) for folder in folders[kind]] for kind in kinds}
    for half in range(2):
        sides = [found[kind][half].trained for kind in kinds]
        assert all(torch.equal(side, sides[0]) for side in sides)
        assert sides[0].double().mean() == pytest.approx(0.5, abs=0.01)
        summary = json.loads((folders[DISTILLED][half] / "summary.json").read_text())
        teacher = json.loads((folders[TEACHER][half] / "summary.json").read_text())
        assert summary["teacher"]["sha256"] == teacher["student"]["sha256"]
        assert found[PLAIN][half].accuracy == pytest.approx(
            json.loads((folders[PLAIN][half] / "summary.json").read_text())["student"]["test"]["accuracy"]["best"]
        )
    assert not torch.equal(found[PLAIN][0].trained, found[PLAIN][1].trained)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    assert train_runs(choices, kinds, range(2)) == folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")} == before  # nothing is repeated


def test_each_run_composes():
    odd = job(Choices(runs="a b=[c],d"), DISTILLED, 3, Path("t=1, [x]")).overrides
    cfg = composed("train", [*odd, "folder=''"])
    assert (cfg.runs, cfg.teacher.checkpoint) == ("a b=[c],d", "t=1, [x]")
    for kind in KINDS:
        cfg = composed("train", [*job(Choices(), kind, 3, Path("x")).overrides[:-1], "folder=''"])
        assert (cfg.data.fraction, cfg.data.subset_seed, cfg.data.per_class) == (0.5, 3, None)
        assert (cfg.teacher is None) == (kind in (TEACHER, PLAIN))
