"""The teacher's cache: exact, shared, and never believed without reason."""

import functools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import InterpolationMode as Interpolation

from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.mixing import Mixup
from litdistill.distillation import teacher_cache as cache_module
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.row_store import RowStore, fingerprint
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import (
    CacheOptions,
    TeacherCache,
    cache_key,
    expected_saving,
    make_room,
)
from litdistill.evaluation import predictions
from litdistill.methods.at import AT
from litdistill.methods.fitnet import FitNet
from litdistill.methods.kd import KD
from litdistill.methods.pairs import Pair, Pairs
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.tasks.classification import Classification
from litdistill.training.train import train
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import stable_repr
from litdistill.utils.paths import CONF
from tests.fits import example, fit, grouped


class Dim:
    """An augmentation with no end of views: each image darker by some shade."""

    views = None

    def draw(self, bits):
        return bits

    def apply(self, images, code):
        return (images * (0.5 + 0.5 * (code % 2**20) / 2**20)[:, None, None, None]).to(torch.uint8)


CPU = torch.device("cpu")


TASK = Classification()
PAIRS = functools.partial(
    Pairs, [Pair("layer1", "layer2", "attention", 9.0), Pair("stages", "stages"), Pair("logits", "logits", "kl")]
)


def net(width: int = 8, seed: int = 0, mean: float = 0.3):
    torch.manual_seed(seed)
    return Preprocessed(conv4(10, (1, 8, 8), widths=[width, width]), Preprocess([mean], [0.35]))


def frozen(taps=(), seed: int = 1) -> FrozenTeacher:
    return FrozenTeacher(net(16, seed), taps=taps)


def digits(seed: int = 0, augment=(), **options) -> ImageData:
    data = ImageData("digits", per_class=12, subset_seed=0, batch_size=40, augment=augment, seed=seed, **options)
    data.setup()
    return data


def run(
    tmp_path, cache: CacheOptions, augment=(), method=None, epochs: int = 4, seed: int = 0, group: int = 4, **of_data
):
    """The losses of a short fit, how many images the teacher saw in it, and the student's weights."""
    losses, seen = [], []

    class Spy(Distiller):
        def loss(self, *a):
            loss = super().loss(*a)
            losses.append(loss.item())
            return loss

    data = digits(seed, augment, **of_data)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05)
    distiller = Spy(
        net(), method or KD(), net(16, seed=1), example(data), optimizer=optimizer, allow_chance=True, data=data, cache=cache,
        group=group,
    )  # fmt: skip
    count = lambda module, args, output: seen.append(len(args[0].inputs))  # noqa: E731
    distiller.teacher.register_forward_hook(count)
    fit(distiller, grouped(data, group), tmp_path, max_epochs=epochs, enable_checkpointing=False, limit_val_batches=0)
    return losses, sum(seen), distiller.student.state_dict(), distiller


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


@pytest.mark.parametrize(
    "change", ["teacher", "network", "data", "augment", "mix", "dtype", "taps", "precision", "seed", "mean", "mode"]
)
def test_whatever_changes_what_the_teacher_says_is_another_cache(change):
    def key(**c):
        data = digits(c.get("seed", 0), c.get("augment", [Crop(1)]), mix=c.get("mix"))
        if c.get("data"):
            data.source.train.images[0, 0, 0, 0] += 1
        inner = net(16, seed=c.get("weights", 1), mean=c.get("mean", 0.3))
        if c.get("network"):
            inner.net.layer1[2] = torch.nn.LeakyReLU()
        teacher = FrozenTeacher(inner, taps=c.get("taps", []), compile=c.get("mode"))
        return cache_key(teacher, data, CPU, c.get("dtype", torch.float32), c.get("precision", "32-true"))

    changes = {
        "teacher": {"weights": 2}, "network": {"network": True}, "data": {"data": True}, "augment": {"augment": [Crop(2)]},
        "dtype": {"dtype": torch.float16}, "taps": {"taps": ["layer1"]}, "precision": {"precision": "bf16-mixed"},
        "mean": {"mean": 0.2}, "mix": {"mix": Mixup(0.5)}, "mode": {"mode": "prepacked"},
    }  # fmt: skip
    assert key() == key()
    mixed = [key(mix=Mixup(0.5)), key(mix=Mixup(0.2)), key(mix=Mixup(0.5), seed=1)]
    assert len({*mixed, key()}) == 4
    if change == "seed":  # the views of an image are numbered the same for every seed, unless there is no end of them
        assert key(seed=1) == key()
        assert key(seed=1, augment=[Dim()]) != key(augment=[Dim()])
    else:
        assert key(**changes[change]) != key()


@pytest.mark.parametrize("damage", ["row", "place", "mark", "half"])
def test_a_row_that_was_torn_or_damaged_does_not_count(tmp_path, damage):
    values = torch.randn(6, 5)
    store = RowStore(6, 5, torch.float32, CPU, tmp_path / "a")
    store.put(torch.arange(4), values[:4])
    again = RowStore(6, 5, torch.float32, CPU, tmp_path / "a")
    assert again.valid.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(again.get(torch.arange(4))[0], values[:4])
    if damage == "row":
        again.values.view(torch.int32)[2, 3] ^= 1  # a single bit
    elif damage == "place":
        again.values[2], again.marks[2] = again.values[3].clone(), again.marks[3].clone()
    elif damage == "mark":
        again.marks[2] = 0
    else:
        again.values[2, :2] = 0
    assert RowStore(6, 5, torch.float32, CPU, tmp_path / "a").valid.tolist() == [True, True, False, True, False, False]


def test_a_fingerprint_is_its_formula_and_never_zero():
    values = torch.zeros(3, 4)
    assert (fingerprint(values, torch.arange(3)) != 0).all()
    assert len(set(fingerprint(values, torch.arange(3)).tolist())) == 3
    swapped = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]])
    marks = fingerprint(swapped, torch.zeros(2, dtype=torch.int64))
    assert marks[0] != marks[1]


def test_a_file_that_is_not_the_teachers_is_dropped_with_a_warning(tmp_path, caplog):
    data, teacher = digits(), frozen()
    batch = data.get_batch("train", data.train_ids, None)
    cache = TeacherCache(teacher, data, CPU, tmp_path)
    right = cache.outputs(batch).logits
    cache.store.put(data.train_ids, right + 1)  # well-formed, and wrong
    other = TeacherCache(teacher, data, CPU, tmp_path)
    assert torch.equal(other.outputs(batch).logits, right)
    assert "computed anew" in caplog.text


def test_processes_that_run_at_once_share_their_rows(tmp_path):
    data, teacher = digits(), frozen()
    batch = data.get_batch("train", data.train_ids, None)
    a, b = (TeacherCache(teacher, data, CPU, tmp_path) for _ in range(2))
    b.outputs(data.get_batch("train", data.train_ids[:1], None))  # both are open before either has computed the rest
    first = a.outputs(batch).logits
    assert torch.equal(b.outputs(batch).logits, first)
    assert b.computed == 1


@pytest.mark.process
def test_a_kill_in_the_middle_of_a_write_leaves_whole_rows_only(tmp_path):
    code = f"""
        import os, torch
        from pathlib import Path
        from litdistill.distillation import row_store
        store = row_store.RowStore(64, 1000, torch.float32, torch.device("cpu"), Path({str(tmp_path)!r}) / "a")
        store.put(torch.arange(10), torch.full((10, 1000), 2.0))
        row_store.fingerprint = lambda *a: os.kill(os.getpid(), 9)   # after the rows, before their marks
        store.put(torch.arange(5, 20), torch.full((15, 1000), 3.0))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -9
    store = RowStore(64, 1000, torch.float32, CPU, tmp_path / "a")
    assert store.valid.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    losses, *_, distiller = run(tmp_path, CacheOptions("disk", tmp_path / "cache"))
    assert "kept in memory" in caplog.text
    assert "No space left" in caplog.text
    assert distiller.cache.computed == 120
    assert len(losses) == 12


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
    *_, distiller = run(tmp_path, auto._replace(gb=1e-5), epochs=4)
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
    assert len(distiller.cache.store.valid) == 2 * len(data.train_targets)


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


def test_a_bit_far_out_in_a_wide_row_counts_too():
    values = torch.randn(1, 1000)
    before = fingerprint(values, torch.zeros(1, dtype=torch.int64))
    values.view(torch.int32)[0, 900] ^= 1
    assert fingerprint(values, torch.zeros(1, dtype=torch.int64)) != before


def test_a_cache_that_is_used_counts_as_new(tmp_path):
    options = CacheOptions("disk", tmp_path)
    *_, distiller = run(tmp_path, options)
    os.utime(distiller.cache.folder, (1, 1))
    run(tmp_path, options)
    assert distiller.cache.folder.stat().st_mtime > 1e9


def test_the_longest_unused_goes_first(tmp_path):
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.rows").write_bytes(b"0" * 100)
        os.utime(tmp_path / name, (i, i))
    make_room(tmp_path / "new", needed=50, limit=260)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    make_room(tmp_path / "b", needed=160, limit=260)  # one that is there already and has to grow
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "c"]
    make_room(tmp_path / "b", needed=160, limit=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    make_room(tmp_path / "new", needed=50, limit=60)
    assert not list(tmp_path.iterdir())


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


class Act(torch.nn.Module):
    """A network that is not all in its layers: what it applies and scales by are plain attributes."""

    def __init__(self, act=F.relu, scale: float = 1.0):
        super().__init__()
        self.fc, self.act, self.scale = torch.nn.Linear(64, 10), act, scale

    def forward(self, images):
        return self.act(self.fc(images.flatten(1) / 255)) * self.scale


def _acts():
    torch.manual_seed(0)
    first = Act()
    others = Act(torch.tanh), Act(scale=2.0)
    for other in others:
        other.load_state_dict(first.state_dict())
    member = net(16)
    return [first, *others, Ensemble([member, net(8)]), Ensemble([member, net(8)], average="probabilities")]


def test_networks_of_the_same_weights_that_compute_otherwise_share_no_rows():
    data = digits()
    key = functools.partial(cache_key, data=data, device=CPU, dtype=torch.float32, precision="32-true")
    keys = [key(FrozenTeacher(n)) for n in _acts()]
    assert len(set(keys)) == 5
    assert keys == [key(FrozenTeacher(n)) for n in _acts()]  # and no address of an object is in a key


def test_a_network_that_holds_what_holds_it_is_described_too():
    one, other = Act(functools.partial(F.leaky_relu, negative_slope=0.1)), Act(functools.partial(F.leaky_relu))
    for module in (one, other):
        module.owners = [{"owner": module}]
    assert stable_repr(one) == stable_repr(one) != stable_repr(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Interpolation.NEAREST, Interpolation.BICUBIC),
        ({1, 2}, {1, 3}),
        (Path("a"), Path("b")),
        (torch.half, torch.float),
    ],
)
def test_values_without_attributes_are_told_apart(one, other):
    assert stable_repr(one) == stable_repr(one) != stable_repr(other)
    assert stable_repr({"b", "a"}) == ["'a'", "'b'"]  # in an order that no hash decides


def test_evaluations_that_are_not_the_networks_are_computed_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "logits_key", lambda *_: "key")  # as if it lacked what tells two networks apart
    one, other, data = Act(), Act(torch.tanh), digits()
    for teacher in (one, other, one):
        found = predictions.teacher_outputs(teacher, data, TASK, "val", "cpu", tmp_path).logits
        assert torch.equal(found, predictions.collect(teacher, data, "val")[0])
    assert caplog.text.count("does not hold the teacher's logits") == 2


def test_augmentations_that_differ_in_a_large_table_share_no_rows():
    class Table(Flip):
        def __init__(self, table):
            self.table = table

    tables = [torch.zeros(2000) for _ in range(2)]
    tables[1][1000] = 1
    keys = [cache_key(FrozenTeacher(net()), digits(augment=[Table(t)]), CPU, torch.float32, "") for t in tables]
    assert keys[0] != keys[1]


def test_rows_that_are_no_numbers_are_not_believed(tmp_path, caplog):
    options = CacheOptions("disk", tmp_path)
    *_, distiller = run(tmp_path, options)
    store = distiller.cache.store
    rows = store.valid.nonzero().flatten()
    store.put(rows, torch.full((len(rows), 10), torch.nan))  # with the marks that belong to them
    losses, *_ = run(tmp_path, options)
    assert "does not hold the teacher's outputs" in caplog.text
    assert all(map(math.isfinite, losses))


def test_outputs_beyond_half_precision_are_refused():
    store = RowStore(2, 3, torch.float16, CPU)
    store.put(torch.tensor([0]), torch.full((1, 3), 60000.0))
    with pytest.raises(UserError, match="float32"):
        store.put(torch.tensor([1]), torch.full((1, 3), 70000.0))


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
