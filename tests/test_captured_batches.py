"""Batches that are augmented by graphs are those that are launched, to the bit; recorded by a stand-in for CUDA graphs."""

import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from litdistill.data import augment as aug
from litdistill.data import geometry
from litdistill.data.datamodule import ImageData
from litdistill.data.loading import Rows
from litdistill.data.mixing import CutMix, Mixup
from litdistill.data.named import AUGMENTATIONS, augmentations
from litdistill.data.sources import Source, Split
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.distillation.captured_batches import CapturedBatches
from litdistill.distillation.distiller import Distiller
from litdistill.types import Group
from tests.fits import digits, example, fit, grouped, net, same
from tests.recorder import Replays, tensors

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
OPTIONS = {
    "Crop": {"pad": 2},
    "Cutout": {"size": 6, "image_size": [16, 16]},
    "ColorJitter": JITTER,
    "TimeShift": {"samples": 20},
}
SOUNDS = {"TimeShift", "TimeMask", "FrequencyMask", "Gain", "Noise"}
ALL = ["RandomResizedCrop", "Flip", "ColorJitter", "RandAugment", "RandomErasing"]


def named(*names):
    return augmentations([{name: OPTIONS.get(name, {})} for name in names])


class Colors(ImageData):
    """Noise of 16x16 pixels in three channels."""

    recordable = True

    def _load(self):
        generator = torch.Generator().manual_seed(0)
        make = lambda n: Split(  # noqa: E731
            torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator), torch.arange(n) % 4
        )
        return Source(make(60), make(8), ("a", "b", "c", "d"))


def sounds(**options):
    generator = torch.Generator().manual_seed(0)
    make = lambda n: TensorSplit(torch.rand(n, 200, generator=generator), torch.arange(n) % 4)  # noqa: E731
    return TensorData(
        lambda: TensorSource(make(60), make(8), ("a", "b", "c", "d"), "sound"), "noise", "classification", **options
    )


def made_of(kind, names, mix=None, **options):
    more = {"mix": mix} if mix is not None else {}
    data = kind(*(["digits"] if kind is Colors else []), augment=named(*names), batch_size=8, **more, **options)
    data.setup()
    return data


def requests(data, epochs=2):
    """What a training of groups asks for: cuts of 4, 4, 4 and a smaller one."""
    loader = data.train_loader(group=4)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield from loader


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """All images of a batch are computed, as on other devices than a CPU."""
    monkeypatch.setattr(aug, "PER_IMAGE", ())


CASES = [
    *((Colors, [name], None) for name in AUGMENTATIONS if name not in {*SOUNDS, "Crop", "Flip"}),
    *((sounds, [name], None) for name in sorted(SOUNDS)),
    (Colors, ALL, None),
    (Colors, ["Crop", "Flip"], Mixup()),
    (Colors, ["RandAugment"], CutMix()),
]


@pytest.mark.parametrize(("kind", "names", "mix"), CASES)
def test_recorded_batches_are_launched_ones_to_the_bit(as_on_a_gpu, kind, names, mix, caplog):
    caplog.set_level("INFO", "litdistill")
    data = made_of(kind, names, mix)
    recorder = Replays()
    captured = CapturedBatches(data, recorder)
    rows = [*requests(data), *requests(data)]
    found = [captured.make_batch(r) for r in rows]
    assert recorder.recorded > 0, caplog.text
    assert captured.replayed > recorder.recorded
    for r, group in zip(rows, found, strict=True):  # after all were made: none overwrites another
        launched = data.make_batch(r)
        assert group._replace(batch=None) == launched._replace(batch=None)
        for a, b in zip(tensors(group.batch), tensors(launched.batch), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


class OnHost(TorchDispatchMode):
    """Notes what copies a tensor from the host to the device or reads one, and counts what is launched."""

    def __init__(self):
        super().__init__()
        self.found, self.launched = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        devices = lambda found: {x.device.type for x in tensors(found)}  # noqa: E731
        if "cuda" in devices([out]) and "cpu" in devices([args, kwargs or {}]):
            self.found.append(str(func))
        self.launched += "cuda" in devices([out]) and not func.is_view
        return out


def augmented(shape, names, mix=None, count=32, kind=torch.uint8):
    """Makes a batch of fake tensors on a GPU twice; returns what the second has copied, and how much it has launched."""
    steps, both = named(*names), 2 if mix is not None else 1
    for step in steps:  # numbers of the host are kept, which fake tensors do not have
        step.apply(torch.zeros(step.views or 2, *shape).to(kind), torch.arange(step.views or 2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(both * count, *shape, dtype=kind, device="cuda")
        ids = torch.empty(both * count, dtype=torch.int64, device="cuda")
        for _ in range(2):  # tables are copied once
            with OnHost() as drawn:
                aug.draw_views(steps, 0, ids, ids)
            with OnHost() as seen:
                made = aug.apply_views(steps, images.index_select(0, ids), ids, 0, ids)
                if mix is not None:
                    mix.apply(*made.tensor_split(2), aug.random_bits(0, ids[:count], ids[:count], -2))
    seen.found += drawn.found
    return seen


@pytest.mark.parametrize(
    ("shape", "names", "mix"),
    [
        *(((3, 16, 16), [name], None) for name in AUGMENTATIONS if name not in SOUNDS),
        *(((200,), [name], None) for name in sorted(SOUNDS)),
        ((3, 16, 16), ["Flip"], Mixup()),
        ((3, 16, 16), ["Flip"], CutMix()),
    ],
)
def test_on_a_gpu_augmentations_copy_nothing_from_the_host(shape, names, mix):
    seen = augmented(shape, names, mix, kind=torch.uint8 if len(shape) == 3 else torch.float32)
    assert seen.found == []
    assert seen.launched > 0


def test_on_a_gpu_targets_follow_without_a_copy_from_the_host():
    steps = named("RandomResizedCrop", "Flip")
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.empty(8, dtype=torch.int64, device="cuda")
        for _ in range(2):
            with OnHost() as seen:
                moves = geometry.moves_of(steps, ids, 0, ids, (16, 16))
                geometry.follow("boxes", torch.empty(8, 3, 6, device="cuda"), moves)
    assert seen.found == []


def test_crops_and_flips_are_launched():
    data, recorder = digits(augment=named("Crop", "Flip")), Replays()
    captured = CapturedBatches(data, recorder)
    for rows in [*requests(data), *requests(data)]:
        captured.make_batch(rows)
    assert (recorder.recorded, captured.reason) == (0, None)


class Dim:
    """An augmentation of one's own."""

    views = 2

    def draw(self, bits):
        return bits % 2

    def apply(self, images, code):
        return images // (1 + code.view(-1, 1, 1, 1)).to(torch.uint8)


class Pure(Dim):
    recordable = True


class Draws(Pure):
    def apply(self, images, code):
        return images // torch.randint(1, 3, (len(images), 1, 1, 1), dtype=torch.uint8)


class Reads(Pure):
    def apply(self, images, code):
        return images[code.nonzero()[:1, 0]].expand_as(images)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Dim, "Dim may change with each batch in Python; if not, it says recordable = True"),
        (Draws, "an augmentation draws from torch's generator"),
        (Reads, "aten.nonzero"),
    ],
)
def test_what_cannot_be_recorded_is_launched_and_said_once(step, words, caplog):
    caplog.set_level("INFO", "litdistill")
    data, recorder = digits(augment=[step()]), Replays()
    captured = CapturedBatches(data, recorder)
    for rows in [*requests(data), *requests(data)]:
        captured.make_batch(rows)
    assert recorder.recorded == 0
    assert [words in line for line in caplog.messages].count(True) == 1


def test_images_that_are_decoded_anew_are_launched_and_said(caplog):
    caplog.set_level("INFO", "litdistill")
    data = digits(augment=[Pure()])
    captured = CapturedBatches(data, Replays())
    for rows in requests(data):
        captured.make_batch(rows._replace(images=data.source.train.images[rows.ids]))
    assert "decoded anew" in caplog.text


def test_a_graph_that_cannot_be_made_is_launched_and_said(caplog):
    class Full(Replays):
        def record(self, step):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    caplog.set_level("INFO", "litdistill")
    data = digits(augment=[Pure()])
    captured = CapturedBatches(data, Full())
    for rows in [*requests(data), *requests(data)]:
        assert isinstance(captured.make_batch(rows), Group)
    assert captured.reason == "CUDA out of memory."


def test_a_batch_without_views_and_a_single_minibatch_are_launched():
    data = digits(augment=[Pure()])
    captured = CapturedBatches(data, Replays())
    ids = data.train_ids[:4]
    for rows in (Rows("train", ids), Rows("train", ids, torch.zeros_like(ids))) * 4:
        captured.make_batch(rows)
    assert captured.replayed == 0


def test_a_run_with_recorded_batches_and_steps_is_that_with_launched_ones(tmp_path, as_on_a_gpu):
    """Photometric views of every epoch, and a step that draws random numbers of its own."""

    def trained(recorder):
        data = digits(per_class=23, batch_size=20, augment=named("Crop", "RandomErasing"))
        torch.manual_seed(0)
        distiller = Distiller(
            nn.Sequential(net(), nn.Dropout(0.1)), None, None, example(data), allow_chance=True, seed=0, group=4,
            optimizer=functools.partial(SGD, lr=0.1, fused=True), recorder=recorder, data=data,
        )  # fmt: skip
        module = grouped(data, 4, 5, recorder)
        counts = []
        release = module.teardown
        module.teardown = lambda stage: (counts.append(getattr(module.captured, "replayed", 0)), release(stage))
        fit(distiller, module, tmp_path, max_epochs=3)
        return distiller, max(counts), module

    one, none, _ = trained(None)
    many, replayed, module = trained(Replays())
    assert (none, module.captured) == (0, None)
    assert replayed > 0
    assert same(one, many)
