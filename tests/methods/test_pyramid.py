"""The tap `pyramid`: the levels of an FPN, which levels of two networks belong together, and the methods that compare them."""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn, fcos_resnet50_fpn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.features.pyramid import same_stride
from litdistill.methods import AT, CWD, PKD, FitNet, Pairs
from litdistill.methods.base import Method
from litdistill.methods.pairs import Pair
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests.fits import digits, example, fit, same


class Pyramid(nn.Module):
    """A classifier on the mean of all levels of an FPN; stages of the strides 1, 2, 4, ... are made of 8x8 digits."""

    def __init__(self, width: int, levels: int = 3, first: int = 0, extra: nn.Module | None = None, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = first
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1 if i == 0 else width, width, 3, 1 if i == 0 else 2, 1), nn.ReLU(inplace=True))
            for i in range(levels)
        )
        self.fpn = FeaturePyramidNetwork([width] * (levels - first), width, extra_blocks=extra)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = OrderedDict()
        for i, stage in enumerate(self.body):
            x = stage(x)
            maps[str(i)] = x
        found = self.fpn(OrderedDict(list(maps.items())[self.first :]))
        self.given = list(found.values())
        return self.classifier(torch.stack([level.mean((2, 3)) for level in found.values()]).mean(0))


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def read(net: nn.Module, taps: str | list[str] = "pyramid", x: Tensor = IMAGES) -> Outputs:
    extractor = FeatureExtractor(net, resolve_taps(net, x, taps))
    try:
        return extractor(x)
    finally:
        extractor.remove()


def sizes(net: nn.Module, x: Tensor = IMAGES) -> list[tuple[int, ...]]:
    return [tuple(f.shape[2:]) for f in read(net, x=x).features.values()]


# -- the tap ------------------------------------------------------------------------------------------------------------


def test_levels_are_those_that_the_network_returns_finest_first():
    net = Pyramid(8, extra=LastLevelP6P7(8, 8))
    order: list[str] = []
    for name, module in net.fpn.named_modules():
        if name.startswith("layer_blocks.") and name.count(".") == 1:
            module.register_forward_hook(lambda m, a, o, name=name: order.append(name))
    features = read(net).features
    assert list(features) == [f"fpn.layer_blocks.{i}" for i in range(3)] + [
        "fpn.extra_blocks.p6",
        "fpn.extra_blocks.p7",
    ]
    assert order[:3] == ["layer_blocks.2", "layer_blocks.1", "layer_blocks.0"]  # the FPN itself runs the coarsest first
    assert all(a is b for a, b in zip(features.values(), net.given, strict=True))


def test_levels_of_one_size_keep_their_order():
    net = Pyramid(4, levels=6, extra=LastLevelP6P7(4, 4))
    assert sizes(net) == [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert all(a is b for a, b in zip(read(net).features.values(), net.given, strict=True))


def test_a_pooled_level_is_left_out():
    assert sizes(Pyramid(4, extra=LastLevelMaxPool())) == [(8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize(
    ("make", "strides"),
    [(fcos_resnet50_fpn, [8, 16, 32, 64, 128]), (fasterrcnn_mobilenet_v3_large_320_fpn, [32, 32])],
)
def test_levels_of_torchvisions_detectors(make, strides):
    net = make(weights=None, weights_backbone=None, num_classes=3, trainable_backbone_layers=None).backbone
    names = resolve_taps(
        net, torch.zeros(1, 3, 128, 128), "pyramid", lambda net, x: Outputs.of(net(x)["0"].mean((2, 3)))
    )
    assert [128 // n[0] for n in _map_sizes(net, names)] == strides
    assert names[0] == "fpn.layer_blocks.0"


def _map_sizes(net: nn.Module, names: list[str]) -> list[tuple[int, ...]]:
    extractor = FeatureExtractor(net, names)
    found = extractor.run(lambda net: Outputs.of(next(iter(net(torch.zeros(1, 3, 128, 128)).values())))).features
    return [tuple(x.shape[2:]) for x in found.values()]


def test_preprocessing_copies_and_members_change_nothing():
    net = Pyramid(4)
    names = resolve_taps(net, IMAGES, "pyramid")
    wrapped = Preprocessed(net, Preprocess([0.3], [0.35]))
    assert resolve_taps(wrapped, IMAGES, "pyramid") == names
    assert resolve_taps(copy.deepcopy(net), IMAGES, "pyramid") == names
    given = OrderedDict((k, torch.zeros(1, 4, n, n)) for k, n in (("a", 8), ("b", 4), ("c", 2)))
    alone = resolve_taps(net.fpn, given, "pyramid", lambda net, x: Outputs.of(net(x)["a"]))
    assert alone == [n.removeprefix("fpn.") for n in names]
    ensemble = Ensemble([Pyramid(4), Pyramid(4, seed=1)])
    assert resolve_taps(ensemble, IMAGES, "1.pyramid") == [f"1.{n}" for n in names]


def test_a_network_without_or_with_several_is_refused():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10))
    with pytest.raises(UserError, match=r"has none\. Name the maps instead"):
        resolve_taps(plain, IMAGES, "pyramid")
    several = Pyramid(4)
    several.other = Pyramid(4)
    with pytest.raises(UserError, match=r"has 2 of them \(fpn, other.fpn\)"):
        resolve_taps(several, IMAGES, "pyramid")


# -- which levels belong together ---------------------------------------------------------------------------------------


def maps(*given: tuple[int, int]) -> list[Tensor]:
    return [torch.zeros(1, 2, *size) for size in given]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([(8, 8), (4, 4), (2, 2)], [(8, 8), (4, 4), (2, 2)], [(0, 0), (1, 1), (2, 2)]),
        ([(4, 4), (2, 2)], [(8, 8), (4, 4), (2, 2), (1, 1)], [(0, 1), (1, 2)]),  # not counted from the last
        ([(16, 16), (8, 8), (4, 4)], [(4, 4), (8, 8)], [(1, 1), (2, 0)]),
        ([(10, 14), (5, 7)], [(8, 12), (4, 6)], [(0, 0), (1, 1)]),  # a teacher that resizes by 0.8
        ([(1, 1), (1, 1)], [(1, 1), (1, 1)], [(0, 0), (1, 1)]),
        ([(8, 4)], [(4, 8)], []),
        ([(8, 8)], [(4, 4), (2, 2)], []),
    ],
)
def test_levels_belong_together_by_their_size(student, teacher, expected):
    assert same_stride(maps(*student), maps(*teacher)) == expected


def test_a_level_that_one_network_alone_has_is_left_out_with_a_line(caplog):
    student, teacher = read(Pyramid(4, first=1)), read(Pyramid(6, extra=LastLevelP6P7(6, 6)))
    method = PKD(student_taps="pyramid", teacher_taps="pyramid")
    with caplog.at_level(logging.INFO):
        method.build(student, teacher, None)
    assert [(s.shape[2], t.shape[2]) for s, t in method.pairs(student, teacher)] == [(4, 4), (2, 2)]
    lines = [r.message for r in caplog.records if "leaves out" in r.message]
    assert lines == [
        "pkd leaves out levels that the teacher alone has: fpn.layer_blocks.0 (8x8), fpn.extra_blocks.p6 (1x1), "
        "fpn.extra_blocks.p7 (1x1)."
    ]


def test_pyramids_without_a_common_level_are_refused():
    student = read(Pyramid(4, levels=1))
    teacher = read(Pyramid(4, levels=3, first=1))
    for method in (AT(student_taps="pyramid", teacher_taps="pyramid"), PKD(student_taps="pyramid", teacher_taps=["a"])):
        with pytest.raises(UserError, match="student's maps are 8x8, the teacher's 4x4, 2x2"):
            method.build(student, teacher, None)


# -- the methods on them ------------------------------------------------------------------------------------------------


def pyramids(channels: int, *given: int, seed: int = 0) -> Outputs:
    """FPN-like maps: smooth, not centered, of one width."""
    g = torch.Generator().manual_seed(seed)
    found = {f"l{n}": torch.randn(3, channels, n, n + 1, generator=g) * 2 + 0.5 for n in given}
    return Outputs.of(torch.zeros(3, 5), found)


def by_stride(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    return [(s, teacher.features[k]) for k, s in student.features.items() if k in teacher.features]


def pkd_by_hand(s: Tensor, t: Tensor) -> Tensor:
    """1 − r, channel by channel over batch and positions, by torch's own correlation."""
    rows = [torch.corrcoef(torch.stack([s[:, c].flatten(), t[:, c].flatten()]))[0, 1] for c in range(s.shape[1])]
    return torch.stack([1 - r for r in rows]).mean()


def cwd_by_hand(s: Tensor, t: Tensor) -> Tensor:
    """Equation 4 of CWD: T²/C · Σ_c Σ_i φ(t) log(φ(t) / φ(s)), the mean over the batch."""
    total = s.new_zeros(())
    for a, b in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True):
        p, q = ((x / 4).exp() / (x / 4).exp().sum() for x in (b.flatten(), a.flatten()))
        total = total + 16 * (p * (p / q).log()).sum()
    return total / (s.shape[0] * s.shape[1])


def at_by_hand(s: Tensor, t: Tensor) -> Tensor:
    q_s, q_t = ((x**2).sum(1).flatten(1) for x in (s, t))
    return ((q_s / q_s.norm(dim=1, keepdim=True) - q_t / q_t.norm(dim=1, keepdim=True)) ** 2).mean()


LEVELS = [
    (lambda: PKD(student_taps="pyramid", teacher_taps="pyramid"), 10.0, pkd_by_hand),
    (lambda: CWD(student_taps="pyramid", teacher_taps="pyramid"), 50.0, cwd_by_hand),
    (lambda: AT(student_taps="pyramid", teacher_taps="pyramid"), 1000.0, at_by_hand),
]


@pytest.mark.parametrize("channels", [5, 3], ids=["same", "projected"])
@pytest.mark.parametrize(("make", "weight", "by_hand"), LEVELS, ids=["pkd", "cwd", "at"])
def test_sums_over_levels_equal_the_formula_in_float64_with_gradients(make, weight, by_hand, channels):
    torch.manual_seed(0)
    student, teacher = pyramids(channels, 8, 4, 2, seed=1), pyramids(5, 16, 8, 4, seed=2)
    method = make()
    method.build(student, teacher, None)
    for x in student.features.values():
        x.requires_grad_()
    value = method(student, teacher, Batch(None, torch.zeros(3)))["hint"]
    project = list(getattr(method, "projectors", [nn.Identity()] * 2))
    assert len(project) == 2
    wide = {k: v.detach().double().requires_grad_() for k, v in student.features.items()}
    expected = torch.zeros((), dtype=torch.float64)
    for layer, (k, t) in zip(project, [("l8", teacher.features["l8"]), ("l4", teacher.features["l4"])], strict=True):
        mapped = wide[k]
        if isinstance(layer, nn.Conv2d):
            assert channels != 5
            bias = None if layer.bias is None else layer.bias.double()
            mapped = F.conv2d(mapped, layer.weight.double(), bias)
        expected = expected + weight * by_hand(mapped, t.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(value, list(student.features.values()), allow_unused=True)
    grads64 = torch.autograd.grad(expected, list(wide.values()), allow_unused=True)
    assert (
        [g is None for g in grads] == [g is None for g in grads64] == [False, False, True]
    )  # 2x3: the teacher has none
    for a, b in zip(grads[:2], grads64[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)


def test_fitnet_takes_the_middle_of_the_common_levels():
    student, teacher = pyramids(3, 8, 4, 2), pyramids(5, 16, 8, 4, seed=1)
    method = FitNet(student_taps="pyramid", teacher_taps="pyramid")
    method.build(student, teacher, None)
    ((s, t),) = method.pairs(student, teacher)
    assert s is student.features["l4"]
    assert t is teacher.features["l4"]
    assert method.regressor(s).min() < 0  # levels have no ReLU, and a regressor with one could not reach them


def test_pairs_are_of_one_stride_and_those_of_a_pyramid_and_named_maps_too():
    student, teacher = Pyramid(4, first=1), Pyramid(6, extra=LastLevelP6P7(6, 6), seed=1)
    for nodes in (("pyramid", "pyramid"), ("pyramid", "stages")):
        method = Pairs([Pair(*nodes, "mse", 2.0), Pair("logits", "logits", "kl")])
        method.prepare(student, teacher, IMAGES)
        s, t = read(student, list(method.taps().student)), read(teacher, list(method.taps().teacher))
        method.build(s, t, None)
        parts = method.comparisons[method.names["pairs[0]"]]
        sizes = [(s.features[a].shape[2], t.features[b].shape[2]) for a, b in method.nodes["pairs[0]"]]
        assert sizes == [(4, 4), (2, 2)]
        expected = sum(
            F.mse_loss(part.projector(s.features[a]), t.features[b])
            for part, (a, b) in zip(parts, method.nodes["pairs[0]"], strict=True)
        )
        torch.testing.assert_close(method(s, t, Batch(None, torch.zeros(3)))[method.names["pairs[0]"]], 2 * expected)


def test_pairs_refuse_a_pyramid_beside_logits():
    net = Pyramid(4)
    method = Pairs([Pair("pyramid", "logits", "mse")])
    method.prepare(net, net, IMAGES)
    with pytest.raises(UserError, match=r"pairs\[0\]: a pyramid is paired with maps"):
        method.build(read(net), Outputs.of(torch.zeros(3, 10)), None)


# -- whole runs ---------------------------------------------------------------------------------------------------------

METHODS = [
    lambda: PKD(student_taps="pyramid", teacher_taps="pyramid"),
    lambda: CWD(student_taps="pyramid", teacher_taps="pyramid"),
    lambda: Pairs([Pair("pyramid", "pyramid", "cosine")]),
]


def trained(tmp_path, method: Method, cache: CacheOptions) -> Distiller:
    data = digits()
    student = Preprocessed(Pyramid(4, first=1), Preprocess([0.3], [0.35]))
    teacher = Preprocessed(Pyramid(6, seed=1, extra=LastLevelP6P7(6, 6)), Preprocess([0.3], [0.35]))
    distiller = Distiller(
        student, method, FrozenTeacher(teacher), example(data), optimizer=functools.partial(torch.optim.SGD, lr=0.05),
        allow_chance=True, data=data, cache=cache, seed=0,
    )  # fmt: skip
    fit(distiller, data, tmp_path, enable_checkpointing=False, limit_val_batches=0)
    return distiller


@pytest.mark.parametrize("make", METHODS, ids=["pkd", "cwd", "pairs"])
def test_a_run_with_the_cache_is_that_with_the_live_teacher(tmp_path, make):
    torch.manual_seed(0)
    live = trained(tmp_path, make(), CacheOptions("off"))
    torch.manual_seed(0)
    cached = trained(tmp_path, make(), CacheOptions("memory"))
    assert cached.cache is not None
    assert cached.cache.computed == 120
    assert [tuple(n for n in d.teacher.taps) for d in (live, cached)] == [cached.teacher.taps] * 2
    assert cached.teacher.taps[0] == "fpn.layer_blocks.0"
    a, b = live.student.state_dict(), cached.student.state_dict()
    assert all(torch.allclose(v, b[k], atol=1e-5) for k, v in a.items())
    assert not same(Preprocessed(Pyramid(4, first=1), Preprocess([0.3], [0.35])), cached.student)
