"""The loss of teachers that know some of the classes, and which methods take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from litdistill.distillation.distiller import Distiller
from litdistill.losses import kl, members_kl
from litdistill.methods import DIST, DKD, KD, SP, SoftTargetCE, Sum
from litdistill.models.ensemble import Ensemble
from litdistill.models.small import conv4
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError
from tests.ensembles import COLUMNS, KNOWN, WEIGHTS, Fixed, drawn, softmax

# -- the loss ------------------------------------------------------------------------------------------------------------


def members(seed: int = 0) -> tuple[list[Tensor], Tensor]:
    logits = [drawn(4, 4, seed=seed), drawn(4, 3, seed=seed + 1)]
    ensemble = Ensemble([Fixed(z) for z in logits], WEIGHTS, columns=[[*c, -1] for c in COLUMNS])
    return logits, ensemble(torch.zeros(4, 1))["members"].detach()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_of_teachers_of_some_classes_is_a_divergence_among_those(temperature):
    logits, head = members()
    student = drawn(4, 7, seed=9).float().requires_grad_()
    loss = members_kl(student, head, temperature)
    loss.backward()
    expected, gradient = 0.0, np.zeros((4, 7))
    for n in range(4):
        for w, known, z in zip([0.75, 0.25], KNOWN, logits, strict=True):
            p = softmax(z[n].numpy() / temperature)
            q = softmax(student[n].detach().double().numpy()[known] / temperature)
            expected += temperature**2 * w * float((p * np.log(p / q)).sum()) / 4
            gradient[n, known] += temperature * w * (q - p) / 4  # of T² KL at T, by hand
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert np.allclose(student.grad.numpy(), gradient, atol=1e-6)
    assert (student.grad[:, 6] == 0).all()  # a class that no teacher knows
    assert np.allclose(gradient.sum(1), 0)


def test_of_teachers_that_know_all_classes_it_has_the_gradient_of_their_mean_distribution():
    logits = [drawn(4, 5, seed=i) for i in range(2)]
    head = Ensemble([Fixed(z) for z in logits], [2, 1], columns=[[0, 1, 2, 3, 4]] * 2)
    joint = head.each(torch.zeros(4, 1)).log_softmax(2) + head.log_weights[:, None]
    student = drawn(4, 5, seed=7).requires_grad_()
    (first,) = torch.autograd.grad(members_kl(student, joint, 3.0), student)
    mean = (2 * (logits[0] / 3).softmax(1) + (logits[1] / 3).softmax(1)) / 3
    (second,) = torch.autograd.grad(kl(student, 3 * mean.log(), 3.0), student)
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("kind", [KD, SoftTargetCE])
def test_methods_that_read_distributions_read_those_of_teachers_of_some_classes(kind):
    _, head = members()
    teacher = Outputs({"logits": torch.full((4, 7), float("nan")), "members": head})  # what they must not read
    student = drawn(4, 7, seed=3).float().requires_grad_()
    terms = kind(soft=0.7, temperature=2.0)(Outputs.of(student), teacher, Batch(None, None))
    (gradient,) = torch.autograd.grad(terms["soft"], student)
    (expected,) = torch.autograd.grad(0.7 * members_kl(student, head, 2.0), student)
    assert torch.allclose(gradient, expected, atol=1e-6)


def distiller(method, columns, seed=0):
    nets = [conv4(4, (1, 8, 8), widths=[4, 8]) for _ in columns]
    example = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    return Distiller(conv4(6, (1, 8, 8), widths=[4]), method, Ensemble(nets, columns=columns), example)


SOME = [[0, 1, 2, 3, -1, -1], [-1, -1, 0, 1, 2, 3]]


@pytest.mark.parametrize("method", [DKD(), DIST(), Sum({"kd": KD(), "dist": DIST(hard=0)})])
def test_a_method_that_needs_all_classes_is_refused_by_name(method):
    name = "DKD" if isinstance(method, DKD) else "DIST"
    with pytest.raises(UserError, match=rf"^{name} needs a teacher of all classes, and these know 4 of 6, 4 of 6: use"):
        distiller(method, SOME)


def test_a_method_that_reads_features_takes_teachers_of_some_classes():
    batch = Batch(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]))
    found = distiller(Sum({"kd": KD(), "sp": SP(hard=0, teacher_taps="1.pooled")}), SOME)
    terms = found.method(found.extractor(batch.inputs), found.teacher(batch), batch)
    assert {name: bool(v.isfinite()) for name, v in terms.items()} == {"kd_soft": True, "sp_hint": True}
