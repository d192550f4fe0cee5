"""`method=pairs`: the terms of published methods as pairs, what it takes from a yaml, and how it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from litdistill import Pair, Pairs, losses
from litdistill.config.instantiate import instantiate
from litdistill.losses.named import LOSSES
from litdistill.methods import AT, CWD, DIST, ICKD, KD, NST, PKD, PKT, RKD, SP, FitNet, LogitMSE, Shuffled, Sum
from litdistill.methods.base import ALL_KINDS, BERNOULLI, CATEGORICAL, Method
from litdistill.models.resnet import resnet
from litdistill.types import Outputs
from litdistill.utils.errors import UserError
from tests.methods.contract import Reader, batch

SHAPE, CLASSES, N = (3, 16, 16), 5, 6
STAGES = ("layer1", "layer2", "layer3")


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return resnet(CLASSES, SHAPE, 8), resnet(CLASSES, SHAPE, 14, widths=[16, 16, 24, 48])


def built(method: Method, student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Outputs, Outputs]:
    """The calls of a distiller in their order; the outputs of both networks, the student's with their graph."""
    student = method.prepare(student, teacher, images)
    taps = method.taps()
    s, t = Reader(student.eval(), images, taps.student)(images), None
    with torch.no_grad():
        t = Reader(teacher.eval(), images, taps.teacher)(images)
        method.build(s, t, None)
    return s, t


def gradient(terms: dict[str, Tensor], net: nn.Module) -> list[Tensor]:
    parameters = list(net.parameters())
    found = torch.autograd.grad(sum(terms.values()), parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def each(loss: str, nodes=STAGES, **more) -> list[Pair]:
    return [Pair(node, node, loss, **more) for node in nodes]


def pooled(loss: str, weight: float) -> Pair:
    return Pair("pooled", "pooled", loss, weight)


PUBLISHED = {
    "fitnet": (FitNet(hint=3.0), Pairs([Pair("layer2", "layer2", "mse", 3.0, "regressor")])),
    "at": (AT(hint=7.0), Pairs(each("attention", weight=7.0))),
    "nst": (NST(hint=2.0), Pairs(each("mmd", weight=2.0))),
    "pkd": (PKD(hint=2.0), Pairs(each("pearson", weight=2.0))),
    "cwd": (CWD(hint=5.0, temperature=3.0), Pairs(each("kl_places", STAGES[-1:], weight=5.0, options={"temperature": 3.0}))),
    "ickd": (ICKD(hint=2.5), Pairs([Pair("last", "last", "channel_correlation", 2.5, "norm")])),
    "sp": (SP(hint=9.0), Pairs([Pair("last", "last", "similarity", 9.0)])),
    "rkd": (RKD(distance=2.0, angle=3.0), Pairs([pooled("distances", 2.0), pooled("angles", 3.0)])),
    "pkt": (PKT(hint=4.0), Pairs([pooled("neighbors", 4.0)])),
    "kd": (KD(soft=0.9, temperature=2.0), Pairs([Pair("logits", "logits", "kl", 0.9, options={"temperature": 2.0})])),
    "logit_mse": (LogitMSE(soft=2.0), Pairs([Pair("logits", "logits", "half_squared", 2.0)])),
    "dist": (
        DIST(inter=1.0, intra=2.0),
        Pairs([Pair("logits", "logits", "inter_class"), Pair("logits", "logits", "intra_class", 2.0)]),
    ),
    "stages": (AT(hint=7.0), Pairs([Pair("stages", "stages", "attention", 7.0)])),  # an alias of several features
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_term_as_pairs_is_the_same_with_its_gradient(name):
    method, pairs = (copy.deepcopy(x) for x in PUBLISHED[name])
    student, teacher = networks()
    images = torch.randn(N, *SHAPE)
    s, t = built(method, student, teacher, images)
    want = method(s, t, batch(torch.zeros(N, dtype=torch.long)))
    s2, t2 = built(pairs, student, teacher, images)
    theirs = [p for key, p in method.named_parameters()]  # the projectors, in the order of the stages
    ours = list(pairs.parameters())
    if name in ("pkd", "cwd"):  # PKD's projectors have no bias, and a bias has no place in a correlation or a softmax
        ours = [p for p in ours if p.ndim == 4] if name == "pkd" else ours
    assert [p.shape for p in ours] == [p.shape for p in theirs]
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    got = pairs(s2, t2, batch(torch.zeros(N, dtype=torch.long)))
    torch.testing.assert_close(sum(got.values()), sum(want.values()), rtol=1e-5, atol=1e-6)
    for a, b in zip(gradient(got, student), gradient(want, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(g.any() for g in gradient(got, student))


def test_terms_have_the_names_of_their_losses_or_their_own():
    pairs = Pairs(
        [
            Pair("layer2", "layer2", "mse"),
            Pair("layer3.0.conv1:in", "layer3", "mse", projector="linear"),
            Pair("logits", "logits", "kl"),
            Pair("pooled", "pooled", "cosine", name="direction"),
            Pair("layer3", "layer2", "mse"),
            Pair("layer3", "layer3", "mse"),
            Pair("layer1", "layer1", "mse", weight=0),
        ]
    )
    student, teacher = networks()
    s, t = built(pairs, student, teacher, torch.randn(N, *SHAPE))
    terms = pairs(s, t, batch(torch.zeros(N, dtype=torch.long)))
    assert list(terms) == [
        "mse_layer2", "mse_layer3_0_conv1_in", "kl_logits", "direction", "mse_layer3_layer2", "mse_layer3_layer3"
    ]  # fmt: skip
    assert pairs.taps().student == ["layer2", "layer3.0.conv1:in", "fc:in", "layer3"]
    assert pairs.taps().teacher == ["layer2", "layer3", "fc:in"]
    assert all(term.ndim == 0 and term > 0 for term in terms.values())


def test_projectors_are_made_where_channels_differ_and_the_loss_needs_them_equal():
    kinds = {
        "same": Pair("layer1", "layer1"),
        "other": Pair("layer2", "layer2"),
        "relations": Pair("layer2", "layer2", "similarity"),
        "none": Pair("layer1", "layer1", "mse", 1.0, "none"),
        "forced": Pair("layer1", "layer1", "mse", 1.0, "linear"),
        "normed": Pair("layer2", "layer2", "mse", 1.0, "norm"),
        "wide": Pair("pooled", "pooled", "mse"),
    }
    pairs = Pairs([pair._replace(name=name) for name, pair in kinds.items()])
    built(pairs, *networks(), torch.randn(N, *SHAPE))
    found = {name: [tuple(p.shape) for p in part.parameters()] for name, part in pairs.comparisons.items()}
    assert found == {
        "same": [],
        "other": [(24, 32, 1, 1), (24,)],
        "relations": [],
        "none": [],
        "forced": [(16, 16, 1, 1), (16,)],
        "normed": [(24, 32, 1, 1), (24,), (24,)],
        "wide": [(48, 64, 1, 1), (48,)],
    }


class Tokens(nn.Module):
    """A network of patches: tokens (N, T, C), a class token in front where `front`, and an embedding as a head."""

    def __init__(self, width: int, front: int):
        super().__init__()
        self.patches, self.block, self.head = (
            nn.Conv2d(3, width, 4, 4),
            nn.Linear(width, width),
            nn.Linear(width, CLASSES),
        )
        self.front = front

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.block(nn.functional.pad(x, (0, 0, self.front, 0)))
        return {"logits": self.head(x.mean(1)), "embedding": x.mean(1)}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_pairs_maps_and_tokens_or_says_that_it_cannot(loss):
    torch.manual_seed(0)
    student, teacher = networks()[0], Tokens(12, 1)
    pairs = Pairs(
        [Pair("layer2", "block", loss), Pair("logits", "embedding", "mse"), Pair("layer1", "embedding", "cosine")]
    )
    if loss == "pyramid":
        pairs = Pairs([Pair("layer2", "block", loss)])
    images = torch.randn(N, *SHAPE)
    s, t = built(pairs, student.train(), teacher, images)
    terms = pairs(s, t, batch(torch.zeros(N, dtype=torch.long)))
    assert all(term.isfinite() and term.ndim == 0 for term in terms.values())
    assert any(g.any() for g in gradient({"x": next(iter(terms.values()))}, student))


def test_two_token_networks_and_an_embedding_as_the_student():
    torch.manual_seed(0)
    pairs = Pairs([Pair("block", "block", "mse"), Pair("embedding", "embedding", "cosines"), Pair("logits", "logits")])
    student, teacher = Tokens(8, 0), Tokens(12, 1)
    s, t = built(pairs, student, teacher, torch.randn(N, *SHAPE))
    terms = pairs(s, t, batch(torch.zeros(N, dtype=torch.long)))
    project = pairs.comparisons["mse_block"][0].projector
    by_hand = s.features["block"] @ project.weight[:, :, 0, 0].T + project.bias  # token by token
    torch.testing.assert_close(terms["mse_block"], (by_hand - t.features["block"][:, 1:]).square().mean())
    torch.testing.assert_close(terms["cosines_embedding"], losses.cosines(s.heads["embedding"], t.heads["embedding"]))


# -- from a yaml -------------------------------------------------------------------------------------------------------


class Huber(nn.Module):
    """A loss with a parameter."""

    def __init__(self, delta: float = 1.0):
        super().__init__()
        self.log_delta = nn.Parameter(torch.tensor(delta).log())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean() * self.log_delta.exp()


def power(student: Tensor, teacher: Tensor, exponent: int = 2) -> Tensor:
    return (student - teacher).abs().pow(exponent).mean()


def test_a_yaml_takes_options_beside_the_pair_and_losses_of_ones_own():
    here = "tests.methods.test_layer_pairs"
    node = {
        "_target_": "litdistill.methods.Pairs",
        "hard": 0.5,
        "pairs": [
            {"student": "logits", "teacher": "logits", "loss": "kl", "weight": 2, "temperature": 3},
            {"student": "layer3", "teacher": "layer3", "loss": {"_target_": f"{here}.Huber", "delta": 2.0}},
            {"student": "layer3", "teacher": "layer3", "loss": {"_target_": f"{here}.power", "_partial_": True, "exponent": 3}},
        ],
    }  # fmt: skip
    method = instantiate(node, "method")
    student, teacher = networks()
    s, t = built(method, student, teacher, torch.randn(N, *SHAPE))
    terms = method(s, t, batch(torch.zeros(N, dtype=torch.long)))
    assert (method.hard, list(terms)) == (0.5, ["kl_logits", "huber_layer3", "power_layer3"])
    torch.testing.assert_close(terms["kl_logits"], 2 * losses.kl(s.logits, t.logits, 3.0))
    sum(terms.values()).backward()
    assert [float(p.grad) != 0 for name, p in method.named_parameters() if name.endswith("log_delta")] == [True]


def test_which_logits_the_losses_are_defined_for():
    def on(node, loss):
        return Pairs([Pair(node, node, loss)]).kinds

    assert on("logits", "kl") == (CATEGORICAL,)
    assert on("logits", "binary_kl") == (BERNOULLI,)
    assert on("layer1", "kl") == on("logits", "mse") == ALL_KINDS
    with pytest.raises(UserError, match="for one label and for several"):
        Pairs([Pair("logits", "logits", "kl"), Pair("logits", "logits", "binary_kl")])


def test_what_pairs_needs_of_classes_and_of_tokens_that_are_samples():
    assert Pairs([Pair("logits", "logits", "kl")]).fewest_classes == 2
    assert Pairs([Pair("logits", "logits", "inter_class"), Pair("a", "b")]).fewest_classes == 3
    assert Pairs([Pair("logits", "logits", "kl"), Pair("a", "b")]).takes_places
    assert not Pairs([Pair("logits", "logits", "kl"), Pair("a", "b", "similarity")]).takes_places


def test_tokens_that_are_samples_pass_the_projector_of_their_sequence():
    torch.manual_seed(0)
    pairs = Pairs([Pair("block", "block"), Pair("logits", "logits", "kl")])
    student, teacher = Tokens(8, 0), Tokens(12, 0)
    s, t = built(pairs, student, teacher, torch.randn(N, *SHAPE))
    whole = pairs(s, t, batch(torch.zeros(N, dtype=torch.long)))["mse_block"]
    places = torch.ones(N, 16, dtype=torch.bool)
    flat = pairs(s.at(places), t.at(places), batch(torch.zeros(N, dtype=torch.long)))["mse_block"]
    torch.testing.assert_close(flat, whole)


def test_pairs_adds_up_with_other_methods():
    method = Sum({"kd": KD(), "pairs": Pairs([Pair("layer2", "layer2")], hard=0.0)})
    student, teacher = networks()
    s, t = built(method, student, teacher, torch.randn(N, *SHAPE))
    assert list(method(s, t, batch(torch.zeros(N, dtype=torch.long)))) == ["kd_soft", "pairs_mse_layer2"]
    inner = Pairs([Pair("logits", "logits", "mse")])
    shuffled = Shuffled(inner)
    s, t = built(shuffled, student, teacher, torch.randn(N, *SHAPE))
    assert shuffled(s, t, batch(torch.tensor([0, 0, 1, 1, 2, 2])))["mse_logits"] > 0


def test_labels_alone_where_every_weight_is_zero():
    method = Pairs([Pair("layer2", "layer2", weight=0)], hard=1.0)
    assert method.taps() == ((), ())
    assert not method.needs_teacher
    s, _ = built(method, *networks(), torch.randn(N, *SHAPE))
    assert method(s, None, batch(torch.zeros(N, dtype=torch.long))) == {}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "pairs is a list of pairs"),
        ({"student": "a", "teacher": "b"}, "pairs is a list of pairs"),
        ([{"student": "layer2"}], r"pairs\[0\] names a student's node and a teacher's"),
        ([{"student": ["a", "b"], "teacher": "b"}], "are names, of a module or a head"),
        ([Pair("a", "b", "msee")], r"pairs\[0\].loss=msee: did you mean mse"),
        ([Pair("a", "b", "wasserstein")], "loss=wasserstein: known are mse, l1"),
        ([Pair("a", "b", 3)], "loss=3 is neither a name nor a function"),
        ([Pair("a", "b"), Pair("a", "b", weight=-1)], r"pairs\[1\].weight=-1 cannot be negative"),
        ([Pair("a", "b", weight="much")], "weight=much is no number"),
        ([Pair("a", "b", projector="mlp")], "projector=mlp: known are auto"),
        ([{"student": "a", "teacher": "b", "loss": "kl", "temprature": 2}], "no option temprature: did you mean temperature"),
        ([{"student": "a", "teacher": "b", "loss": "kl", "wieght": 2}], "no option wieght: did you mean weight"),
        ([{"student": "a", "teacher": "b", "depth": 2}], "mse has no option depth: it takes none"),
        ([Pair("a", "b", "kl", options={"temperature": 0})], "temperature=0 must be a number above 0"),
        ([Pair("a", "b"), Pair("a", "b")], "two terms are called mse_a_b"),
        ([Pair("a", "b", name="a term")], "name: a term is no name of a term"),
    ],
)  # fmt: skip
def test_a_list_that_says_nothing_sensible_is_refused(pairs, said):
    with pytest.raises(UserError, match=said) as error:
        Pairs(pairs)
    assert "\n" not in str(error.value)


def test_nothing_to_learn_is_refused():
    with pytest.raises(UserError, match="nothing is learned"):
        Pairs([Pair("a", "b", weight=0)], hard=0)


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (Pair("layr2", "layer2"), r"pairs\[0\].student=layr2: No tap 'layr2'. Nearest modules: layer2.*Heads are logits"),
        (Pair("layer2", "layer9"), r"pairs\[0\].teacher=layer9: No tap 'layer9'"),
        (Pair("embedding", "embedding"), "student=embedding: this network has no such head, it gives logits"),
        (Pair("logits", "logits", "attention"), "logits (N, 5) of the teacher by attention: this loss compares positions"),
        (Pair("layer2", "layer2", "mse", 1.0, "none"), "by mse: 32 and 24 channels need a projector"),
        (Pair("layer2", "fc", "attention"), "layer2 (N, 32, 8, 8) of the student and fc (N, 5) of the teacher"),
        (Pair("layer2", "layer2", lambda s, t: (s - t).abs(), 1.0, "none"), "must match the size"),
        (Pair("layer2", "layer2", lambda s, t: (s - t).abs()), "the loss should be a scalar"),
        (Pair("layer2", "layer2", lambda s, t: 3.0), "the loss should be a scalar"),
    ],
)  # fmt: skip
def test_nodes_and_shapes_that_do_not_fit_are_named(pair, said):
    student, teacher = networks()
    with pytest.raises(UserError) as error:
        built(Pairs([pair]), student, teacher, torch.randn(N, *SHAPE))
    assert re.search(said if "\\" in said else re.escape(said), str(error.value)), str(error.value)
