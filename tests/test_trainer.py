"""What a config makes of Lightning's Trainer: schedules by epoch and by step, callbacks of others, and what is refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from litdistill.config.distiller import build_scheduler
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.schedules import MomentumRamp, warmup_cosine
from litdistill.training.precision import precision_of
from litdistill.training.train import train
from litdistill.utils.checkpoint import load_checkpoint
from litdistill.utils.errors import UserError
from tests.fits import same

ALONE = ["method=supervised", "teacher=null", "logger=none", "data.batch_size=20"]  # 6 steps an epoch


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of each step of the runs that follow."""
    found: list[float] = []
    inner = Distiller.loss

    def loss(self, *a):
        found.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return inner(self, *a)

    monkeypatch.setattr(Distiller, "loss", loss)
    return found


def last(cfg) -> dict:
    return load_checkpoint(Path(cfg.folder) / "checkpoints" / "last.ckpt")["state_dict"]


SCHEDULES = {
    "none": (["scheduler=none"], [0.001] * 24),
    "cosine": (["scheduler=cosine"], [0.0005 * (1 + math.cos(math.pi * (i // 6) / 4)) for i in range(24)]),
    "cosine by step": (
        ["scheduler=cosine", "scheduler.interval=step"],
        [0.0005 * (1 + math.cos(math.pi * i / 24)) for i in range(24)],
    ),
    "steps": (["scheduler=steps", "scheduler.milestones=[2,3]"], [0.001] * 12 + [0.0001] * 6 + [0.00001] * 6),
    "warmup_cosine": (
        ["scheduler=warmup_cosine", "scheduler.warmup=0.25"],
        [0.001 * (i + 1) / 7 for i in range(6)] + [0.0005 * (1 + math.cos(math.pi * i / 18)) for i in range(18)],
    ),
    "momentum": (
        ["optimizer=sgd", "optimizer.lr=0.1", "scheduler=momentum", "scheduler.gamma=0.5", "scheduler.ramp=2"],
        [0.1 * 0.5**e * (1 - m) for e, m in enumerate((0.5, 0.745, 0.99, 0.99)) for _ in range(6)],
    ),
    "a scheduler of one's own": (
        ["scheduler._target_=torch.optim.lr_scheduler.LinearLR", "~scheduler.factor", "+scheduler.total_iters=5",
         "+scheduler.start_factor=0.5", "+scheduler.interval=step"],
        [0.001 * (0.5 + 0.1 * min(i, 5)) for i in range(24)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_each_step_is_the_schedules_in_groups_and_one_by_one(small, rates, name):
    overrides, expected = SCHEDULES[name]
    weights = []
    for group in ("auto", "1"):
        rates.clear()
        cfg = small(*ALONE, *overrides, "trainer.max_epochs=4", f"group={group}", name=group)
        train(cfg)
        assert rates == pytest.approx(expected)
        weights.append(last(cfg))
    assert same(*weights)


def test_a_momentum_rises_while_the_rate_falls_and_is_restored():
    new = lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)  # noqa: E731
    optimizer = new()
    scheduler, found = MomentumRamp(optimizer, gamma=0.9, start=0.5, end=0.9, ramp=4), []
    for _ in range(6):
        found.append((optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    momenta = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    assert found == [(pytest.approx(m), pytest.approx(0.9**e * (1 - m))) for e, m in enumerate(momenta)]
    other = new()
    resumed = MomentumRamp(other)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    resumed.step()
    scheduler.step()
    assert [other.param_groups[0][k] for k in ("lr", "momentum")] == [
        optimizer.param_groups[0][k] for k in ("lr", "momentum")
    ]
    with pytest.raises(UserError, match="AdamW has no momentum"):
        MomentumRamp(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))


def test_one_cycle_reaches_its_peak_by_steps_and_ends_near_zero(small, rates):
    weights = []
    for group in ("auto", "1"):
        rates.clear()
        options = ["scheduler=onecycle", "scheduler.max_lr=0.01", "trainer.max_epochs=6", f"group={group}"]
        cfg = small(*ALONE, *options, name=group)
        train(cfg)
        assert len(rates) == 36
        assert rates[0] == pytest.approx(0.01 / 25)
        assert max(rates) == pytest.approx(0.01, rel=1e-2)
        assert 8 <= rates.index(max(rates)) <= 12  # at 0.3 of the way
        assert rates[-1] == pytest.approx(0.01 / 25 / 1e4, abs=1e-6)
        weights.append(last(cfg))
    assert same(*weights)


def test_one_cycle_that_is_typed_is_told_how_often_it_is_stepped(small):
    typed = ["scheduler._target_=torch.optim.lr_scheduler.OneCycleLR", "~scheduler.factor", "+scheduler.max_lr=0.01"]
    horizon = ["+scheduler.epochs=2", "+scheduler.steps_per_epoch=37"]
    with pytest.raises(UserError, match=r"made for 74 steps and will be stepped 12 times"):
        train(small(*ALONE, *typed, *horizon))


def test_a_plateau_waits_for_the_metric_that_chooses_the_epoch(small, rates):
    weights = []
    for group in ("auto", "1"):
        rates.clear()
        # No accuracy is better by 2 than another: the rate falls after each epoch but the first.
        options = [
            "scheduler=plateau",
            "scheduler.patience=0",
            "+scheduler.threshold=2",
            "+scheduler.threshold_mode=abs",
        ]
        cfg = small(*ALONE, *options, "trainer.max_epochs=4", f"group={group}", name=group)
        train(cfg)
        assert rates[::6] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
        weights.append(last(cfg))
    assert same(*weights)


def test_a_bare_plateau_of_torchs_follows_the_metrics_direction():
    node = OmegaConf.create({"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "_partial_": True})
    factory, options = build_scheduler(node, 2, 74, "val/nll", "min")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert factory(optimizer).mode == "min"
    assert options == ("epoch", "val/nll")
    assert build_scheduler(node, 2, 74, "val/accuracy", "max")[0](optimizer).mode == "max"


def test_horizons_count_what_will_be_stepped(small, rates):
    cfg = small(*ALONE, "scheduler=cosine", "scheduler.interval=step", "trainer.max_epochs=9", "+trainer.max_steps=10")
    train(cfg)
    assert rates == pytest.approx([0.0005 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    rates.clear()
    options = [
        "+trainer.accumulate_grad_batches=2",
        "trainer.max_epochs=4",
        "scheduler=cosine",
        "scheduler.interval=step",
    ]
    train(small(*ALONE, *options, name="b"))  # three steps an epoch
    assert rates[::2] == pytest.approx([0.0005 * (1 + math.cos(math.pi * i / 12)) for i in range(12)])


@pytest.mark.parametrize(("warmup", "total"), [(1.0, 10), (-0.1, 10), (0.1, 0)])
def test_a_warmup_that_leaves_nothing_is_refused(warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(UserError, match="at least 0 and below 1"):
        warmup_cosine(optimizer, total, warmup)


def test_averaging_by_lightning_gives_the_same_weights_whatever_the_group(small, caplog):
    caplog.set_level(logging.INFO)
    swa = "{_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.01, swa_epoch_start: 2}"
    weights = []
    for group in ("auto", "1"):
        cfg = small(*ALONE, f"+callbacks.swa={swa}", "trainer.max_epochs=4", f"group={group}", name=group)
        train(cfg)
        weights.append(last(cfg))
    assert same(*weights)
    assert "Each step of the Trainer is one minibatch: StochasticWeightAveraging needs to see every one." in caplog.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+trainer.overfit_batches=1"], r"overfit_batches.*data\.per_class=1.*data\.epoch_size"),
        (["+trainer.fast_dev_run=true"], r"trainer=debug"),
        (["+trainer.strategy=ddp_spawn"], r"choose trainer=ddp"),
        (["+trainer.strategy=ddp_fork"], r"choose trainer=ddp"),
        (["+trainer.strategy=ddp_notebook"], r"choose trainer=ddp"),
        (["trainer.precision=bf16-true"], r"Use 32-true"),
        (["scheduler=plateau", "scheduler.interval=step"], r"interval is epoch"),
        (["scheduler=cosine", "scheduler.interval=batch"], r"epoch, step or null"),
        (["scheduler=plateau", "scheduler.monitor=val/acuracy"], r"waits for val/acuracy.*val/accuracy"),
    ],
)
def test_what_would_lose_or_spoil_a_training_is_refused(small, overrides, words):
    class NoStep(Callback):
        def on_train_batch_end(self, trainer, *_):
            assert trainer.current_epoch == 0

    with pytest.raises(UserError, match=words):
        train(small(*ALONE, *overrides), [NoStep()])


@pytest.mark.parametrize(
    ("cuda", "bf16", "options", "expected"),
    [
        (True, True, {"accelerator": "auto"}, "bf16-mixed"),
        (True, True, {"accelerator": "gpu"}, "bf16-mixed"),
        (True, True, {"accelerator": "cpu"}, "32-true"),
        (True, False, {"accelerator": "auto"}, "32-true"),
        (False, False, {"accelerator": "auto"}, "32-true"),
        (True, True, {"accelerator": "auto", "precision": "16-mixed"}, "16-mixed"),
        (True, True, {"accelerator": "auto", "precision": None}, None),
    ],
)
def test_precision_is_bf16_on_a_gpu_that_has_it_and_the_log_says_so(monkeypatch, caplog, cuda, bf16, options, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    with caplog.at_level("INFO"):
        assert precision_of({"precision": "auto", **options}) == expected
    chosen = "precision" not in options and cuda and options["accelerator"] != "cpu"
    assert ("Precision: " + str(expected) in caplog.text) == chosen


def test_a_run_on_a_cpu_computes_in_float32(small):
    class Note(Callback):
        def on_fit_start(self, trainer, *_):
            found.append(trainer.precision)

    found: list[str] = []
    cfg = small(*ALONE, "trainer.max_epochs=1")
    assert cfg.trainer.precision == "auto"
    train(cfg, [Note()])
    assert found == ["32-true"]
