"""A step of several minibatches is what as many steps of one are: to the bit, and for whoever watches."""

import copy
import csv
import functools

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from litdistill.data.augment import Crop
from litdistill.data.datamodule import IdLoader, Ids, ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.models.small import conv4
from litdistill.training.callbacks import PerStepSeed


class Diary(Callback):
    """Everything that a callback can see around a batch."""

    def __init__(self):
        self.lines = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.lines.append(("start", trainer.current_epoch, batch_idx, trainer.global_step))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lines.append(
            ("end", trainer.current_epoch, batch_idx, trainer.global_step, round(float(outputs["loss"]), 5))
        )

    def on_validation_start(self, trainer, pl_module):
        self.lines.append(("validation", trainer.current_epoch, trainer.global_step))


class StopAt(Callback):
    """As a timer does, in the middle of a window."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


def run(tmp_path, window: int, clip: float | None = None, callbacks=(), epochs: int = 3, ckpt=None, **options):
    torch.manual_seed(0)
    student = nn.Sequential(conv4(10, (1, 8, 8), widths=[8, 8]), nn.Dropout(0.1))
    teacher = FrozenTeacher(conv4(10, (1, 8, 8), widths=[16, 16]))
    distiller = Distiller(
        student,
        KD(),
        teacher,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        schedule={"soft": [(0, 0), (4, 1)]},
        allow_chance=True,
        cache=CacheOptions("off"),
        window=window,
        gradient_clip_val=clip,
    )
    data = ImageData("digits", per_class=23, batch_size=20, augment=[Crop(1)])  # 12 batches, the last one smaller
    data.window = window
    diary = Diary()
    settings = {
        "accelerator": "cpu", "max_epochs": epochs, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "log_every_n_steps": 5, "use_distributed_sampler": False,
        "logger": CSVLogger(tmp_path / f"log{window}", flush_logs_every_n_steps=1), "default_root_dir": tmp_path / str(window),
    }  # fmt: skip
    if window == 1:
        settings["gradient_clip_val"] = clip
    trainer = Trainer(
        **(settings | options),
        callbacks=[PerStepSeed(0), LearningRateMonitor("step"), *copy.deepcopy(callbacks), diary],
    )
    trainer.fit(distiller, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return distiller, trainer, diary.lines


@pytest.mark.parametrize(
    ("clip", "callbacks", "options"),
    [
        (None, [], {}),
        (0.5, [EMAWeightAveraging(decay=0.9)], {}),
        (None, [], {"val_check_interval": 7}),
        (None, [], {"val_check_interval": 0.5}),
        (None, [], {"max_steps": 17, "epochs": -1}),
        (None, [], {"limit_train_batches": 7}),
        (None, ["stop"], {}),
        (None, [], {"precision": "bf16-mixed", "epochs": 1}),
    ],
)
def test_weights_counts_logs_and_what_callbacks_see_are_those_of_single_steps(tmp_path, clip, callbacks, options):
    callbacks = [StopAt(6) if c == "stop" else c for c in callbacks]
    one, trainer, diary = run(tmp_path, 1, clip, callbacks, **options)
    many, trainer16, diary16 = run(tmp_path, 4, clip, callbacks, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))
    assert diary16 == diary
    assert trainer16.global_step == trainer.global_step
    assert trainer16.callback_metrics.keys() == trainer.callback_metrics.keys()
    own = trainer.fit_loop.epoch_loop.state_dict(), trainer16.fit_loop.epoch_loop.state_dict()
    for key in ("batch_progress.total", "state_dict"):
        assert str([v for k, v in own[0].items() if key in k]) == str([v for k, v in own[1].items() if key in k])
    assert (
        trainer16.fit_loop.epoch_loop.batch_progress.state_dict()
        == trainer.fit_loop.epoch_loop.batch_progress.state_dict()
    )
    logs = [_log(t) for t in (trainer, trainer16)]
    assert logs[0] == logs[1]


def _log(trainer) -> list[dict[str, str]]:
    """The rows that were logged, without the measured speed."""
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("speed/") and v} for row in csv.DictReader(file)]
    assert any("train/soft" in row for row in rows)
    return [{k: float(v) for k, v in row.items()} for row in rows]


def test_a_checkpoint_within_a_window_goes_on_where_it_was_written(tmp_path):
    whole, _, _ = run(tmp_path, 4)
    every = [ModelCheckpoint(tmp_path / "points", filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    run(tmp_path / "b", 4, callbacks=every, epochs=2)
    for step in (3, 6, 11, 12, 18):
        resumed, trainer, diary = run(tmp_path / f"c{step}", 4, ckpt=tmp_path / "points" / f"step={step}.ckpt")
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        )
        assert diary[0][3] == step
        assert trainer.global_step == 36


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1)])
def test_a_run_goes_on_with_another_window(tmp_path, before, after):
    whole, _, _ = run(tmp_path, 4)
    every = [ModelCheckpoint(tmp_path / "points", filename="{step}", every_n_train_steps=7, save_top_k=-1)]
    run(tmp_path / "b", before, callbacks=every, epochs=2)
    resumed, trainer, diary = run(tmp_path / "c", after, ckpt=tmp_path / "points" / "step=14.ckpt")
    assert diary[0] == ("start", 1, 2, 14)
    assert trainer.global_step == 36
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_windows_lie_where_they_lie_wherever_a_run_goes_on():
    def windows(done: int) -> list[Ids]:
        rows = Ids("train", torch.arange(50), torch.zeros(50, dtype=torch.int64))
        return list(IdLoader(lambda _: rows, 50, 4, lambda: (0, done), ends=lambda _: [3, 6, 10, 13]))

    whole = windows(0)
    assert [w.sizes for w in whole] == [(4, 4, 4), (4, 4, 4), (4, 4, 4, 4), (4, 4, 2)]
    assert torch.cat([w.ids for w in whole]).tolist() == list(range(50))
    for done in range(13):
        rest = windows(done)
        starts = [0, 3, 6, 10]
        assert rest[0].skip == done - max(s for s in starts if s <= done)
        assert [w.ids.tolist() for w in rest] == [w.ids.tolist() for w in whole[len(whole) - len(rest) :]]
    assert windows(13) == []


def test_the_windows_images_are_gathered_once_and_in_minibatches(tmp_path):
    sizes = []

    class Spy(ImageData):
        def get_batch(self, split, ids, views):
            if split == "train" and views is not None:
                sizes.append(len(ids))
            return super().get_batch(split, ids, views)

    data = Spy("digits", per_class=8, batch_size=10, augment=[Crop(1)])
    data.window = 5
    distiller = Distiller(
        conv4(10, (1, 8, 8), widths=[4]),
        KD(),
        FrozenTeacher(conv4(10, (1, 8, 8), widths=[4])),
        allow_chance=True,
        window=5,
    )
    Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path).fit(distiller, datamodule=data)  # fmt: skip
    assert [n for n in sizes if n > 2] == [50, 30]


class Endless(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            yield torch.randn(4, 1, 8, 8, generator=generator), torch.arange(4)


def test_a_loader_of_others_without_a_length_is_validated_and_scheduled_as_ever(tmp_path):
    found = []
    for window in (1, 4):
        torch.manual_seed(0)
        schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        distiller = Distiller(conv4(10, (1, 8, 8), widths=[4]), Supervised(), None, optimizer, schedule, window=window)
        diary = Diary()
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=0, callbacks=[diary],
        )  # fmt: skip
        loaders = [DataLoader(Endless(), batch_size=None) for _ in range(2)]
        trainer.fit(distiller, *loaders)
        found.append((diary.lines, trainer.optimizers[0].param_groups[0]["lr"], trainer.global_step))
    assert found[0] == found[1]
    assert [line for line in found[0][0] if line[0] == "validation"] == [("validation", 0, 5), ("validation", 1, 10)]
    assert found[0][1] == 0.1 * 0.5**2


@pytest.mark.parametrize(("steps", "at"), [(17, 14), (5, 3)])
def test_a_run_that_goes_on_ends_at_its_last_step(tmp_path, steps, at):
    options = {"max_steps": steps, "log_every_n_steps": 100}
    whole, _, _ = run(tmp_path, 16, **options)
    every = [ModelCheckpoint(tmp_path / "points", filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    run(tmp_path / "b", 16, callbacks=every, **options)
    resumed, trainer, _ = run(tmp_path / "c", 16, ckpt=tmp_path / "points" / f"step={at}.ckpt", **options)
    assert trainer.global_step == steps
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_what_is_logged_of_accumulated_steps_is_the_mean_of_all_their_minibatches(tmp_path, monkeypatch):
    losses, inner = [], Distiller.loss
    monkeypatch.setattr(Distiller, "loss", lambda self, *a: (losses.append(loss := inner(self, *a)), loss)[1])
    _, trainer, _ = run(tmp_path, 1, epochs=2, accumulate_grad_batches=3, log_every_n_steps=2)
    logged = [row["train/loss"] for row in _log(trainer) if "train/loss" in row]
    assert logged == pytest.approx([torch.stack(losses[i : i + 6]).mean().item() for i in range(0, 24, 6)])


def test_logging_can_be_switched_off(tmp_path):
    for window in (1, 4):
        _, trainer, _ = run(tmp_path, window, epochs=1, log_every_n_steps=0)
        assert trainer.global_step == 12


def test_logged_accuracy_and_agreement_are_shares_of_the_samples_since_the_last_log(tmp_path, monkeypatch):
    seen, inner = [], Distiller._watch

    def watch(self, loss, terms, student, teacher, y):
        said = student.logits.argmax(1)
        seen.append(torch.stack([said == y, said == teacher.logits.argmax(1)]))
        inner(self, loss, terms, student, teacher, y)

    monkeypatch.setattr(Distiller, "_watch", watch)
    _, trainer, _ = run(tmp_path, 4, epochs=1, log_every_n_steps=6)  # 12 minibatches, the last one smaller
    rows = [row for row in _log(trainer) if "train/accuracy" in row]
    for row, part in zip(rows, (seen[:6], seen[6:]), strict=True):
        accuracy, agreement = torch.cat(part, 1).double().mean(1).tolist()
        assert row["train/accuracy"] == pytest.approx(accuracy)
        assert row["train/agreement"] == pytest.approx(agreement)
