"""Uncertainty weights: Kendall's optimum by another way, running means by hand, the same however a run is divided."""

import logging

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from litdistill.config.recipes import recipe_hash
from litdistill.config.schema import check
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.distillation.uncertainty import Uncertainty
from litdistill.methods.ab import AB
from litdistill.methods.at import AT
from litdistill.methods.fitnet import FitNet
from litdistill.methods.ft import FT
from litdistill.methods.kd import KD
from litdistill.methods.simkd import SimKD
from litdistill.methods.sum import Sum
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, fit, grouped, net, same
from tests.test_balance import Factors, Linear, SaveAt, run


def values(*pairs):
    """Minibatches of a labels' loss and a hint as scalars."""
    return [tuple(torch.tensor(v, dtype=torch.float64) for v in pair) for pair in pairs]


def follow(rule, pairs):
    """Has a rule see minibatches in order, the first ones as a training does."""
    for hard, hint in pairs:
        if rule.finished:
            rule.follow({"hard": hard}, {"hint": hint})
        else:
            rule.measure({"hard": hard}, {"hint": hint}, [], [])
    return float(rule.factors["hint"])


def test_weights_are_those_of_kendalls_optimum():
    """Of the sum of L / 2σ² + log σ over the terms, minimized by Newton's method over the logarithms of the variances."""
    losses = torch.tensor([0.7, 130.0, 0.02], dtype=torch.float64)
    logs = torch.zeros(3, dtype=torch.float64)
    for _ in range(200):
        slope, curvature = 0.5 - 0.5 * losses * (-logs).exp(), 0.5 * losses * (-logs).exp()
        logs -= (slope / curvature).clamp(-1, 1)
    weights = (-logs).exp() / 2
    rule = Uncertainty()
    rule.measure({"hard": losses[0]}, {"a": losses[1], "b": losses[2]}, [], [])
    found = [float(rule.factors[name]) for name in "ab"]
    assert found == pytest.approx((weights[1:] / weights[0]).tolist(), rel=1e-12)


def test_the_gradient_is_that_of_the_logarithms_times_the_labels_loss():
    """At the optimum the objective is half the sum of the terms' logarithms, and a constant."""
    model, rule = Linear(), Uncertainty()
    labels, terms, heads, parameters = model.minibatch(torch.randn(4, dtype=torch.float64))
    terms = {"hint": terms["hint"]}
    rule.measure(labels, terms, heads, parameters)
    found = torch.autograd.grad(labels["hard"] + rule.factors["hint"] * terms["hint"], parameters, retain_graph=True)
    logs = torch.autograd.grad(labels["hard"].log() + terms["hint"].log(), parameters)
    for one, other in zip(found, logs, strict=True):
        torch.testing.assert_close(one, other * labels["hard"].detach(), rtol=1e-12, atol=0)


def test_the_gradient_that_a_hint_begins_with_is_said():
    model, rule, x = Linear(), Uncertainty(), torch.randn(4, dtype=torch.float64)
    labels, terms, heads, parameters = model.minibatch(x)
    rule.measure(labels, {"hint": terms["hint"]}, heads, parameters, scale=1024.0)
    whole, hint = model.norms(x, 0)
    share = float(rule.factors["hint"] * hint / whole)
    assert rule.found()["hint"]["gradient"] == pytest.approx(share)
    assert f"with a gradient {share:.3g} times that of the other terms" in str(rule)
    rule.begin({"hint": 1.0}, labels, terms, torch.tensor([torch.inf, torch.inf]), None)
    assert rule.found()["hint"]["gradient"] == 0  # of an overflow nothing is known


def test_a_factor_is_the_ratio_of_running_means():
    pairs = values((2.0, 8.0), (1.0, 4.0), (3.0, 0.5))
    rule = Uncertainty(0.5, decay=0.75)
    assert follow(rule, pairs[:1]) == 0.5 * 2 / 8
    assert rule.found() == {"hint": {"factor": 0.125, "first": 0.125, "gradient": 0.0, "ratio": 0.5}}
    hard, hint = 0.75 * (0.75 * 2 + 0.25) + 0.25 * 3, 0.75 * (0.75 * 8 + 0.25 * 4) + 0.25 * 0.5
    assert follow(rule, pairs[1:]) == pytest.approx(0.5 * hard / hint, rel=1e-12)
    assert rule.found()["hint"]["first"] == 0.125


def test_values_that_are_no_loss_leave_the_means():
    """0 is that of a minibatch without labels; a likelihood may be negative; an overflow is neither."""
    kept = follow(Uncertainty(), values((2.0, 8.0), (1.0, 4.0)))
    for odd in (0.0, -3.0, float("nan"), float("inf")):
        assert follow(Uncertainty(), values((2.0, 8.0), (odd, odd), (1.0, 4.0))) == kept
    falls = [(1.0, 1 - i / 50) for i in range(100)]  # a hint that ends below 0: its factor never changes its sign
    assert 0 < follow(Uncertainty(decay=0.9), values(*falls)) < 10


def test_before_a_label_a_hint_waits_and_without_a_value_it_keeps_its_weight():
    rule = Uncertainty()
    assert follow(rule, values((0.0, 8.0))) == 0
    assert not rule.finished
    assert follow(rule, values((2.0, 8.0))) == 0.25
    assert rule.finished
    assert follow(Uncertainty(), values((2.0, -8.0))) == 1


def test_logits_count_as_labels_do_and_terms_can_be_named():
    model = Linear()
    labels, terms, heads, parameters = model.minibatch(torch.full((4,), 0.5, dtype=torch.float64))
    hard, hint, soft = (float(v.detach()) for v in (labels["hard"], terms["hint"], terms["soft"].abs()))
    terms["soft"] = terms["soft"].abs()
    rule = Uncertainty()
    rule.measure(labels, terms, heads, parameters)
    assert {k: float(v) for k, v in rule.factors.items()} == {"hint": pytest.approx((hard + soft) / hint)}
    named = Uncertainty(terms={"soft": 3.0, "hint": None})
    named.measure(labels, terms, heads, parameters)
    assert {k: float(v) for k, v in named.factors.items()} == {"soft": pytest.approx(3 * (hard + hint) / soft)}
    own = Uncertainty()
    own.measure(labels, terms, heads, parameters, own={"hint"})
    assert (own.factors, own.finished) == ({}, True)


def test_what_has_no_sense_is_refused():
    with pytest.raises(UserError, match="decay=1 must be at least 0 and below 1"):
        Uncertainty(decay=1)
    with pytest.raises(UserError, match="ratio=-1 must be 0 or more"):
        Uncertainty(-1)
    with pytest.raises(UserError, match=r"balance.terms names hnt; the terms of this method are hint"):
        follow(Uncertainty(terms={"hnt": 1.0}), values((1.0, 1.0)))


# -- in training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("step", [2, 6])
def test_a_run_goes_on_to_the_bit(tmp_path, group, step):
    whole, _ = run(tmp_path / "a", group=group, balance=Uncertainty(), callbacks=[SaveAt(tmp_path, step)])
    resumed, trainer = run(tmp_path / "b", group=group, balance=Uncertainty(), ckpt=tmp_path / "at.ckpt")
    assert trainer.global_step == 16
    assert resumed.balance.state_dict() == whole.balance.state_dict()
    assert same(whole.student, resumed.student)


def test_a_run_that_goes_on_in_its_first_phase_is_balanced_in_the_second(tmp_path):
    whole, _ = run(tmp_path / "a", FT(init_epochs=1), balance=Uncertainty(), callbacks=[SaveAt(tmp_path, 2)])
    resumed, _ = run(tmp_path / "b", FT(init_epochs=1), balance=Uncertainty(), ckpt=tmp_path / "at.ckpt")
    assert list(resumed.balance.found()) == ["hint"]
    assert resumed.balance.state_dict() == whole.balance.state_dict()
    assert same(whole.student, resumed.student)


def test_groups_and_single_steps_are_the_same_to_the_bit(tmp_path):
    one, trainer = run(tmp_path / "0", balance=Uncertainty(), ema=0.9)
    many, _ = run(tmp_path / "4", group=4, balance=Uncertainty(), ema=0.9)
    assert one.balance.found() == many.balance.found()
    assert same(one, many)
    assert trainer.callback_metrics["balance/hint"] == pytest.approx(one.balance.found()["hint"]["factor"])


def test_the_hint_counts_as_much_as_the_labels_from_the_first_step_to_the_last(tmp_path):
    def shares(folder, **options):
        found = run(tmp_path / folder, **options)[1].callback_metrics
        return float(found["train/hint"] / found["train/hard"])

    assert shares("a", balance=Uncertainty(), max_steps=1) == pytest.approx(1)
    assert 0.5 < shares("b", balance=Uncertainty(decay=0.5)) < 2
    assert shares("c", max_steps=1) > 10  # the published weight


def test_the_default_weight_has_no_effect_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "litdistill"):
        distiller, _ = run(tmp_path / "a", balance=Uncertainty())
    first = distiller.balance.first["hint"]
    assert f"Uncertainty weights begin with hint by {first:.3g}" in caplog.text
    named = Uncertainty(terms={"hint": 1.0})
    light, _ = run(tmp_path / "b", AT(hint=1.0), balance=named)
    heavy, _ = run(tmp_path / "c", AT(hint=1024.0), balance=Uncertainty(terms={"hint": 1.0}))
    assert same(light.student, heavy.student)  # a power of two: no rounding
    kept, _ = run(tmp_path / "d", AT(hint=5.0), balance=Uncertainty())
    assert same(kept.student, run(tmp_path / "e", AT(hint=5.0))[0].student)


def test_each_hint_of_a_sum_follows_its_own_values(tmp_path):
    sum_of = Sum({"kd": KD(), "at": AT(hard=0), "fitnet": FitNet(hard=0)})
    distiller, _ = run(tmp_path, sum_of, balance=Uncertainty())
    factors = {name: figures["factor"] for name, figures in distiller.balance.found().items()}
    assert factors.keys() == {"at_hint", "fitnet_hint"}
    assert factors["at_hint"] != factors["fitnet_hint"]


def test_a_warm_up_multiplies_the_factor(tmp_path):
    warm, _ = run(tmp_path / "a", balance=Uncertainty(), max_steps=1, schedule={"hint": [(1, 0.5), (2, 1)]})
    half, _ = run(tmp_path / "b", balance=Uncertainty(0.5), max_steps=1)
    assert same(half.student, warm.student)


def test_samples_without_labels_are_waited_for(tmp_path):
    data = digits(per_class=8, batch_size=10)
    data.train_targets[data.train_ids[8:]] = -1
    distiller, _ = run(tmp_path, balance=Uncertainty(), data=data, labels="some")
    assert distiller.balance.finished
    assert 0 < distiller.balance.found()["hint"]["factor"] < 1


def test_methods_in_two_phases_and_without_another_loss(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "litdistill"):
        alone, _ = run(tmp_path / "a", SimKD(), balance=Uncertainty())
    assert "no hint stands beside another loss" in caplog.text
    assert same(alone.student, run(tmp_path / "b", SimKD())[0].student)
    ab, _ = run(tmp_path / "c", AB(init_epochs=1), balance=Uncertainty())
    assert same(ab.student, run(tmp_path / "d", AB(init_epochs=1))[0].student)
    ft, _ = run(tmp_path / "e", FT(init_epochs=1), balance=Uncertainty())
    assert list(ft.balance.found()) == ["hint"]


@pytest.mark.parametrize("group", [0, 4])
def test_the_cache_changes_nothing_to_the_bit(tmp_path, group):
    def train(mode):
        torch.manual_seed(0)
        data = digits(per_class=8, batch_size=10)
        distiller = Distiller(
            net(), AT(), net(12, seed=1), example(data), balance=Uncertainty(), allow_chance=True, seed=0, group=group,
            cache=CacheOptions(mode), data=data,
        )  # fmt: skip
        fit(distiller, grouped(data, group), tmp_path / mode)
        return distiller

    live, cached = train("off"), train("memory")
    assert cached.cache.requested == 160
    assert live.balance.state_dict() == cached.balance.state_dict()
    assert same(live.student, cached.student)


@pytest.mark.parametrize("group", [0, 2])
def test_two_processes_have_the_means_of_both(tmp_path, group):
    forked = DDPStrategy(start_method="fork")
    run(
        tmp_path, group=group, balance=Uncertainty(), devices=2, strategy=forked, callbacks=[Factors(tmp_path)],
        enable_checkpointing=False, max_epochs=1,
    )  # fmt: skip
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == other
    assert one["means"][0] > 0


def test_a_minibatch_counts_for_the_processes_that_have_labels():
    """The mean over processes is of those whose value is a loss."""
    hard, hint = values((3.0, 8.0))[0]
    rule = Uncertainty(decay=0)
    other = torch.tensor([[0, 4.0], [0, 1]])  # has no sample with a label
    rule.measure({"hard": hard}, {"hint": hint}, [], [], lambda sums: sums + other if sums.ndim == 2 else sums)
    assert rule.means.tolist() == [3, 6]


def test_a_config_names_it(tmp_path):
    cfg = compose_config(tmp_path / "one", "method=at", "balance=uncertainty", "balance.ratio=0.3")
    assert (cfg.balance.ratio, cfg.balance.decay) == (0.3, Uncertainty().decay)
    assert recipe_hash(cfg) != recipe_hash(compose_config(tmp_path / "one", "method=at", "balance.ratio=0.3"))
    with pytest.raises(UserError, match=r"balance.decay=1: a number of at least 0 and below 1"):
        check(compose_config(tmp_path / "one", "method=at", "balance=uncertainty", "balance.decay=1"))
    with pytest.raises(UserError, match=r"balance.steps is no option"):
        check(compose_config(tmp_path / "one", "method=at", "balance=uncertainty", "+balance.steps=3"))
