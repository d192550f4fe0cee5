"""The first half of the feature methods: terms, weights, projectors, phases, pairing; expected values in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litdistill.methods.ab import AB
from litdistill.methods.at import AT
from litdistill.methods.base import Method
from litdistill.methods.fitnet import FitNet
from litdistill.methods.fsp import FSP
from litdistill.methods.ft import FT
from litdistill.methods.nst import NST
from litdistill.methods.pkt import PKT
from litdistill.methods.vid import VID
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import Reader, batch


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(channels: list[int], sizes: list[tuple[int, int]], n: int = 2, seed: int = 0) -> Outputs:
    features = {
        f"layer{i}": tensor((n, c, *hw), seed + i).requires_grad_()
        for i, (c, hw) in enumerate(zip(channels, sizes, strict=True))
    }
    return Outputs.of(tensor((n, 5), seed + 50).requires_grad_(), features)


# student and teacher: three stages with other widths; more stages than the other; sizes halved, doubled, neither
PAIRS = [
    (([3, 4, 6], [(8, 6), (4, 3), (2, 2)]), ([4, 4, 8], [(8, 6), (4, 3), (2, 2)])),
    (([1, 2], [(8, 6), (4, 3)]), ([2, 5, 1, 3], [(16, 12), (8, 6), (4, 3), (2, 3)])),
    (([3, 4, 6, 2], [(12, 12), (8, 8), (4, 4), (3, 2)]), ([2, 3], [(7, 7), (3, 4)])),
]
MAKERS = {
    **{"fitnet": FitNet, "at": AT, "nst": NST, "pkt": lambda: PKT(), "vid": VID, "ab": AB, "ft": FT, "fsp": FSP},
    **{"ft_second": lambda: at_epoch(FT(), 30), "ab_second": lambda: at_epoch(AB(), 30)},
}


def at_epoch(method: Method, epoch: int) -> Method:
    method.set_epoch(epoch)
    return method


def last_only(o: Outputs) -> Outputs:
    name, x = list(o.features.items())[-1]
    return Outputs.of(o.logits, {name: x})


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("name", MAKERS)
def test_methods_run_on_any_pair_of_maps_and_train_student_and_projectors(name, shapes, n: int, bf16: bool) -> None:
    method = MAKERS[name]()
    student, teacher = outputs(*shapes[0], n=n), outputs(*shapes[1], n=n, seed=9)
    if name == "pkt":
        student, teacher = last_only(student), last_only(teacher)
    teacher = Outputs.of(teacher.logits.detach(), {k: v.detach() for k, v in teacher.features.items()})
    method.build(student, teacher, torch.zeros(4, dtype=torch.int64))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        terms = method(student, teacher, batch(torch.arange(n) % 5))
    assert all(t.ndim == 0 and t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    if name == "ab_second":
        assert terms == {}
        return
    assert list(terms) == (["paraphraser"] if name == "ft" else ["hint"])
    sum(terms.values()).backward()
    grads = {k: p.grad for k, p in method.named_parameters()}
    assert student.logits.grad is None
    if name == "ft":
        assert all((g is None) == k.startswith("translator") for k, g in grads.items())
    elif name == "ft_second":
        assert all((g is None) != k.startswith("translator") for k, g in grads.items())
    else:
        assert all(g is not None and g.isfinite().all() for g in grads.values())
        assert any(f.grad is not None and (n == 1 or f.grad.abs().sum() > 0) for f in student.features.values())


@pytest.mark.parametrize("name", ["fitnet", "at", "nst", "vid"])
def test_weights_scale_their_terms_and_zero_leaves_them_out(name: str) -> None:
    student, teacher = outputs(*PAIRS[0][0]), outputs(*PAIRS[0][1], seed=9)
    target, ids = batch(torch.tensor([1, 4])), torch.zeros(1, dtype=torch.int64)
    results = []
    for hint in (2.0, 6.0):
        torch.manual_seed(0)
        method = MAKERS[name](hard=0.5, hint=hint)
        method.build(student, teacher, ids)
        results.append(method(student, teacher, target))
    torch.testing.assert_close(results[1]["hint"], 3 * results[0]["hint"])
    alone = MAKERS[name](hint=0)
    alone.build(student, None, ids)
    assert alone(student, None, target) == {}
    assert list(alone.parameters()) == []
    assert alone.taps() == ((), ())


@pytest.mark.parametrize("name", ["at", "nst"])
def test_stages_are_paired_from_the_last_and_summed(name: str) -> None:
    student, teacher = (
        outputs([1, 2], [(8, 6), (4, 3)]),
        outputs([2, 5, 1, 3], [(9, 9), (9, 6), (8, 6), (4, 3)], seed=9),
    )
    s, t = list(student.features.values()), list(teacher.features.values())
    expected = 0.0
    for a, b in ((s[0].double(), t[2].double()), (s[1].double(), t[3].double())):
        if name == "at":
            a, b = ((x**2).sum(1) for x in (a, b))
            a, b = (x / (x**2).sum((1, 2), keepdim=True).sqrt() for x in (a, b))
            expected += ((a - b) ** 2).mean()
        else:
            a, b = (x.flatten(2) / (x**2).sum((2, 3)).sqrt()[..., None] for x in (a, b))
            k = lambda x, y: (torch.einsum("nip,njp->nij", x, y) ** 2).mean()  # noqa: E731
            expected += k(a, a) + k(b, b) - 2 * k(a, b)
    hint = MAKERS[name](hint=3.0)(student, teacher, batch(torch.tensor([0, 1])))["hint"]
    torch.testing.assert_close(hint.double(), 3 * expected, rtol=1e-5, atol=1e-6)


def test_fitnet_regresses_the_middle_stage_with_the_layers_of_the_published_table() -> None:
    student, teacher = (
        outputs([3, 4, 6], [(8, 8), (8, 8), (2, 2)]),
        outputs([4, 5, 8], [(8, 8), (4, 4), (2, 2)], seed=9),
    )
    method = FitNet(hint=2.0)
    method.build(student, teacher, torch.zeros(1))
    conv, norm, _ = method.regressor
    assert (conv.kernel_size, conv.stride, conv.weight.shape[:2]) == ((3, 3), (2, 2), (5, 4))
    y = F.conv2d(student.features["layer1"].double(), conv.weight.double(), conv.bias.double(), 2, 1)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
    expected = 2 * ((y.clamp(min=0) - teacher.features["layer1"].double()) ** 2).mean()
    hint = method(student, teacher, batch(torch.tensor([0, 1])))["hint"]
    torch.testing.assert_close(hint.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="0 to 2"):
        FitNet(stage=3).build(student, teacher, torch.zeros(1))
    other = FitNet(stage=-1)
    other.build(student, teacher, torch.zeros(1))
    assert other.regressor[0].weight.shape == (8, 6, 1, 1)
    even = FitNet()
    even.build(outputs(*PAIRS[1][0]), outputs(*PAIRS[1][1]), torch.zeros(1))
    assert even.regressor[0].weight.shape[:2] == (3, 2)  # the later of two


def test_ab_halves_the_weight_of_each_earlier_stage() -> None:
    shapes = ([2, 3, 4], [(4, 4), (3, 2), (2, 2)])
    student, teacher = outputs(*shapes), outputs(*shapes, seed=9)
    method = AB(hint=2.0, margin=0.7)
    method.build(student, teacher, torch.zeros(1))
    assert list(method.parameters()) == []  # equal shapes need no connectors
    s, t = student.features.values(), teacher.features.values()
    by_stage = []
    for a, b in zip(s, t, strict=True):
        aim = torch.where(b > 0, 0.7, -0.7).double()
        missing = (aim - a.double()) * aim.sign()
        by_stage.append((missing.clamp(min=0) ** 2).sum() / 2)
    expected = 2 * 3 / 1000 * (by_stage[0] / 4 + by_stage[1] / 2 + by_stage[2])
    torch.testing.assert_close(
        method(student, teacher, batch(torch.zeros(2)))["hint"].double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("equal", [True, False])
def test_fsp_compares_flows_of_consecutive_stages(equal: bool) -> None:
    sizes = [(4, 6), (4, 3), (2, 3)]
    student, teacher = outputs([2, 3, 4] if equal else [2, 5, 4], sizes), outputs([2, 3, 4], sizes, seed=9)
    method = FSP(hint=2.0)
    method.build(student, teacher, torch.zeros(1))
    f_s = [x.double() for x in student.features.values()]
    if equal:
        assert list(method.parameters()) == []
    else:
        (weight,) = method.parameters()
        f_s[1] = torch.einsum("dc,nchw->ndhw", weight.double().flatten(1), f_s[1])
    f_t = [x.double() for x in teacher.features.values()]

    def flows(f: list[Tensor]) -> list[Tensor]:
        one = torch.einsum("nchw,ndhw->ncd", f[0].reshape(2, 2, 4, 3, 2).amax(4), f[1]) / 12
        two = torch.einsum("nchw,ndhw->ncd", f[1].reshape(2, 3, 2, 2, 3).amax(3), f[2]) / 6
        return [one, two]

    expected = 2 * sum(((a - b) ** 2).mean() for a, b in zip(flows(f_s), flows(f_t), strict=True))
    torch.testing.assert_close(
        method(student, teacher, batch(torch.zeros(2)))["hint"].double(), expected, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match="one stage"):
        FSP().build(last_only(student), teacher, torch.zeros(1))


def test_paraphraser_learns_to_reconstruct_and_then_rests() -> None:
    torch.manual_seed(0)
    student, teacher = outputs([3], [(4, 4)], n=4), outputs([4], [(4, 4)], n=4, seed=9)
    teacher = Outputs.of(teacher.logits, {k: v.detach() for k, v in teacher.features.items()})
    method = FT()
    method.build(student, teacher, torch.zeros(1))
    assert method.encoder(teacher.features["layer0"]).shape == (4, 2, 4, 4)
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    losses = []
    for _ in range(60):
        loss = method(student, teacher, batch(torch.zeros(4, dtype=torch.int64)))["paraphraser"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    method.set_epoch(30)
    terms = method(student, teacher, batch(torch.zeros(4, dtype=torch.int64)))
    factor = method.encoder(teacher.features["layer0"]).detach()
    units = [x.flatten(1) for x in (method.translator(student.features["layer0"]).double(), factor.double())]
    units = [x / (x**2).sum(1, keepdim=True).sqrt() for x in units]
    expected = 500 * (units[0] - units[1]).abs().mean()
    torch.testing.assert_close(terms["hint"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fitnet", "at", "nst", "vid", "ab", "ft", "fsp"])
def test_vectors_and_tokens_are_refused_in_one_line(name: str) -> None:
    flat = Outputs.of(tensor((2, 5), 0), {"fc": tensor((2, 7), 1), "blocks": tensor((2, 5, 7), 2)})
    for student, teacher in ((flat, outputs(*PAIRS[0][0])), (outputs(*PAIRS[0][0]), flat)):
        with pytest.raises(UserError, match="spatial maps"):
            MAKERS[name]().build(student, teacher, torch.zeros(1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FitNet(hint=-1), "negative"),
        (lambda: AB(init_epochs=0), "two phases"),
        (lambda: AB(hint=0), "two phases"),
        (lambda: FSP(hard=0), "two phases"),
        (lambda: FT(rate=0), "two phases"),
        (lambda: FT(p=3), "1 or 2"),
        (lambda: PKT().build(outputs(*PAIRS[0][0]), last_only(outputs(*PAIRS[0][1])), torch.zeros(1)), "as many"),
    ],
)
def test_wrong_values_are_refused(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_methods_read_what_taps_find_on_two_networks() -> None:
    def net(width: int) -> nn.Module:
        stage = lambda a, b, s: nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU(inplace=True))  # noqa: E731
        body = [stage(1, width, 1), stage(width, 2 * width, 2), stage(2 * width, 3 * width, 2)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3 * width, 5))

    student, teacher, x = net(2), net(3).eval(), tensor((4, 1, 12, 8), 0)
    for name in ("fitnet", "at", "nst", "pkt", "vid", "ab", "ft", "fsp"):
        method = MAKERS[name]()
        taps = method.taps()
        readers = Reader(student, x, taps.student), Reader(teacher, x, taps.teacher)
        with torch.no_grad():
            hints = readers[1](x)
            method.build(readers[0](x), hints, torch.zeros(4, dtype=torch.int64))
        terms = method(readers[0](x), hints, batch(torch.arange(4)))
        sum(terms.values()).backward()
        assert (student[0][0].weight.grad is None) == (name == "ft")
        student.zero_grad()
        for reader in readers:
            reader.remove()
