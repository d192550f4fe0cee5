"""A rate of its own for the layers of a method: one step by hand, schedules, going on, and nothing changed without it."""

import functools

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CyclicLR, ExponentialLR, OneCycleLR

from litdistill.config.recipes import recipe_hash, teacher_config
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.at import AT
from litdistill.methods.fitnet import FitNet
from litdistill.utils.errors import UserError
from tests.conftest import compose_config
from tests.fits import digits, example, fit, grouped, net, same
from tests.test_balance import SaveAt


def made(method=FitNet, optimizer=SGD, group=2, **options):
    data = digits(per_class=8, batch_size=10)  # 8 steps an epoch
    torch.manual_seed(0)
    factory = functools.partial(optimizer, lr=0.05)
    return Distiller(
        net(), method(), net(12, seed=1), example(data), optimizer=factory, allow_chance=True, cache=CacheOptions("off"),
        seed=0, train_targets=data.train_targets, data=data, balance=None, group=group, **options,
    )  # fmt: skip


def trained(folder, ckpt=None, steps=1, callbacks=(), **options):
    distiller = made(**options)
    data = grouped(distiller.data, options.get("group", 2))
    fit(distiller, data, folder, ckpt, max_steps=steps, callbacks=list(callbacks))
    return distiller


def moved(distiller, part):
    """How far each of its parameters went from where it began."""
    start = dict(getattr(made(), part).named_parameters())
    return {k: (v - start[k]).detach() for k, v in getattr(distiller, part).named_parameters()}


def test_a_step_of_the_methods_layers_is_as_much_shorter_and_the_students_is_the_same(tmp_path):
    plain, slow = trained(tmp_path / "a"), trained(tmp_path / "b", method_lr=0.25)
    assert same(plain.student, slow.student)
    own = moved(plain, "method")
    assert any(v.abs().max() > 0 for v in own.values())
    for name, value in moved(slow, "method").items():
        torch.testing.assert_close(value, own[name] / 4, rtol=1e-3, atol=1e-7)


def test_without_a_rate_of_their_own_nothing_changes(tmp_path):
    plain, one = trained(tmp_path / "a", steps=4), trained(tmp_path / "b", steps=4, method_lr=1.0)
    assert same(plain, one)
    assert len(one.configure_optimizers().param_groups) == 1
    assert len(made(AT, method_lr=0.1).configure_optimizers().param_groups) == 1  # it has no layers


def test_a_schedule_scales_both_rates_and_one_that_sets_them_is_refused():
    found = made(method_lr=0.5, scheduler=functools.partial(ExponentialLR, gamma=0.1)).configure_optimizers()
    rates = lambda: [group["lr"] for group in found["optimizer"].param_groups]  # noqa: E731
    assert rates() == pytest.approx([0.05, 0.025])
    found["optimizer"].step()
    found["lr_scheduler"]["scheduler"].step()
    assert rates() == pytest.approx([0.005, 0.0025])
    cyclic = functools.partial(CyclicLR, base_lr=0.01, max_lr=0.1)
    with pytest.raises(UserError, match="CyclicLR sets one rate for all parameters"):
        made(method_lr=0.5, scheduler=cyclic).configure_optimizers()


def test_one_cycle_has_a_peak_for_each():
    cycle = functools.partial(OneCycleLR, max_lr=0.1, total_steps=8, pct_start=0.3)
    both, plain = (made(method_lr=lr, scheduler=cycle).configure_optimizers() for lr in (0.25, None))
    for _ in range(7):
        student, own = (group["lr"] for group in both["optimizer"].param_groups)
        assert student == plain["optimizer"].param_groups[0]["lr"]
        assert own == pytest.approx(0.25 * student)
        for found in (both, plain):
            found["optimizer"].step()
            found["lr_scheduler"]["scheduler"].step()


@pytest.mark.parametrize("group", [0, 2])
def test_a_run_goes_on_to_the_bit(tmp_path, group):
    settings = {"optimizer": Adam, "method_lr": 0.1, "group": group}
    whole = trained(tmp_path / "a", steps=6, callbacks=[SaveAt(tmp_path, 4)], **settings)
    assert same(whole, trained(tmp_path / "b", tmp_path / "at.ckpt", steps=6, **settings))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(wrong):
    with pytest.raises(UserError, match="must be above 0"):
        made(method_lr=wrong).configure_optimizers()


def test_a_config_names_it_and_a_teacher_has_none(tmp_path):
    plain = compose_config(tmp_path, "method=fitnet")
    assert plain.method_lr is None
    cfg = compose_config(tmp_path, "method=fitnet", "method_lr=0.06")
    assert recipe_hash(cfg) != recipe_hash(plain)
    assert recipe_hash(teacher_config(cfg)) == recipe_hash(teacher_config(plain))
