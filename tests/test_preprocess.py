"""Preprocessing is a part of the network: exact, invisible in names and files, and taken along wherever the network goes."""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from litdistill.config.distiller import example_batch
from litdistill.data.augment import Crop
from litdistill.data.datamodule import ImageData
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.inference import fuse_batchnorm, prepack
from litdistill.distillation.teacher_cache import TeacherCache
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.methods import FitNet
from litdistill.models.ensemble import Ensemble
from litdistill.models.finetune import freeze, head_of
from litdistill.models.preprocess import (
    Preprocess,
    Preprocessed,
    as_plain_modules,
    bare,
    check_scale,
    preprocess_of,
    without_preprocessing,
    wrap,
)
from litdistill.models.resnet import resnet
from litdistill.models.small import conv4, mlp
from litdistill.training.train import sizes_seen
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import network_sha256

MEAN, STD = (0.1, 0.25, 0.7), (0.2, 0.3, 0.45)


def images(n: int = 6, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return conv4(5, (3, 8, 8), widths=[6, 7]).eval()


def exact(x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    return (x.double() / 255 - mean) / std


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_levels_and_floats_are_normalized_as_in_float64(layout):
    x = images().contiguous(memory_format=layout)
    for given in (x, x / 255):
        found = Preprocess(MEAN, STD)(given)
        assert found.dtype == torch.float32
        assert (found - exact(x)).abs().max() < 1e-6
        assert found.is_contiguous(memory_format=layout)
    assert (Preprocess(MEAN, STD).double()(x) - exact(x)).abs().max() < 1e-12


def test_other_sizes_are_resized_and_one_channel_is_given_to_all_means():
    x = images(side=16)
    found = Preprocess(MEAN, STD, size=8)(x)
    small = nn.functional.interpolate(x.float(), (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(found, exact(small).float(), atol=1e-5)
    assert Preprocess(MEAN, STD, size=(4, 6))(x).shape == (6, 3, 4, 6)
    assert torch.equal(Preprocess(MEAN, STD, size=16)(x), Preprocess(MEAN, STD)(x))
    gray = images(channels=1)
    assert torch.equal(Preprocess(MEAN, STD)(gray), Preprocess(MEAN, STD)(gray.expand(-1, 3, -1, -1)))
    assert Preprocess(MEAN, STD, size=32).input_shape((1, 28, 28)) == (3, 32, 32)
    with pytest.raises(UserError, match="3 channels, and the images have 2"):
        Preprocess(MEAN, STD).input_shape((2, 28, 28))


@pytest.mark.parametrize(("mean", "std", "size"), [([0.5], [0.5, 1], None), ([0.5], [0.0], None), ([0.5], [1.0], [3])])
def test_impossible_options_are_refused(mean, std, size):
    with pytest.raises(UserError, match="preprocess"):
        Preprocess(mean, std, size)


def test_names_and_states_are_those_of_the_network_alone():
    inner = net()
    outer = nn.ModuleDict({"student": Preprocessed(inner, Preprocess(MEAN, STD)), "other": nn.Linear(2, 2)})
    own = [f"student.{k}" for k in inner.state_dict()]
    assert [k for k in outer.state_dict() if k.startswith("student.")] == own
    assert [k for k, _ in outer.named_parameters()][: len(list(inner.parameters()))] == [
        f"student.{k}" for k, _ in inner.named_parameters()
    ]
    again = copy.deepcopy(outer)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(outer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outer.parameters(), again.parameters(), strict=True))
    bare(again["student"]).load_state_dict(outer["student"].state_dict())  # and the other way round
    outer["student"].load_state_dict(inner.state_dict())
    with pytest.raises(RuntimeError, match="layer1"):
        outer["student"].load_state_dict({k: v for k, v in inner.state_dict().items() if "layer1" not in k})
    assert outer["student"].get_submodule("layer1.0") is inner.get_submodule("layer1.0")
    assert not outer.train()["student"].eval().net.training
    assert outer.train()["student"].net.training


WORDS = ["stages", "stages:pre", "last", "pooled"]


@pytest.mark.parametrize(
    ("make", "word"),
    [(make, word) for make in (net, lambda: resnet(5, (3, 8, 8), 8).eval()) for word in WORDS]
    + [(net, "layer2.1"), (net, "layer2.0:in")],
)
def test_features_have_the_names_and_values_of_the_network_alone(make, word):
    inner, x, preprocess = make(), images(), Preprocess(MEAN, STD)
    wrapped = Preprocessed(inner, preprocess)
    names = resolve_taps(inner, preprocess(x), word)
    assert resolve_taps(wrapped, x, word) == names
    alone, found = FeatureExtractor(inner, names)(preprocess(x)), FeatureExtractor(wrapped, names)(x)
    assert torch.equal(alone.logits, found.logits)
    assert all(torch.equal(v, found.features[k]) for k, v in alone.features.items())


def test_stages_are_told_from_the_size_that_the_network_sees():
    """A stem that halves 32 pixels is dropped as a stage, whether the images were 32 pixels wide or are made so."""

    def stem() -> nn.Module:
        torch.manual_seed(0)
        body = [nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    expected = resolve_taps(stem(), torch.zeros(2, 3, 32, 32), "stages")
    assert len(expected) == 1
    assert resolve_taps(Preprocessed(stem(), Preprocess(MEAN, STD, size=32)), images(), "stages") == expected


def test_a_part_is_frozen_by_its_name_in_the_network():
    wrapped = Preprocessed(net(), Preprocess(MEAN, STD)).train()
    assert head_of(wrapped, images()) == "fc"
    freeze(wrapped, ["head"], images())
    assert [k for k, p in wrapped.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]


def test_a_faster_form_keeps_its_preprocessing():
    x = images()
    wrapped = Preprocessed(net(), Preprocess(MEAN, STD))
    fused = fuse_batchnorm(wrapped, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    packed = prepack(fused, x)
    assert packed is not fused
    for faster in (fused, packed):
        assert preprocess_of(faster) is wrapped.preprocess
        assert torch.allclose(faster(x), wrapped(x), atol=1e-5)
    both = Ensemble([wrapped, Preprocessed(net(1), Preprocess(STD, MEAN, 8))]).eval()
    fast = fuse_batchnorm(both, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in both.modules())
    assert torch.allclose(fast(x), both(x), atol=1e-5)


def test_it_is_found_taken_off_and_traced_inside_of_another_network():
    x, inner, preprocess = images(), net(), Preprocess(MEAN, STD)
    twice = Ensemble([Preprocessed(inner, preprocess), Preprocessed(net(1), Preprocess(MEAN, STD))]).eval()
    found = preprocess_of(twice)
    assert found is not None
    assert found.facts() == {"mean": list(MEAN), "std": list(STD), "size": None}
    assert torch.allclose(without_preprocessing(twice)(found(x)), twice(x), atol=1e-6)
    assert isinstance(twice.get_submodule("0"), Preprocessed)  # what is given is a copy
    other = Ensemble([Preprocessed(inner, preprocess), Preprocessed(net(1), Preprocess(STD, MEAN))]).eval()
    assert preprocess_of(other) is None
    program = torch.export.export(as_plain_modules(other), (x,), strict=False)
    assert torch.allclose(program.module()(x), other(x), atol=1e-6)
    assert preprocess_of(inner) is None
    assert wrap(inner, None) is bare(inner) is inner
    compiled = copy.deepcopy(Preprocessed(inner, preprocess))
    compiled.compile(backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), inner(preprocess(x)), atol=1e-6)


def test_the_hash_of_a_network_is_of_its_preprocessing_too():
    inner = net()
    hashes = {
        network_sha256(n)
        for n in (
            inner,
            net(1),
            Preprocessed(inner, Preprocess(MEAN, STD)),
            Preprocessed(inner, Preprocess(STD, STD)),
            Preprocessed(inner, Preprocess(MEAN, STD, 16)),
        )
    }
    assert len(hashes) == 5
    assert network_sha256(Preprocessed(net(), Preprocess(MEAN, STD))) in hashes

    class Shift(nn.Module):
        def __init__(self, by: float):
            super().__init__()
            self.register_buffer("by", torch.tensor(by), persistent=False)

    assert network_sha256(Shift(1.0)) != network_sha256(Shift(2.0))  # what no state dict holds counts too
    tapped = mlp(3, (4,))
    before = network_sha256(tapped)
    FeatureExtractor(tapped, ["layer1"])
    assert network_sha256(tapped) == before


@pytest.mark.parametrize(
    "wrong", [torch.rand(2, 1, 8, 8) * 255, torch.randn(2, 1, 8, 8), torch.full((1, 1, 2, 2), torch.nan)]
)
def test_images_on_another_scale_are_refused_with_both_remedies(wrong):
    with pytest.raises(UserError, match=r"from 0 to 1.*without its preprocessing"):
        check_scale(Preprocess(MEAN, STD), wrong)


@pytest.mark.parametrize("right", [images(), images() / 255, torch.zeros(0), {"tokens": torch.ones(2)}])
def test_images_from_0_to_1_or_255_are_taken(right):
    check_scale(Preprocess(MEAN, STD), right)


def test_a_table_is_on_any_scale_and_standardized_by_feature():
    rows = torch.tensor([[100.0, -3.0], [300.0, 0.0]])
    table = Preprocess([100.0, -1.0], [50.0, 2.0])
    check_scale(table, rows)
    torch.testing.assert_close(table(rows), torch.tensor([[0.0, -1.0], [4.0, 0.5]]))
    torch.testing.assert_close(table(rows.long()), table(rows))
    assert table.input_shape([2]) == (2,)
    with pytest.raises(UserError, match="mean="):
        table.input_shape([3])


def test_a_network_that_does_not_normalize_takes_any_scale():
    check_scale(conv4(3, (1, 8, 8)), torch.randn(2, 1, 8, 8))


# -- other sizes for teacher and student ---------------------------------------------------------------------------------


def resized_by_pillow(image: torch.Tensor, size: int) -> torch.Tensor:
    """An image (H, W) of floats, resized by Pillow with the same filter."""
    picture = Image.fromarray(image.numpy().astype(np.float32), mode="F")
    return torch.from_numpy(np.array(picture.resize((size, size), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize(("large", "small"), [("teacher", "student"), ("student", "teacher")])
def test_teacher_and_student_see_the_same_view_at_their_own_sizes(large, small):
    sizes = {large: 20, small: 5}
    mean, std = {"teacher": [0.4], "student": [0.5]}, {"teacher": [0.3], "student": [0.2]}
    nets, given = {}, {}

    def note(role, module, args):
        given[role] = args[0].detach().clone()

    for role, size in sizes.items():
        inner = conv4(10, (1, size, size), widths=[4, 8])
        inner.register_forward_pre_hook(functools.partial(note, role))
        nets[role] = Preprocessed(inner, Preprocess(mean[role], std[role], size))
    data = ImageData("digits", batch_size=16, augment=[Crop(pad=1)], seed=3)
    data.setup()
    assert data.input_shape == (1, 8, 8)  # of the view, whatever the networks make of it
    method = FitNet(student_taps="last", teacher_taps="last")
    distiller = Distiller(nets["student"], method, nets["teacher"], example_batch(data), data=data)
    ids, views = data.train_ids[:5], torch.tensor([0, 3, 1, 2, 5])
    batch = data.get_batch("train", ids, views)
    loss = distiller.loss(batch)
    loss.backward()
    assert loss.isfinite()
    for role, size in sizes.items():
        assert given[role].shape == (5, 1, size, size)
        for seen, image in zip(given[role], batch.inputs, strict=True):
            expected = (resized_by_pillow(image[0].float(), size) / 255 - mean[role][0]) / std[role][0]
            assert torch.allclose(seen[0], expected, atol=2e-3), role  # Pillow rounds its weights
    given.clear()
    cache = TeacherCache(distiller.teacher, data, torch.device("cpu"))
    first, second = cache.outputs(batch), cache.outputs(batch)
    assert cache.computed == 5
    expected = distiller.teacher(batch)
    for name, feature in expected.features.items():
        assert torch.allclose(first.features[name], feature, atol=1e-5)
        assert torch.equal(second.features[name], first.features[name])


def test_the_sizes_that_networks_see_are_said_where_they_differ():
    data = ImageData("digits", batch_size=16)
    data.setup()
    plain = Preprocessed(conv4(10, (1, 8, 8), widths=[4]), Preprocess([0.5], [0.2]))
    larger = Preprocessed(conv4(10, (1, 16, 16), widths=[4, 4]), Preprocess([0.5], [0.2], 16))
    assert sizes_seen(data, {"the student": plain, "its teacher": None}) == ""
    assert sizes_seen(data, {"the student": plain, "its teacher": larger}) == (
        "Images and their views have 8x8 pixels: the student sees 8x8, its teacher sees 16x16."
    )
    both = Ensemble([larger, plain])
    assert "its teacher sees 16x16 and 8x8." in sizes_seen(data, {"the student": plain, "its teacher": both})
    assert "the student sees them as they are, its" in sizes_seen(
        data, {"the student": plain.net, "its teacher": larger}
    )
