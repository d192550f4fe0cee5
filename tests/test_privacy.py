"""Membership inference by the loss: against scikit-learn, and on networks that do and do not remember their samples."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from litdistill.evaluation.privacy import losses, membership
from litdistill.report.blocks import Table
from litdistill.report.membership import privacy
from litdistill.report.sections import looks
from tests.pages import group


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


def test_the_page_says_of_each_model_what_it_betrays(tmp_path):
    found = group(rows=2, seeds=2, name="distilled")
    section = privacy(found, "")
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    areas = [statistics.mean([seed.membership.auc for seed in row.seeds]) for row in found.rows]
    assert [row[0] for row in table.rows] == [style.name for style in looks(found)]
    assert [float(row[1].split(" ")[0]) for row in table.rows] == pytest.approx(areas, abs=5e-4)
    assert table.rows[0][2:] == ["1.20 %", "500", "60"]
    for seed in found.rows[1].seeds:
        seed.membership = None
    (table,) = [block for block in privacy(found, "").blocks if isinstance(block, Table)]
    assert len(table.rows) == 2  # a model whose samples have no ids is left out
