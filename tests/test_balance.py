"""Weights that fit by themselves: gradients by hand, the same factors however a run is divided, no cost afterwards."""

import functools
import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import SGD

from litdistill.config.recipes import recipe, recipe_hash, teacher_config
from litdistill.distillation.balance import Balance
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.ab import AB
from litdistill.methods.at import AT
from litdistill.methods.dkd import DKD
from litdistill.methods.fitnet import FitNet
from litdistill.methods.ft import FT
from litdistill.methods.kd import KD
from litdistill.methods.pairs import Pair, Pairs
from litdistill.methods.pkd import PKD
from litdistill.methods.rkd import RKD
from litdistill.methods.shuffled import Shuffled
from litdistill.methods.simkd import SimKD
from litdistill.methods.srd import SRD
from litdistill.methods.sum import Sum
from litdistill.methods.supervised import Supervised
from litdistill.tasks.detection.fgd import FGD
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, fit, grouped, net, same


class Linear:
    """Features f = W x and logits V f of one sample, in float64: every gradient has a closed form."""

    def __init__(self):
        torch.manual_seed(0)
        draw = functools.partial(torch.randn, dtype=torch.float64)
        self.w, self.v = draw(3, 4).requires_grad_(), draw(2, 3).requires_grad_()
        self.parameters, self.target, self.hint = [self.w, self.v], draw(2), draw(3)

    def minibatch(self, x):
        f = self.w @ x
        logits = self.v @ f
        labels = {"hard": 0.5 * (logits - self.target).square().sum()}
        terms = {"hint": 50 * (f - self.hint).square().sum(), "soft": (3 * logits).sum()}
        return labels, terms, [logits], self.parameters

    def norms(self, x, soft):
        """Of the labels' gradient, with `soft` times that of the soft term, and of the hint's."""
        with torch.no_grad():
            f = self.w @ x
            at_logits = self.v @ f - self.target + soft * 3
            reference = torch.cat([torch.outer(self.v.T @ at_logits, x).flatten(), torch.outer(at_logits, f).flatten()])
            return reference.norm(), torch.outer(100 * (f - self.hint), x).norm()


def test_factors_are_those_of_gradients_by_hand():
    model, balance = Linear(), Balance(0.25, steps=2)
    xs = torch.randn(3, 4, dtype=torch.float64)
    for i, x in enumerate(xs[:2]):
        balance.measure(*model.minibatch(x))
        reference, hint = (sum(n) for n in zip(*(model.norms(x, 1) for x in xs[: i + 1]), strict=True))
        assert balance.factors == {"hint": pytest.approx(float(0.25 * reference / hint), rel=1e-12)}
    assert balance.finished
    assert balance.found()["hint"]["unbalanced"] == pytest.approx(float(hint / reference), rel=1e-12)


def test_the_balanced_gradient_has_the_ratio_that_was_asked_for():
    model, balance = Linear(), Balance(0.25, steps=1)
    labels, terms, logits, parameters = model.minibatch(torch.randn(4, dtype=torch.float64))
    balance.measure(labels, terms, logits, parameters)
    scaled = torch.autograd.grad(balance.factors["hint"] * terms["hint"], model.w, retain_graph=True)[0].norm()
    others = torch.autograd.grad(labels["hard"] + terms["soft"], parameters)
    assert scaled / torch.cat([g.flatten() for g in others]).norm() == pytest.approx(0.25)


def test_a_named_term_is_balanced_too_and_a_null_keeps_its_weight():
    model, balance, x = Linear(), Balance(0.25, {"soft": 2.0, "hint": None}, 1), torch.randn(4, dtype=torch.float64)
    balance.measure(*model.minibatch(x))
    assert list(balance.factors) == ["soft"]
    alone, named = Balance(0.25, {"soft": 2.0}, 1), model.minibatch(x)
    alone.measure(*named)
    reference, hint = model.norms(x, 0)  # of the labels alone
    assert alone.factors["hint"] == pytest.approx(float(0.25 * reference / hint))


def test_a_scaled_loss_gives_the_same_factors():
    model, x = Linear(), torch.randn(4, dtype=torch.float64)
    plain, scaled = Balance(steps=1), Balance(steps=1)
    plain.measure(*model.minibatch(x))
    scaled.measure(*model.minibatch(x), scale=1024.0)
    assert scaled.factors == plain.factors


def test_minibatches_without_a_label_or_with_an_overflow_do_not_count():
    model, balance = Linear(), Balance(steps=1)
    x = torch.randn(4, dtype=torch.float64)
    labels, terms, *rest = model.minibatch(x)
    none = {"hard": 0 * labels["hard"]}
    balance.measure(none, {"hint": terms["hint"]}, *rest)
    assert (balance.measured, balance.factors) == (0, {"hint": 0.0})
    balance.measure(labels, {"hint": terms["hint"] * float("inf")}, *rest)
    assert (balance.measured, balance.factors) == (0, {"hint": 0.0})
    balance.measure(labels, {"hint": terms["hint"]}, *rest)
    assert balance.finished
    assert balance.factors["hint"] > 0


def test_a_term_that_does_not_reach_the_student_keeps_its_weight():
    model, balance = Linear(), Balance(steps=1)
    labels, _, *rest = model.minibatch(torch.randn(4, dtype=torch.float64))
    balance.measure(labels, {"own": torch.ones((), dtype=torch.float64, requires_grad=True).square()}, *rest)
    assert balance.factors == {"own": 1.0}


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(UserError, match="ratio=-1 must be 0 or more"):
        Balance(-1)
    with pytest.raises(UserError, match="soft=nan must be 0 or more"):
        Balance(terms={"soft": float("nan")})
    with pytest.raises(UserError, match="steps=0 must be 1 or more"):
        Balance(steps=0)
    labels, terms, *rest = Linear().minibatch(torch.randn(4, dtype=torch.float64))
    with pytest.raises(UserError, match=r"balance.terms names hnt; the terms of this method are hint, soft"):
        Balance(terms={"hnt": 1.0}).measure(labels, terms, *rest)
    with pytest.raises(UserError, match="to what in proportion"):
        Balance(terms={"soft": 1.0}).measure({}, terms, *rest)


# -- in training --------------------------------------------------------------------------------------------------------


def run(folder, method=None, group=0, ckpt=None, balance=None, data=None, **options):
    data = data or digits(per_class=8, batch_size=10)  # 8 steps an epoch
    torch.manual_seed(0)
    settings = {key: options.pop(key) for key in ("schedule", "ema", "labels") if key in options}
    distiller = Distiller(
        net(), method or AT(), net(12, seed=1), example(data), optimizer=functools.partial(SGD, lr=0.05), balance=balance,
        allow_chance=True, cache=CacheOptions("off"), seed=0, group=group, train_targets=data.train_targets, data=data,
        **settings,
    )  # fmt: skip
    trainer = fit(distiller, grouped(data, group), folder, ckpt, **options)
    return distiller, trainer


class SaveAt(Callback):
    def __init__(self, folder, step):
        self.path, self.step = folder / "at.ckpt", step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("step", [2, 6])
def test_a_run_goes_on_to_the_bit_within_the_measuring_and_after_it(tmp_path, group, step):
    whole, _ = run(tmp_path / "a", group=group, balance=Balance(steps=4), callbacks=[SaveAt(tmp_path, step)])
    assert whole.balance.measured == 4
    resumed, trainer = run(tmp_path / "b", group=group, balance=Balance(steps=4), ckpt=tmp_path / "at.ckpt")
    assert trainer.global_step == 16
    assert resumed.balance.state_dict() == whole.balance.state_dict()
    assert same(whole.student, resumed.student)


def test_groups_and_single_steps_are_the_same_to_the_bit(tmp_path):
    one, _ = run(tmp_path / "0", balance=Balance(), ema=0.9)
    many, _ = run(tmp_path / "4", group=4, balance=Balance(), ema=0.9)
    assert one.balance.found() == many.balance.found()
    assert same(one, many)


def test_factors_are_fixed_and_nothing_is_measured_after_the_first_minibatches(tmp_path, monkeypatch, caplog):
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    with caplog.at_level(logging.INFO, "litdistill"):
        distiller, _ = run(tmp_path, balance=Balance(steps=3))
    assert len(calls) == 9  # of 3 of 16 minibatches: labels, hint, and whether the hint reads logits
    factor = distiller.balance.factors["hint"]
    assert sum("hint by" in text for text in caplog.messages) == 1
    assert f"hint by {factor:.3g}, so that its gradient is 0.1 times" in caplog.text


def test_a_weight_that_was_chosen_is_kept_unless_its_ratio_is_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "litdistill"):
        chosen, _ = run(tmp_path / "a", AT(hint=5.0), balance=Balance(steps=2))
    assert (chosen.balance.finished, chosen.balance.factors) == (True, {})
    assert "balance" not in caplog.text
    assert same(chosen.student, run(tmp_path / "b", AT(hint=5.0))[0].student)
    light, _ = run(tmp_path / "c", AT(hint=1.0), balance=Balance(terms={"hint": 0.1}, steps=2))
    heavy, _ = run(tmp_path / "d", AT(hint=1024.0), balance=Balance(terms={"hint": 0.1}, steps=2))
    assert same(light.student, heavy.student)  # a power of two: no rounding


def test_the_default_of_a_balanced_weight_has_no_effect_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "litdistill"):
        run(tmp_path / "b", balance=Balance(steps=2))
    assert "The defaults of these weights have no effect: balance.terms={hint: 0.1} sets" in caplog.text


def test_weights_for_the_case_at_hand_are_their_methods_own():
    pyramid = {"student_taps": "pyramid", "teacher_taps": "pyramid"}
    assert not [m for m in (AT(), KD(), PKD(), RKD(), AT(hint=1000), AT(**pyramid)) if m.own_weights()]
    assert AT(hard=0.5, hint=5).own_weights() == {"hard", "hint"}
    assert RKD(angle=1).own_weights() == {"angle"}
    assert PKD(**pyramid).own_weights() == {"hint"}  # of detectors in its paper
    assert FGD().own_weights() == {"foreground", "background", "attention", "context"}
    assert Sum({"kd": KD(soft=1), "at": AT(hard=0), "pkd": PKD(hard=0, hint=3)}).own_weights() >= {
        "kd_soft",
        "pkd_hint",
    }
    assert "at_hint" not in Sum({"kd": KD(), "at": AT(hard=0)}).own_weights()
    assert Shuffled(AT(hint=5)).own_weights() == {"hint"}
    pairs = Pairs([Pair("a", "b", name="one"), Pair("a", "b", weight=3.0, name="three")])
    assert pairs.own_weights() == {"three"}


def test_each_term_of_a_sum_is_balanced_and_logits_count_as_labels_do(tmp_path):
    sum_of = Sum({"kd": KD(), "at": AT(hard=0), "fitnet": FitNet(hard=0)})
    distiller, trainer = run(tmp_path, sum_of, balance=Balance(steps=2))
    assert set(distiller.balance.factors) == {"at_hint", "fitnet_hint"}
    assert trainer.callback_metrics["balance/at_hint"] == pytest.approx(distiller.balance.factors["at_hint"])
    distiller, _ = run(tmp_path, SRD(), balance=Balance(terms={"soft": 1.0}, steps=2))
    assert set(distiller.balance.factors) == {"hint", "soft"}


def test_a_warm_up_multiplies_the_factor(tmp_path):
    plain, _ = run(tmp_path / "a", balance=Balance(steps=1), max_steps=1)
    warm, _ = run(tmp_path / "b", balance=Balance(steps=1), max_steps=1, schedule={"hint": [(1, 0.5), (2, 1)]})
    assert warm.balance.found() == plain.balance.found()
    again, _ = run(tmp_path / "c", balance=Balance(0.05, steps=1), max_steps=1)
    assert same(again.student, warm.student)
    assert not same(plain.student, warm.student)


def test_without_labels_or_another_loss_nothing_changes_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "litdistill"):
        balanced, _ = run(tmp_path / "a", SimKD(), balance=Balance())
    assert "no hint stands beside another loss" in caplog.text
    plain, _ = run(tmp_path / "b", SimKD())
    assert same(balanced.student, plain.student)
    assert balanced.balance.found() == {}


def test_methods_in_two_phases_are_measured_where_labels_count(tmp_path):
    ab, _ = run(tmp_path / "a", AB(init_epochs=1), balance=Balance())
    plain, _ = run(tmp_path / "b", AB(init_epochs=1))
    assert same(ab.student, plain.student)
    ft, _ = run(tmp_path / "c", FT(init_epochs=1), balance=Balance(steps=4))
    assert list(ft.balance.factors) == ["hint"]
    assert ft.balance.measured == 4


def test_samples_without_labels_are_waited_for(tmp_path):
    data = digits(per_class=8, batch_size=10)
    data.train_targets[data.train_ids[8:]] = -1
    distiller, _ = run(tmp_path, balance=Balance(steps=2), data=data, labels="some")
    assert distiller.balance.measured == 2
    assert 0 < distiller.balance.factors["hint"] < 1


def test_in_bfloat16_factors_are_nearly_those_of_float32(tmp_path):
    full, _ = run(tmp_path / "a", balance=Balance(steps=1), max_steps=1)
    half, _ = run(tmp_path / "b", balance=Balance(steps=1), max_steps=1, precision="bf16-mixed")
    assert half.balance.factors["hint"] == pytest.approx(full.balance.factors["hint"], rel=0.1)


def test_a_compiled_student_is_measured_without_compilation(tmp_path):
    data = digits(per_class=8, batch_size=10)
    distiller = Distiller(net(), AT(), net(12, seed=1), example(data), balance=Balance(), allow_chance=True, seed=0)
    distiller.student.compile(
        backend="inductor"
    )  # would fail here without a C++ compiler, and with a kept graph anywhere
    fit(distiller, data, tmp_path, max_steps=2)
    assert distiller.balance.measured == 2


class Factors(Callback):
    """Writes each process's factors at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.balance.state_dict(), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("group", [0, 2])
def test_two_processes_have_the_same_factors_of_the_samples_of_both(tmp_path, group):
    forked = DDPStrategy(start_method="fork")
    run(
        tmp_path, group=group, balance=Balance(steps=2), devices=2, strategy=forked, callbacks=[Factors(tmp_path)],
        enable_checkpointing=False, max_epochs=1,
    )  # fmt: skip
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0] == states[1]
    assert states[0]["measured"] == 2
    alone, _ = run(tmp_path / "one", balance=Balance(steps=2), max_epochs=1)
    assert states[0]["norms"] != alone.balance.norms  # the sum over both
    assert states[0]["norms"][""] == pytest.approx(2 * alone.balance.norms[""], rel=0.5)


def test_it_is_the_default_and_nothing_without_a_hint(tmp_path):
    """Without one there is no object of it: nothing to measure, to log, or to keep in a checkpoint."""
    data = digits(per_class=8, batch_size=10)
    made = lambda method, **options: Distiller(net(), method, net(12), example(data), seed=0, **options)  # noqa: E731
    assert made(AT()).balance.state_dict() == Balance().state_dict()
    assert made(AT(), balance=None).balance is None
    assert [made(method).balance for method in (KD(), Supervised(), DKD())] == [None] * 3
    assert made(KD(), balance=Balance(terms={"soft": 1.0})).balance is not None
    with pytest.raises(UserError, match=r"balance='uncertainty': give \"auto\", None, or a rule.*Uncertainty\(\)"):
        made(AT(), balance="uncertainty")
    assert compose_config(tmp_path / "one", "method=at").balance.ratio == Balance().ratio


@pytest.mark.parametrize("place", ["methods", "crd/base", "imagenet/base", "zagoruyko2017/base", "aberhu/base"])
def test_published_cells_keep_published_weights(tmp_path, place):
    data = ("data.root=/nowhere",) if place.startswith("imagenet") else ()
    assert not compose_config(tmp_path, f"experiment={place}", "method=at", *data).balance
    assert compose_config(tmp_path, f"experiment={place}", "method=at", "balance=auto", *data).balance.ratio == 0.1


def test_a_config_names_it_and_a_teacher_has_none(tmp_path):
    plain = compose_config(tmp_path / "one", "method=at", "balance=none")
    cfg = compose_config(tmp_path / "one", "method=at", "balance.ratio=0.3")
    assert cfg.balance.ratio == 0.3
    assert recipe_hash(plain) != recipe_hash(cfg)
    assert "balance" not in recipe(plain)
    assert recipe_hash(teacher_config(plain)) == recipe_hash(teacher_config(cfg))
