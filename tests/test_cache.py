"""The teacher's cache: exact, shared, and never believed without reason."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import load_file
from torch import nn

from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.mixing import Mixup
from litdistill.distillation import teacher_cache as cache_module
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.row_store import RowStore
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import (
    CacheOptions,
    TeacherCache,
    expected_saving,
)
from litdistill.evaluation import predictions
from litdistill.methods.at import AT
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.training.train import train
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.caches import CPU, PAIRS, TASK, Dim, digits, frozen, net, run
from tests.fits import example, fit, grouped


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("augment", [[], [Flip()], [Crop(1), Flip()], [Dim()]], ids=["none", "flip", "crop", "dim"])
@pytest.mark.parametrize("method", [KD, FitNet, AT, PAIRS])
def test_the_losses_with_the_cache_are_those_of_the_live_teacher(tmp_path, where, augment, method):
    options = CacheOptions(where, tmp_path / "cache")
    live, _, live_weights, _ = run(tmp_path, CacheOptions("off"), augment, method())
    first, _, weights, distiller = run(tmp_path, options, augment, method())
    assert first[:3] == live[:3]  # the first epoch is computed, in the very batches: equal to the bit
    assert first == pytest.approx(live, rel=1e-5)
    assert all(torch.allclose(v, weights[k], atol=1e-5) for k, v in live_weights.items())
    views = {"none": 1, "flip": 2}.get(_id(augment))
    if views == 1:
        assert distiller.cache.computed == 120  # each image once, instead of in each of 4 epochs
    assert distiller.cache.requested == 4 * 120
    again, again_images, _, second = run(tmp_path, options, augment, method())
    if where == "disk":
        assert second.cache.computed == 0  # nothing is left to compute for a run that comes after
        assert again_images <= 2 + 40  # its dry forward, and the spot check of what it found
        assert again == first


@pytest.mark.parametrize("group", [0, 4])
def test_a_balanced_hint_gives_the_same_weights_with_the_cache_to_the_bit(tmp_path, group):
    live, cached = (run(tmp_path, CacheOptions(mode), method=AT(), epochs=1, group=group) for mode in ("off", "memory"))
    assert cached[3].cache.requested == 120
    assert live[3].balance.norms == cached[3].balance.norms
    assert all(torch.equal(v, cached[2][k]) for k, v in live[2].items())


def _id(augment) -> str:
    return "none" if not augment else "flip" if len(augment) == 1 and isinstance(augment[0], Flip) else "other"


def test_a_run_with_another_seed_finds_the_views_of_the_first(tmp_path):
    options = CacheOptions("disk", tmp_path)
    for seed in range(6):
        *_, distiller = run(tmp_path, options, [Flip()], epochs=6, seed=seed)
    assert distiller.cache.computed == 0
    rows = distiller.cache.store.valid
    assert int(rows.sum()) <= 2 * len(distiller.data.train_targets)


def test_what_is_kept_is_what_the_teacher_says_in_float64(tmp_path):
    data, teacher = digits(augment=[Crop(1)]), frozen(["layer2"])
    cache = TeacherCache(teacher, data, CPU, tmp_path)
    ids = data.train_ids[:30]
    views = torch.arange(30) % 9
    batch = data.get_batch("train", ids, views)
    cache.outputs(batch)
    kept = cache.outputs(batch)
    exact = FrozenTeacher(net(16, seed=1).double(), taps=["layer2"])(Batch(batch.inputs.double() / 255, None))
    torch.testing.assert_close(kept.logits.double(), exact.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.features["layer2"].double(), exact.features["layer2"], rtol=1e-4, atol=1e-5)
    assert kept.features["layer2"].shape == exact.features["layer2"].shape
    assert torch.equal(kept.ids, ids)


class Turned(nn.Module):
    """Gives what lies otherwise in memory than its shape says: a map with channels innermost, tokens, a head of each place."""

    def __init__(self):
        super().__init__()
        self.maps, self.tokens, self.places = nn.Identity(), nn.Identity(), nn.Linear(3, 3)

    def forward(self, x):
        x = x.squeeze(1).float() / 255
        maps = self.maps(torch.stack([x, -x, x**2], -1).permute(0, 3, 1, 2))
        tokens = self.tokens(maps.flatten(2).transpose(1, 2).contiguous().transpose(1, 2))
        return self.places(maps.movedim(1, -1)).movedim(-1, 1).flatten(2) + tokens


def test_what_is_kept_lies_in_memory_as_the_teacher_gives_it():
    """Else sums over it round otherwise, and a run with the cache is not the one without."""
    data = digits()
    teacher = FrozenTeacher(Turned(), taps=["maps", "tokens"])
    batch = data.get_batch("train", data.train_ids[:40])._replace(views=None)
    live = teacher(batch)
    cache = TeacherCache(teacher, data, CPU)
    kept = [cache.outputs(batch) for _ in range(2)][1]
    for a, b in zip(
        [*live.heads.values(), *live.features.values()], [*kept.heads.values(), *kept.features.values()], strict=True
    ):
        assert not a.is_contiguous()
        assert (a.shape, a.stride()) == (b.shape, b.stride())
        assert torch.equal(a, b)


def test_the_share_that_is_saved_is_that_of_a_draw_of_views():
    torch.manual_seed(0)
    views, passes = 25, 30
    drawn = torch.randint(views, (20_000, passes))
    distinct = torch.stack([row.unique().numel() * torch.ones(()) for row in drawn[:4000]]).mean()
    assert expected_saving(views, passes) == pytest.approx(1 - float(distinct) / passes, abs=0.005)
    assert expected_saving(1, 4) == 0.75


def test_a_cache_that_does_not_pay_is_not_used_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    auto = CacheOptions("auto", tmp_path / "cache")
    *_, distiller = run(tmp_path, auto, [Crop(4), Flip()], epochs=1)  # 162 views, one pass
    assert distiller.cache is None
    assert "not kept: each of 162 views is seen about once" in caplog.text
    *_, distiller = run(tmp_path, auto._replace(shared=True), [Crop(4), Flip()], epochs=1)  # ... but more runs follow
    assert distiller.cache is not None
    *_, distiller = run(tmp_path, auto, [Crop(4), Flip()], epochs=1)  # and so one did
    assert distiller.cache.computed == 0
    *_, distiller = run(tmp_path, auto._replace(gb=1e-6), epochs=4)
    assert distiller.cache is None
    assert "teacher.cache.gb" in caplog.text
    with pytest.raises(UserError, match=r"teacher\.cache\.mode=fast"):
        run(tmp_path, CacheOptions("fast"))


def test_half_precision_halves_the_rows_and_only_rounds(tmp_path):
    full, half = (run(tmp_path / d, CacheOptions("disk", tmp_path / d, dtype=d)) for d in ("float32", "float16"))
    assert half[0][3:] == pytest.approx(full[0][3:], rel=2e-3)
    assert half[0][3:] != full[0][3:]
    sizes = [next((tmp_path / d).rglob("*.rows")).stat().st_size for d in ("float32", "float16")]
    assert sizes[0] == 2 * sizes[1]


def test_evaluations_of_another_validation_set_are_others(tmp_path):
    teacher = net(16, seed=1).eval()
    for size in (0.1, 0.2, 0.1):
        data = ImageData("digits", val_size=size)
        data.setup()
        expected, _ = predictions.collect(teacher, data, "val")
        assert torch.equal(predictions.teacher_outputs(teacher, data, TASK, "val", "cpu", tmp_path).logits, expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_evaluations_that_cannot_be_kept_cost_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "folder"
    found = predictions.teacher_outputs(net(16).eval(), digits(), TASK, "val", "cpu", place)
    assert len(found.logits) == 129
    assert "not kept" in caplog.text


@pytest.mark.parametrize("augment", [[Crop(2), Flip()], [Dim()]], ids=["finite", "continuous"])
def test_fixed_views_bound_what_is_seen_and_what_is_kept(tmp_path, augment):
    data = digits(augment=augment, fixed_views=2)
    seen = {}
    for epoch in range(6):
        rows = data._epoch(epoch)
        images = data.get_batch("train", rows.ids, rows.views).inputs
        for i, image in zip(rows.ids.tolist(), images, strict=True):
            seen.setdefault(i, set()).add(image.numpy().tobytes())
    assert max(len(views) for views in seen.values()) == 2
    live, *_ = run(tmp_path, CacheOptions("off"), augment, epochs=6, fixed_views=2)
    kept, _, _, distiller = run(tmp_path, CacheOptions("disk", tmp_path / "c"), augment, epochs=6, fixed_views=2)
    assert kept == pytest.approx(live, rel=1e-5)
    assert distiller.cache.computed == 2 * 120
    assert len(distiller.cache.store.valid) == 2 * 120


@pytest.mark.parametrize("seen", [{"augment": [Crop(2), Flip()]}, {"augment": [Dim()]}, {"mix": Mixup()}],
                         ids=["finite", "continuous", "mixed"])  # fmt: skip
def test_runs_of_other_seeds_that_see_the_same_views_ask_nothing_more(tmp_path, seen):
    options = CacheOptions("disk", tmp_path)
    losses, _, _, first = run(tmp_path, options, seed=0, view_seed=5, **seen)
    others, _, _, second = run(tmp_path, options, seed=1, view_seed=5, **seen)
    assert first.cache.computed > 0
    assert second.cache.computed == 0
    assert others != losses  # in another order
    live, *_ = run(tmp_path, CacheOptions("off"), seed=1, view_seed=5, **seen)
    assert others == pytest.approx(live, rel=1e-5)
    *_, own = run(tmp_path, options, seed=1, **seen)
    assert own.cache.computed > 0


def test_a_second_run_asks_the_teacher_nothing_at_all(tmp_path, monkeypatch):
    """Its training, validation and test outputs are those of the first: a sweep's teacher works once."""
    seen, asked = [], []
    inner, predict = FrozenTeacher.forward, predictions.predict_split

    def counted(self, batch):
        seen.append(len(batch.inputs))
        return inner(self, batch)

    def predicted(net, *a, **k):
        asked.append("student" if any(p.requires_grad for p in net.parameters()) else "teacher")
        return predict(net, *a, **k)

    options = [f"runs={tmp_path}", "data.per_class=12", "trainer=cpu", "trainer.max_epochs=3", "logger=none", "threads=1",
               "net@teacher=conv4", "+teacher.recipe.trainer.max_epochs=1", "teacher.allow_chance=true"]  # fmt: skip
    monkeypatch.setattr(predictions, "predict_split", predicted)
    monkeypatch.setattr(
        "litdistill.training.finish.consult", lambda *_: None
    )  # which runs the teacher of a poor student
    for i, extra in enumerate(([], ["method.temperature=8", "method.hard=0.5"])):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*options, *extra, f"folder={tmp_path}/{i}"])
        if i == 1:
            monkeypatch.setattr(FrozenTeacher, "forward", counted)
            asked.clear()
        train(cfg)
    assert sum(seen) <= 2 + cache_module.SPOT_CHECK + 64 + 64  # dry forwards, the spot check, the time of a step
    assert asked
    assert asked == ["student"] * len(asked)
    kept = next((tmp_path / "cache" / "evaluations").glob("*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-8])  # torn: computed again, not believed
    with initialize_config_dir(str(CONF), version_base="1.3"):
        train(compose("train", [*options, f"folder={tmp_path}/2"]))
    a, b = (json.loads((tmp_path / f"{i}" / "summary.json").read_text()) for i in (0, 2))
    assert a["student"] == b["student"]
    assert a["teacher"] == b["teacher"]


@pytest.mark.process
def test_two_ranks_share_one_cache_and_compute_each_row_once(tmp_path):
    options = [
        *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=3", "threads=1"),
        *("data.per_class=12", "data.batch_size=8", "logger=none"),
        *("net@teacher=conv4", "teacher.checkpoint=null", "teacher.allow_chance=true"),
    ]
    for mode in ("auto", "off"):
        places = [f"runs={tmp_path}", f"folder={tmp_path}/{mode}", f"teacher.cache.mode={mode}"]
        done = subprocess.run(
            [sys.executable, "scripts/train.py", *options, *places],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    marks = next(tmp_path.rglob("outputs.marks"))
    written = torch.from_file(str(marks), size=marks.stat().st_size // 8, dtype=torch.int64) != 0
    assert int(written.sum()) == 120
    a, b = (load_file(tmp_path / mode / "student.safetensors") for mode in ("auto", "off"))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_a_cache_that_is_complete_asks_no_device_what_is_missing(tmp_path, monkeypatch):
    data, asked = digits(), []
    distiller = Distiller(
        net(), KD(), net(16), example(data), data=data, allow_chance=True, cache=CacheOptions("memory"), group=4
    )
    inner = RowStore.refresh
    monkeypatch.setattr(RowStore, "refresh", lambda self, index: asked.append(len(index)) or inner(self, index))
    complete = []
    watch = LambdaCallback(on_train_epoch_end=lambda trainer, module: complete.append(module.cache.complete))
    fit(distiller, grouped(data, 4), tmp_path, max_epochs=3, callbacks=[watch])
    assert complete == [False, True, True]
    assert distiller.cache.computed == sum(asked) == len(data.train_ids)
