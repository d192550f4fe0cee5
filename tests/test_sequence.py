"""Language models: losses, methods and metrics over the tokens of padded sequences, against formulas of each in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from litdistill import Batch, Distiller, LanguageModel, Outputs
from litdistill.methods import (
    DIST,
    DKD,
    KD,
    MFT,
    NKD,
    RKD,
    SP,
    WTTM,
    FitNet,
    HardPseudoLabel,
    LogitMSE,
    Mutual,
    Online,
    Shuffled,
    SoftTargetCE,
    Sum,
    Supervised,
    TeacherFree,
)
from litdistill.models.language import causal_transformer
from litdistill.utils.errors import UserError
from litdistill.utils.modality import PADDING

N, T, V = 4, 6, 7
LENGTHS = (6, 2, 1, 4)  # tokens with a target of each sequence


class Table(nn.Module):
    """Gives the same logits (N, T, V) whatever the tokens are, so that gradients are those of the logits."""

    def __init__(self, seed: int):
        super().__init__()
        self.logits = nn.Parameter(3 * torch.randn(N, T, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[: len(tokens)] * 1


def padded(seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, V, (N, T), generator=g) for _ in range(2))
    for row, length in zip(targets, LENGTHS, strict=True):
        row[length:] = PADDING
    return Batch(tokens, targets, torch.arange(N))


def rows(student: Tensor, teacher: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor, int]]:
    """The logits of both networks and the target of each token that has one, by two loops."""
    return [
        (student[n, t], teacher[n, t], int(batch.targets[n, t])) for n in range(N) for t in range(T) if t < LENGTHS[n]
    ]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def soft(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def of_kd(s: Tensor, t: Tensor, y: int) -> Tensor:
    return 16 * kl(soft(t / 4), soft(s / 4))


def of_dkd(s: Tensor, t: Tensor, y: int) -> Tensor:
    p, q = soft(t / 4), soft(s / 4)
    pair = lambda r: torch.stack([r[y], 1 - r[y]])  # noqa: E731
    others = [i for i in range(V) if i != y]
    return 16 * (kl(pair(p), pair(q)) + 8 * kl(p[others] / (1 - p[y]), q[others] / (1 - q[y])))


def of_logit_std(s: Tensor, t: Tensor, y: int) -> Tensor:
    z = lambda x: (x - x.mean()) / (x - x.mean()).square().sum().div(V - 1).sqrt()  # noqa: E731
    return 9 * 4 * kl(soft(z(t) / 2), soft(z(s) / 2))


def of_wttm(s: Tensor, t: Tensor, y: int) -> Tensor:
    power = soft(t) ** 0.2
    return 4 * power.sum() * kl(power / power.sum(), soft(s))


def of_mse(s: Tensor, t: Tensor, y: int) -> Tensor:
    return (s - t).square().sum() / 2


def of_soft_target(s: Tensor, t: Tensor, y: int) -> Tensor:
    return -16 * (soft(t / 4) * soft(s / 4).log()).sum()


def of_pseudo(s: Tensor, t: Tensor, y: int) -> Tensor:
    return -soft(s)[t.argmax()].log()


def of_teacher_free(s: Tensor, t: Tensor, y: int) -> Tensor:
    p = torch.full((V,), 0.01 / (V - 1), dtype=torch.float64)
    p[y] = 0.99
    return kl(soft(p / 20), soft(s))


def of_nkd(s: Tensor, t: Tensor, y: int) -> Tensor:
    p, q = soft(t), soft(s)
    others = [i for i in range(V) if i != y]
    return -p[y] * q[y].log() - 1.5 * (p[others] / (1 - p[y]) * (q[others] / (1 - q[y])).log()).sum()


def of_mft(s: Tensor, t: Tensor, y: int) -> Tensor:
    p = soft(t)
    share = (0.2 + p.max() - p[y]) / (1 + p.max() - p[y]) if p.argmax() != y else min(1.0, (0.2 / (1 - p[y])).item())
    p = (1 - share) * p + share * (torch.arange(V) == y)
    return (torch.xlogy(p, p) - p * soft(s).log()).sum()


METHODS = [
    (KD(hard=0, soft=1), of_kd),
    (DKD(hard=0), of_dkd),
    (KD(hard=0, soft=9.0, temperature=2.0, standardized=True), of_logit_std),
    (NKD(hard=0), of_nkd),
    (MFT(), of_mft),
    (WTTM(hard=0), of_wttm),
    (LogitMSE(), of_mse),
    (SoftTargetCE(hard=0, soft=1), of_soft_target),
    (HardPseudoLabel(hard=0, pseudo=1), of_pseudo),
    (TeacherFree(hard=0, soft=1), of_teacher_free),
    (Supervised(), lambda s, t, y: -soft(s)[y].log()),
]


def both(method, expected) -> None:
    """Compares loss and gradient of a Distiller on a padded batch with `expected(rows)` of float64 logits."""
    batch, student, teacher = padded(), Table(1), Table(2)
    distiller = Distiller(student, method, teacher, batch, task="language_model")
    loss = distiller.loss(batch)
    loss.backward()
    s, t = student.logits.detach().double().requires_grad_(), teacher.logits.detach().double()
    reference = expected(rows(s, t, batch))
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(
        student.logits.grad, s.grad.float(), rtol=1e-3, atol=1e-6 * s.grad.abs().max().item() + 1e-7
    )
    assert student.logits.grad[1, LENGTHS[1] :].abs().max() == 0  # padding has no gradient


@pytest.mark.parametrize(("method", "formula"), METHODS, ids=[type(m).__name__ for m, _ in METHODS])
def test_a_loss_is_the_mean_over_the_tokens_with_a_target(method, formula):
    both(method, lambda found: torch.stack([formula(*row) for row in found]).mean())


def test_dist_takes_each_token_as_a_sample():
    def expected(found: list[tuple[Tensor, Tensor, int]]) -> Tensor:
        q, p = (torch.stack([soft(row[i] / 4) for row in found]) for i in (0, 1))
        distance = lambda a, b: 1 - torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(a, b)]).mean()  # noqa: E731, B905
        return 2 * 16 * distance(q, p) + 2 * 16 * distance(q.T, p.T)

    both(DIST(hard=0), expected)


def test_a_sum_and_its_labels_are_means_over_tokens():
    method = Sum({"kd": KD(hard=0.3, soft=0.7), "mse": LogitMSE(soft=0.5)})
    each = lambda s, t, y: -0.3 * soft(s)[y].log() + 0.7 * of_kd(s, t, y) + 0.5 * of_mse(s, t, y)  # noqa: E731
    both(method, lambda found: torch.stack([each(*row) for row in found]).mean())


@pytest.mark.parametrize("method", [KD(), DKD(), DIST(), WTTM(), Shuffled(KD()), Mutual(), Online()])
def test_padding_never_counts(method):
    """Other tokens in the padding, and more of it, change neither loss nor gradient nor metrics."""
    torch.manual_seed(0)
    student, teacher = (causal_transformer(V, (T + 3,), layers=n, width=8, heads=2) for n in (1, 2))
    distiller = Distiller(student, method, teacher, padded(), task=LanguageModel())
    batch, found = padded(), []
    others = torch.where(batch.targets == PADDING, (batch.inputs + 1) % V, batch.inputs)
    longer = [torch.cat([x, torch.full((N, 3), fill)], 1) for x, fill in ((batch.inputs, 1), (batch.targets, PADDING))]
    for given in (batch, batch._replace(inputs=others), batch._replace(inputs=longer[0], targets=longer[1])):
        distiller.zero_grad()
        distiller.seed_step(0)
        loss = distiller.loss(given)
        loss.backward()
        metric = distiller.task.metrics()
        metric.update(distiller.task.forward(student, given, False), given.targets)
        gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        found.append((loss.item(), metric.compute()["perplexity"].item(), gradient))
    for loss, perplexity, gradient in found[1:]:
        assert (loss, perplexity) == pytest.approx(found[0][:2], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-4, atol=1e-6)


def test_scores_and_agreement_are_means_over_tokens():
    batch, student, teacher = padded(), Table(1), Table(2)
    distiller = Distiller(student, KD(), teacher, batch, task="language_model")
    distiller.loss(batch), distiller.loss(batch)
    means = distiller.means.means()
    found = rows(student.logits.detach().double(), teacher.logits.double(), batch)
    assert means["accuracy"].item() == pytest.approx(sum(int(s.argmax()) == y for s, _, y in found) / len(found))
    assert means["agreement"].item() == pytest.approx(
        sum(int(s.argmax() == t.argmax()) for s, t, _ in found) / len(found)
    )
    assert means["kl"].item() == pytest.approx(
        sum(kl(soft(t), soft(s)).item() for s, t, _ in found) / len(found), rel=1e-5
    )
    assert distiller.means.samples == 2 * N


@pytest.mark.parametrize("method", [SP(), RKD()])
def test_a_method_that_compares_whole_samples_is_refused_by_name(method):
    with pytest.raises(
        UserError, match=rf"{type(method).__name__} compares whole samples.*\bkd, .*takes_places = True"
    ):
        Distiller(Table(1), method, Table(2), padded(), task="language_model")


def test_a_method_of_maps_is_refused_where_features_are_of_tokens():
    student, teacher = (causal_transformer(V, (T,), layers=2, width=8, heads=2) for _ in range(2))
    with pytest.raises(UserError, match="fitnet compares spatial maps"):
        Distiller(student, FitNet(), teacher, padded(), task="language_model")


def test_a_sum_with_such_a_method_is_refused():
    with pytest.raises(UserError, match="compares whole samples"):
        Distiller(Table(1), Sum({"kd": KD(), "sp": SP(hard=0)}), Table(2), padded(), task="language_model")


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_perplexity_and_accuracy_are_those_of_all_tokens_in_any_batches():
    batch, logits = padded(), Table(1).logits.detach()
    found = rows(logits.double(), logits.double(), batch)
    nll = sum(-math.log(float(soft(s)[y])) for s, _, y in found) / len(found)
    right = sum(int(s.argmax()) == y for s, _, y in found) / len(found)
    for size in (1, 3, N):
        metric = LanguageModel().metrics()
        for some, targets in zip(logits.split(size), batch.targets.split(size), strict=True):
            metric.update(Outputs.of(some), targets)
        values = {k: float(v) for k, v in metric.compute().items()}
        assert values == pytest.approx({"perplexity": math.exp(nll), "accuracy": right, "nll": nll}, rel=1e-9)


def test_chance_is_the_perplexity_of_the_tokens_frequencies():
    targets = torch.tensor([[0, 0, 0, PADDING], [0, 0, 1, 2]])
    p = torch.tensor([5, 1, 1], dtype=torch.float64) / 7
    assert LanguageModel().chance(targets) == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    metric = LanguageModel().metrics()  # which a network has that gives these frequencies everywhere
    metric.update(Outputs.of(p.log().float().expand(2, 4, 3)), targets)
    assert metric.compute()["perplexity"].item() == pytest.approx(LanguageModel().chance(targets), rel=1e-6)


def test_logits_that_are_not_finite_are_an_error():
    metric = LanguageModel().metrics()
    metric.update(Outputs.of(torch.full((1, 2, 3), math.nan)), torch.tensor([[0, 1]]))
    with pytest.raises(UserError, match="not finite"):
        metric.compute()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_targets_of_another_kind_are_refused():
    task = LanguageModel()
    for targets, said in (
        (torch.zeros(3, dtype=torch.int64), "needs the next tokens"),
        (torch.zeros(3, 2), "needs the next tokens"),
        (torch.full((2, 2), PADDING), "No token of a batch of 2 has a target"),
    ):
        with pytest.raises(UserError, match=said):
            task.places(targets)


def test_a_token_beyond_the_vocabulary_is_refused():
    batch = padded()._replace(targets=torch.full((N, T), V))
    with pytest.raises(UserError, match=f"Tokens go from {V} to {V}, and the network gives {V} logits"):
        Distiller(Table(1), task="language_model").loss(batch)


def test_a_classifier_is_no_language_model():
    with pytest.raises(UserError, match="logits \\(N, T, vocabulary\\)"):
        LanguageModel().forward(nn.Sequential(nn.Embedding(V, V), nn.Flatten()), padded(), False)


# -- the network -------------------------------------------------------------------------------------------------------


def test_the_transformer_has_gpt2s_parameters_and_looks_at_no_later_token():
    layers, width, vocabulary, length = 3, 16, 50, 12
    net = causal_transformer(vocabulary, (length,), layers=layers, width=width, heads=4).eval()
    attention, perceptron = 4 * width * width + 4 * width, 8 * width * width + 5 * width
    block = attention + perceptron + 2 * 2 * width  # and two norms
    assert sum(p.numel() for p in net.parameters()) == (vocabulary + length) * width + layers * block + 2 * width
    tokens = torch.randint(0, vocabulary, (2, length))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % vocabulary
    with torch.no_grad():
        torch.testing.assert_close(net(tokens)[:, :7], net(changed)[:, :7], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(net(tokens)[:, 7], net(changed)[:, 7])
        torch.testing.assert_close(net(tokens[:, :5]), net(tokens)[:, :5], rtol=1e-5, atol=1e-6)  # any shorter length


def test_the_transformer_is_initialized_as_published():
    torch.manual_seed(0)
    net = causal_transformer(500, (64,), layers=8, width=64, heads=4)
    spread = {name: p.std().item() for name, p in net.named_parameters() if p.ndim == 2}
    for name, std in spread.items():
        assert std == pytest.approx(0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02, rel=0.06)
    assert all(p.abs().max() == 0 for n, p in net.named_parameters() if n.endswith("bias"))
    assert net.head.weight is net.tokens.weight


@pytest.mark.parametrize("options", [{"width": 10, "heads": 4}, {"layers": 0}, {"input_shape": (3, 8, 8)}])
def test_a_transformer_of_no_sense_is_refused(options):
    with pytest.raises(UserError):
        causal_transformer(**{"num_classes": 5, "input_shape": (8,)} | options)


def test_taps_are_hidden_states_at_each_place():
    from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps

    net, tokens = causal_transformer(V, (T,), layers=4, width=8, heads=2), padded().inputs
    names = resolve_taps(net, tokens, ["pooled", "stages"])
    assert names == ["head:in", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert {tuple(f.shape) for f in FeatureExtractor(net, names)(tokens).features.values()} == {(N, T, 8)}
